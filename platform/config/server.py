"""uvicorn, with the bounds that it lacks: time and size of a header, time of a body."""

from __future__ import annotations

import asyncio
import logging
import time
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import Server

from config.front import ANTHROPIC_URLS, API_HEADERS
from inference.http import error_payload, new_request_id, request_id_now
from openai_api import limits
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
"""Of a tenth of a second: connections are looked at once a second, so the limits are exact to a second."""


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

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = time.monotonic()

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
        elif now - self._since > limits.HEADER_SECONDS:
            self.refuse(408, "The request's header did not come in time.")

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


class GatewayServer(Server):
    """Looks at all connections once a second."""

    async def on_tick(self, counter: int) -> bool:
        if counter % SWEEP_TICKS == 0:
            now = time.monotonic()
            connections: Any = list(self.server_state.connections)
            for connection in connections:
                if isinstance(connection, GatewayProtocol):
                    connection.end_if_overdue(now)
        return await super().on_tick(counter)
