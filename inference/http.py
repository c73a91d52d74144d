"""The base of our HTTP consumers: generation, and what the fleet sends.

Channels' own `AsyncHttpConsumer` buffers any body whole, hears nothing of a client that leaves while
`handle()` runs, and closes database connections on each message. This one has its own `__call__`:

- nothing of the body is read before it is asked for, and never more than the limit given then;
- after `self.read_body(limit)` it listens: when the client leaves, `handle()` is cancelled (its `finally`
  runs); `request.body(limit)` is the same without listening, for answers that take no time;
- no channel layer, no database connection is touched;
- whatever `handle()` raises becomes one JSON answer through `error_response`.

Collaborators come through `as_asgi(fleet=…)`, as keyword arguments of the subclass's `__init__`.
It behaves alike under uvicorn and Daphne.

    HttpError
    ├── ClientGone          nobody waits for an answer any more
    ├── BodyTooLarge        the body is longer than this endpoint takes
    └── MethodNotAllowed    the URL exists, but not with this method
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar

import msgspec
from channels.consumer import AsyncConsumer

from inference.errors import Poisonous

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON = (b"content-type", b"application/json")

SMALL_BODY_BYTES = 64 * 1024
"""A refused request's unread body up to this is swallowed by the server; a longer one ends the connection."""

logger = logging.getLogger("roundhouse.http")


class HttpError(Exception):
    """Base of what goes wrong between a client and a consumer."""


class ClientGone(HttpError):
    """Nobody waits for an answer any more."""


class BodyTooLarge(HttpError):
    """The body is longer than this endpoint takes; the rest of it was not read."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request body is larger than the {limit} bytes that are accepted here.")
        self.limit = limit


class MethodNotAllowed(HttpError):
    """The URL exists, but not with this method."""

    def __init__(self, method: str, allowed: Iterable[str]) -> None:
        super().__init__(f"Method {method} is not allowed here.")
        self.allow = ", ".join(sorted(allowed))


request_id_now: ContextVar[str] = ContextVar("request_id", default="")
"""The request that this task answers, for whoever logs in its course."""


def new_request_id() -> str:
    """Unique, not secret: a generator seeded at the start spares each request a system call."""
    return f"req_{_random.getrandbits(128):032x}"


_random = random.Random(secrets.randbits(256))  # noqa: S311


def bearer_of(authorization: bytes) -> str | None:
    """The token of `Bearer …` (the scheme in any case); None without one. Nothing but blanks and tabs may
    surround it: what another reader takes for white space is part of the token."""
    scheme, _, token = authorization.partition(b" ")
    if scheme.lower() != b"bearer":
        return None
    return token.strip(b" \t").decode("latin-1") or None


def credential_of(header: Callable[[bytes], bytes]) -> str | None:
    """The API key: a bearer token, or what some clients send instead, `x-api-key` or `api-key`. `header`
    gives the value of one, empty without it."""
    bearer = bearer_of(header(b"authorization"))
    if bearer is not None:
        return bearer
    given = header(b"x-api-key") or header(b"api-key")
    return given.strip(b" \t").decode("latin-1") or None


class Request:
    """One request as its consumer sees it."""

    __slots__ = (
        "_body_complete",
        "_receive",
        "client_address",
        "headers",
        "method",
        "path",
        "query_string",
        "request_id",
        "scope",
    )

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query_string: bytes = scope.get("query_string", b"")
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        """By lower-case name; of a header sent twice, the last."""
        client = scope.get("client")
        self.client_address: str = client[0] if client else ""
        self.request_id: str = scope.get("request_id") or new_request_id()
        self._receive = receive
        self._body_complete = False

    @property
    def bearer(self) -> str | None:
        """The token of `Authorization: Bearer …` (the scheme in any case); None without one."""
        return bearer_of(self._whole(b"authorization"))

    @property
    def credential(self) -> str | None:
        """The API key: a bearer token, or what some clients send instead, `x-api-key` or `api-key`."""
        return credential_of(self._whole)

    def _whole(self, name: bytes) -> bytes:
        """The header's value; of one sent twice, both: no two readers may take two people for its sender."""
        sent = self.scope["headers"]
        if len(sent) == len(self.headers):
            return self.headers.get(name, b"")
        return b",".join([value for header, value in sent if header == name])

    @property
    def forwarded_for(self) -> str:
        """What proxies, or anybody, say of the client's address: X-Forwarded-For, several in their order."""
        sent = [value for name, value in self.scope["headers"] if name == b"x-forwarded-for"]
        return b",".join(sent).decode("latin-1")

    @property
    def unread_bytes(self) -> int | None:
        """How much of the body is still to come: 0 when it was read or there is none, None: nobody knows."""
        if self._body_complete:
            return 0
        length = self.headers.get(b"content-length")
        if length is not None and length.isdigit():
            return int(length)
        return None if b"transfer-encoding" in self.headers else 0

    async def body(self, limit: int) -> bytes:
        """The whole body. Raises BodyTooLarge as soon as more than `limit` bytes are announced or have
        come, and ClientGone. May be called once."""
        length = self.headers.get(b"content-length")
        if length is not None and (not length.isdigit() or len(length) > 15 or int(length) > limit):
            raise BodyTooLarge(limit)
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            whole: bytes = message.get("body", b"")
            if len(whole) > limit:
                raise BodyTooLarge(limit)
            self._body_complete = True
            return whole
        body = bytearray()
        while True:
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > limit:
                raise BodyTooLarge(limit)
            if not message.get("more_body"):
                self._body_complete = True
                return bytes(body)
            message = await self._receive()

    async def until_client_leaves(self) -> None:
        """Returns when the client is gone. Only after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


class HttpConsumer(AsyncConsumer):  # type: ignore[misc]
    """Subclasses write `handle`, which ends with an answer sent or an exception raised."""

    methods: ClassVar[frozenset[str] | None] = frozenset({"POST"})
    """Those that it answers; None: all."""

    def __init__(self) -> None:
        self.client_gone = False
        self.started = False
        """The status line is out: only a stream's own means can tell of an error now."""
        self._complete = False
        """The last of the answer is out: whoever leaves now has it. (Servers say so at once.)"""
        self.answer_headers: list[Header] = []
        """What every answer to this request says besides, errors too."""
        self.request: Request
        self._send: Send
        self._watcher: asyncio.Task[None] | None = None
        self._handling: asyncio.Task[Any] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = self.request = Request(scope, receive)
        self._send = send
        try:
            try:
                if self.methods is not None and request.method not in self.methods:
                    raise MethodNotAllowed(request.method, self.methods)
                await self.handle(request)
            finally:
                # From here on nobody may cancel this task in the client's name.
                self._handling = None
                if self._watcher is not None:
                    self._watcher.cancel()
        except ClientGone:
            self.client_gone = True
        except asyncio.CancelledError:
            task = asyncio.current_task()
            # Cancelled by our watcher alone: the request is over. By the server as well: it wants an end.
            if not self.client_gone or task is None or task.uncancel() > 0:
                raise
        except Exception as error:
            await self._answer_error(error)

    async def handle(self, request: Request) -> None:
        """Answer the request. Cancelled when the client leaves, once the body has been read."""
        raise MethodNotAllowed(request.method, ())

    async def read_body(self, limit: int) -> bytes:
        """The request's body; from its end on, a client that leaves cancels `handle`."""
        body = await self.request.body(limit)
        self._handling = asyncio.current_task()
        self._watcher = asyncio.create_task(self._watch())
        return body

    async def _watch(self) -> None:
        await self.request.until_client_leaves()
        if self._handling is None or self._complete:
            return
        self.client_gone = True
        await self.on_client_gone()
        if self._handling is not None:
            self._handling.cancel("the client left")

    async def on_client_gone(self) -> None:
        """What is to happen before `handle` is cancelled because the client left. It must not raise."""

    # -- answers

    async def send_json(self, status: int, payload: object, headers: Iterable[Header] = ()) -> None:
        """Send a whole answer. `payload` is JSON as bytes, or anything that msgspec encodes."""
        body = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
        await self._start(status, [JSON, (b"content-length", b"%d" % len(body)), *headers])
        await self._send({"type": "http.response.body", "body": body})
        self._complete = True

    async def stream_start(self, prompt_tokens: int = 0) -> None:
        """Begin a stream of server-sent events. What the prompt costs is no news for HTTP itself."""
        await self._start(
            200,
            [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache, no-store"),
                # A reverse proxy that buffers would hold the first tokens back.
                (b"x-accel-buffering", b"no"),
            ],
        )

    async def stream_events(self, events: Sequence[bytes]) -> None:
        """Send server-sent events, or comments, in one piece."""
        chunk = events[0] if len(events) == 1 else b"".join(events)
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def stream_end(self, chunk: bytes = b"") -> None:
        """End the body at once, after `chunk`."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": False})
        self._complete = True

    async def _start(self, status: int, headers: list[Header]) -> None:
        if not self.request._body_complete:
            unread = self.request.unread_bytes
            if unread is None or unread > SMALL_BODY_BYTES:
                headers.append((b"connection", b"close"))
        headers += self.answer_headers
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    # -- errors

    def error_response(self, error: Exception) -> tuple[int, object, list[Header]]:
        """Status, payload and headers for what `handle` raised. Subclasses map their own errors first.

        A 500 is logged by the caller and never tells what happened.
        """
        if isinstance(error, BodyTooLarge):
            return 413, error_payload(str(error), "invalid_request_error", code="request_too_large"), []
        if isinstance(error, MethodNotAllowed):
            payload = error_payload(str(error), "invalid_request_error", code="method_not_supported")
            return 405, payload, [(b"allow", error.allow.encode())]
        return 500, error_payload(INTERNAL_ERROR, "server_error"), []

    async def _answer_error(self, error: Exception) -> None:
        status, payload, headers = self.error_response(error)
        if status == 500 and not isinstance(error, Poisonous):
            logger.error(
                "a request failed by a fault of ours",
                exc_info=error,
                extra={"event": "request_crashed", "request_id": self.request.request_id},
            )
        if self.started:
            # Too late for a status: the body ends here, without a stream's closing mark.
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await self.send_json(status, payload, headers)


INTERNAL_ERROR = "The server had an error while processing your request. Please try again."


def error_payload(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """An error in OpenAI's shape: all four keys, always."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
