"""The door of every engine port: no path answers without the worker's own secret.

Standard library only, and nothing of ours: vLLM loads this class into its own environment as
`--middleware inference.worker.guard.Guard`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

SECRET_VARIABLE = "ROUNDHOUSE_WORKER_SECRET"  # noqa: S105 - the name of the variable, not its value

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_REFUSAL = (
    b'{"error":{"message":"This port is for gateways only: send the worker\'s secret as a bearer token.",'
    b'"type":"invalid_request_error","param":null,"code":"invalid_api_key"}}'
)
_CLOSED = (
    b'{"error":{"message":"This worker takes no new requests.",'
    b'"type":"service_unavailable_error","param":null,"code":"server_is_overloaded"}}'
)

CLOSED_VARIABLE = "ROUNDHOUSE_WORKER_CLOSED"
"""Names a file: while it exists, nothing that works is begun. For engines that hear no orders."""


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


class Guard:
    """ASGI middleware. HTTP without the secret is 401 on every path; websockets are closed; lifespan passes.

    The secret comes from `ROUNDHOUSE_WORKER_SECRET`; without one the guard refuses to exist, so that
    a misconfigured worker never listens unguarded. While the file `ROUNDHOUSE_WORKER_CLOSED` exists,
    every POST is 503; what runs goes on.
    """

    def __init__(self, app: App) -> None:
        secret = os.environ.get(SECRET_VARIABLE, "")
        if not secret:
            raise RuntimeError(f"{SECRET_VARIABLE} is not set: a worker never listens without its secret.")
        self._app = app
        # Digests have one length, so comparing them says nothing about the secret's length either.
        self._expected = _digest(secret.encode())
        self._closed = os.environ.get(CLOSED_VARIABLE, "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif not self._allowed(scope):
            await _refuse(send, 401, _REFUSAL, (b"www-authenticate", b"Bearer"))
        elif self._closed and scope["method"] == "POST" and os.path.exists(self._closed):  # noqa: ASYNC240
            await _refuse(send, 503, _CLOSED)
        else:
            await self._app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, token = given[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(_digest(token.strip()), self._expected)


async def _refuse(send: Send, status: int, body: bytes, *more: tuple[bytes, bytes]) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *more,
        # The body of a refused request is never read, so the connection cannot be reused.
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
