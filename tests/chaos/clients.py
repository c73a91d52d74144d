"""Clients by hand: bytes on a socket."""

from __future__ import annotations

import json
import socket
from typing import Any

from tests.api.conftest import Served


def request_of(key: str, body: dict[str, Any], host: str = "localhost") -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def sent(served: Served, body: dict[str, Any], times: int = 1, **options: Any) -> socket.socket:
    """A connection on which a request was sent; `times`: so often, at once. `options` of the socket."""
    connected = socket.socket()
    for option, value in options.items():
        connected.setsockopt(socket.SOL_SOCKET, getattr(socket, option), value)
    connected.settimeout(20)
    connected.connect(("127.0.0.1", served.port))
    connected.sendall(request_of(served.api_key, body) * times)
    return connected


def read_until(connected: socket.socket, mark: bytes) -> bytes:
    received = b""
    while mark not in received:
        part = connected.recv(65536)
        assert part, received
        received += part
    return received


def leases(served: Served) -> int:
    """Held by requests of this gateway."""
    assert served.front is not None
    return sum(tally.leases for tally in served.front.gateway.fleet.tallies.values())
