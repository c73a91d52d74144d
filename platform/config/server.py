"""uvicorn, with the bounds that it lacks: time and size of a header, time of a body, time in which a client
takes something of its answer, time until one that vanished is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import sys
import time
from http import HTTPStatus
from typing import Any, NamedTuple, cast

import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import Server

from config.front import ANTHROPIC_URLS, API_HEADERS
from config.garbage import Collector
from inference.http import error_payload, new_request_id, request_id_now
from openai_api import limits
from openai_api.gateway import Gateway
from openai_api.messages.errors import told as in_anthropics_shape
from webchat import bounds

logger = logging.getLogger("roundhouse.http")

WEBSOCKETS: dict[str, Any] = {
    "ws": "websockets-sansio",
    "ws_max_size": bounds.FRAME_BYTES,
    "ws_ping_interval": 20.0,
    # A page that does not answer for this long is gone.
    "ws_ping_timeout": 30.0,
    # Frames of a few words gain nothing, and each connection would hold two compressors.
    "ws_per_message_deflate": False,
}
"""uvicorn's options for the chat's socket."""

SWEEP_TICKS = 10
"""Of a tenth of a second: each connection is looked at once in a second, so the limits are exact to two."""
ASKING_TICKS = 40
"""In so many, the kernel is asked of each open answer what becomes of what was sent, which costs some
microseconds."""

LINGER_SECONDS = 2.0
ASKED_SECONDS = 10.0
"""A load balancer asks at least this often."""

UNSENT_BYTES = 64 * 1024
"""Of one connection in the kernel that its client has no room for yet; as much again is kept by the process,
then its worker has to wait."""


def prepare_listener(listener: socket.socket) -> None:
    """Options that its connections inherit."""
    # A token must not wait for the acknowledgement of the one before.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A client that vanished while nothing was on its way to it: noticed in 10 + 3 * 3 seconds.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)


class OnTheWay(NamedTuple):
    """What the kernel knows of a connection (Linux' `tcp_info`)."""

    established: bool
    unanswered: bool
    """Something is sent again and again, and nothing was heard for `limits.VANISHED_SECONDS`."""
    waiting: bool
    """The client has not taken all that was written."""
    taken: int
    """Bytes that the client's side has confirmed."""

    @classmethod
    def of(cls, connected: Any) -> OnTheWay | None:
        """None where nobody tells."""
        if sys.platform != "linux" or connected is None:
            return None
        try:
            told = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        except OSError:
            return None
        if len(told) < _TCP_INFO.size:
            return None
        state, tries, unconfirmed, silent_ms, taken, unsent = _TCP_INFO.unpack(told)
        return cls(
            established=state == _ESTABLISHED,
            unanswered=unconfirmed > 0 and tries >= 3 and silent_ms >= limits.VANISHED_SECONDS * 1000,
            waiting=unconfirmed > 0 or unsent > 0,
            taken=taken,
        )


_TCP_INFO = struct.Struct("=BxB21xI28xI60xQ16xI")
"""`state`, `retransmits`, `unacked`, `last_ack_recv`, `bytes_acked` and `notsent_bytes`."""
_ESTABLISHED = 1


class GatewayProtocol(HttpToolsProtocol):
    """One client connection. Timestamps are kept here, and judged by the server's sweep: a timer per
    request would cost each of them some microseconds."""

    url = b""
    """Of the present request, as far as it came."""
    _since = 0.0
    """When the present header, or body, began."""
    _in_header = True
    _in_body = False
    _header_bytes = 0
    _answering: Any = None
    """The request that is being answered; `cycle` is the newest, which may wait behind it."""
    _taken = -1
    _taken_at = 0.0
    """How much of what was sent its client had taken when it last took something, and when that was."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # uvicorn tells the newest only: of two requests sent at once the first would never hear of it.
        self.pipeline.clear()
        answering = self._answering
        if answering is not None and not answering.response_complete:
            answering.disconnected = True
            answering.message_event.set()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        if self.server_state.ending:  # type: ignore[attr-defined]
            cycle.keep_alive = False
        super()._start_asgi_task(cycle, app)

    @property
    def _is_answering(self) -> bool:
        return self._answering is not None and not self._answering.response_complete

    def data_received(self, data: bytes) -> None:
        if self._in_header:
            if self._since == 0.0:
                # The first byte of the next request on a connection that was idle.
                self._since = time.monotonic()
                self.url = b""
            self._header_bytes += len(data)
            super().data_received(data)
            if self._in_header and self._header_bytes > limits.HEADER_BLOCK_BYTES:
                self.refuse(431, "The request's header is too large.")
        else:
            super().data_received(data)

    def on_headers_complete(self) -> None:
        self._in_header = False
        size = len(self.url)
        for name, value in self.headers:
            size += len(name) + len(value)
        if size > limits.HEADER_BLOCK_BYTES:
            self.refuse(431, "The request's header is too large.")
            return
        self._in_body = True
        self._since = time.monotonic()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_header = True
        self._in_body = False
        self._header_bytes = 0
        self._since = 0.0
        if not self.transport.is_closing():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, "The request is not valid HTTP.")

    def end_if_overdue(self, now: float) -> None:
        """Called by the sweep."""
        if self._since == 0.0 or self.transport.is_closing():
            return
        if self._in_body:
            if now - self._since > limits.BODY_SECONDS:
                self.refuse(408, "The request's body did not come in time.")
        elif self._is_answering:
            # The beginning of another request, which has time until the answer to this one has ended.
            self._since = now
        elif now - self._since > limits.HEADER_SECONDS:
            self.refuse(408, "The request's header did not come in time.")

    def end_if_left(self, now: float) -> None:
        """Called every few seconds: has the client vanished, or does it take nothing of its answer?"""
        if self not in self.connections:
            return  # its socket's number may be another's by now
        if not (self._is_answering or self.transport.get_write_buffer_size()):
            self._taken = -1
            return
        way = OnTheWay.of(self.transport.get_extra_info("socket"))
        if way is None:
            return
        if way.taken != self._taken or not (way.waiting or self.transport.get_write_buffer_size()):
            self._taken, self._taken_at = way.taken, now
        if way.unanswered:
            why = "vanished"
        elif not way.established and self.flow.read_paused:
            why = "left"  # which a paused reader does not hear
        elif now - self._taken_at > limits.STALLED_SECONDS:
            why = "takes nothing of its answer"
        else:
            return
        logger.info("a client %s", why, extra={"event": "client_lost"})
        # With RST, so that the kernel keeps nothing for it either.
        connected = self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    @property
    def hears_nothing(self) -> bool:
        """Nothing is read from it at present, so that it would not be noticed if its client left."""
        return self.flow.read_paused

    def refuse(self, status: int, message: str) -> None:
        """Answer, unless an answer has begun, and close."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            # The application has a request whose body is on its way, and knows it by this id.
            told = self.scope.get("request_id") if self._in_body else None
            request_id = str(told or new_request_id())
            body = self._explained(message, request_id)
            headers = {
                **API_HEADERS,
                b"content-type": b"application/json",
                b"content-length": b"%d" % len(body),
                b"x-request-id": request_id.encode(),
                b"connection": b"close",
            }
            if self.url.startswith(ANTHROPIC_URLS.encode()):
                headers[b"request-id"] = request_id.encode()
            lines = [b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode())]
            lines += [b"%s: %s" % header for header in headers.items()]
            self.transport.write(b"\r\n".join([*lines, b"", body]))
            logger.info(
                "a connection was refused: %s",
                message,
                extra={"event": "connection_refused", "request_id": request_id, "status": status},
            )
        self.transport.close()

    def _explained(self, message: str, request_id: str) -> bytes:
        kind = "invalid_request_error"
        if not self.url.startswith(ANTHROPIC_URLS.encode()):
            return msgspec.json.encode(error_payload(message, kind))
        before = request_id_now.set(request_id)
        try:
            return msgspec.json.encode(in_anthropics_shape(message, kind))
        finally:
            request_id_now.reset(before)


class Round:
    """All connections in so many ticks, an equal share in each: thousands of them at once would hold
    everybody up."""

    def __init__(self, ticks: int) -> None:
        self._ticks = ticks
        self._left: list[GatewayProtocol] = []
        self._share = 1

    def tick(self, connections: set[Any]) -> list[GatewayProtocol]:
        """Those whose turn it is; some may be closed by now."""
        if not self._left:
            self._left = [one for one in connections if isinstance(one, GatewayProtocol)]
            self._share = max(1, -(-len(self._left) // self._ticks))
        turn = self._left[-self._share :]
        del self._left[-self._share :]
        return turn


class GatewayServer(Server):
    """Looks at each connection once a second. When it is to end and a load balancer asks `/readyz`, it goes
    on for a moment in which that one hears of it; what is answered meanwhile closes its connection."""

    def __init__(self, config: Config, gateway: Gateway, collector: Collector | None = None) -> None:
        """Without a `collector` Python's own ways hold."""
        super().__init__(config)
        self._gateway = gateway
        self._ends_at: float | None = None
        self._sweep = Round(SWEEP_TICKS)
        self._asking = Round(ASKING_TICKS)
        self._collector = collector
        cast(Any, self.server_state).ending = False

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        if counter % SWEEP_TICKS == 0 and self._collector is not None:
            self._collector.look(now, self._gateway.active)
        connections: Any = self.server_state.connections
        for connection in self._sweep.tick(connections):
            connection.end_if_overdue(now)
            if connection.hears_nothing:
                connection.end_if_left(now)
        for connection in self._asking.tick(connections):
            connection.end_if_left(now)
        if not await super().on_tick(counter):
            return False
        if self._ends_at is None:
            asked = now - self._gateway.ready_asked_at < ASKED_SECONDS
            self._ends_at = now + (LINGER_SECONDS if asked else 0.0)
            self._gateway.ending = cast(Any, self.server_state).ending = True
        return self.force_exit or now >= self._ends_at
