"""The HTTP face of an engine that runs in our own process: generation, load, abort.

    POST /v1/chat/completions   GET /v1/models   GET /load   GET /health   POST /abort

A client that leaves, streaming or not, ends its generation at once; so does `/abort`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from inference.engines.base import BadRequest, Delta, Engine, EngineError, GenerationRequest
from inference.engines.chat import (
    MAX_BODY_BYTES,
    ChatRequest,
    ChunkWriter,
    completion,
    error_body,
    parse_chat,
    to_generation,
)
from inference.protocol import AbortReply, AbortRequest, Load

logger = logging.getLogger(__name__)

_JSON = "application/json"
_BUSY = "This worker takes no new requests."
_FAILED = "The engine failed to answer this request."


class _Refusal(Exception):
    """An answer other than 200, decided before the status line."""

    def __init__(
        self, status: int, message: str, *, kind: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, kind=kind, param=param, code=code)


class _ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class _Cut(Exception):
    """The engine's answer ended without a finish reason. The connection is broken off with it: an
    answer that was cut must not look finished."""


@dataclass(slots=True, eq=False)
class _Running:
    """One request, from its acceptance until its engine work has ended."""

    request_id: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    aborted: bool = False
    begun: bool = False
    """The status line was sent."""
    task: asyncio.Task[None] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def count(self, delta: Delta) -> None:
        self.prompt_tokens = delta.prompt_tokens
        self.completion_tokens = delta.completion_tokens


class EngineApp:
    """Serves one engine. `ready` and `accepting` are switched by the process around it."""

    def __init__(self, engine: Engine, *, slots: int, served_name: str) -> None:
        self.ready = False
        self.accepting = True
        self._engine = engine
        self._served_name = served_name
        self._slots = asyncio.Semaphore(slots)
        self._active: dict[str, list[_Running]] = {}
        self._numbers = itertools.count(1)
        self._started = int(time.time())
        self.asgi = Starlette(
            routes=[
                # A class-based endpoint would be called per request; this one is the ASGI application.
                Route("/v1/chat/completions", _Endpoint(self), methods=["POST"]),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/load", self._load, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/abort", self._abort, methods=["POST"]),
            ],
            exception_handlers={HTTPException: _http_error, 500: _server_error},
        )

    def load_report(self) -> Load:
        """The engine's own report; what waits here for a slot counts as waiting."""
        load = self._engine.load_report()
        active = sum(len(same) for same in self._active.values())
        return msgspec.structs.replace(load, waiting=max(load.waiting, active - load.running))

    # -- the small endpoints

    async def _models(self, request: Request) -> Response:
        entry = {
            "id": self._served_name,
            "object": "model",
            "created": self._started,
            "owned_by": "roundhouse",
            "max_model_len": self._engine.context_length if self.ready else None,
        }
        return _json({"object": "list", "data": [entry]})

    async def _load(self, request: Request) -> Response:
        return _json(msgspec.structs.asdict(self.load_report()))

    async def _health(self, request: Request) -> Response:
        return Response(status_code=200 if self.ready and self._engine.healthy() else 503)

    async def _abort(self, request: Request) -> Response:
        try:
            wanted = msgspec.json.decode(await request.body(), type=AbortRequest)
        except (msgspec.DecodeError, UnicodeDecodeError):
            body = error_body("The body must be {'request_id': text}.", kind="invalid_request_error")
            return Response(body, status_code=400, media_type=_JSON)
        ended = list(self._active.get(wanted.request_id, ()))
        for running in ended:
            running.aborted = True
            if running.task is not None:
                running.task.cancel()
        for running in ended:
            await running.ended.wait()
        reply = AbortReply(
            prompt_tokens=sum(running.prompt_tokens for running in ended),
            completion_tokens=sum(running.completion_tokens for running in ended),
        )
        return _json(msgspec.structs.asdict(reply))

    # -- generation

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one chat request; returns when the answer is sent or nobody waits for it."""
        request_id = _header(scope, b"x-request-id") or uuid.uuid4().hex
        running = _Running(request_id)
        try:
            await self._chat(running, scope, receive, send)
        except _ClientLeft:
            return
        except _Refusal as refusal:
            if running.begun:
                await _send_end(send, b"data: " + refusal.body + b"\n\n")
            else:
                await _send_whole(send, refusal.status, refusal.body, request_id)

    async def _chat(self, running: _Running, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_body(receive)
        try:
            chat = parse_chat(body)
            if not self.ready or not self.accepting:
                raise _Refusal(503, _BUSY, kind="service_unavailable_error", code="server_is_overloaded")
            # The engine's own id is fresh: two requests with one id must not meet inside it.
            engine_id = f"{running.request_id}.{next(self._numbers)}"
            wanted = to_generation(chat, engine_id, self._engine.capabilities)
            async with self._active_while(running):
                await self._until_left(running, self._answer(running, chat, wanted, send), receive)
        except BadRequest as bad:
            raise _Refusal(
                400, bad.message, kind="invalid_request_error", param=bad.param, code=bad.code
            ) from None
        except EngineError:
            logger.warning("event=request_failed the engine failed a request", exc_info=True)
            raise _Refusal(500, _FAILED, kind="server_error", code="engine_error") from None

    @asynccontextmanager
    async def _active_while(self, running: _Running) -> AsyncIterator[None]:
        self._active.setdefault(running.request_id, []).append(running)
        try:
            yield
        finally:
            same = self._active[running.request_id]
            same.remove(running)
            if not same:
                del self._active[running.request_id]
            running.ended.set()

    async def _until_left(
        self, running: _Running, answer: Coroutine[Any, Any, None], receive: Receive
    ) -> None:
        """Run `answer` until it is done or the client has gone; then nothing of it is left running."""
        running.task = asyncio.create_task(answer)
        leaving = asyncio.create_task(_client_left(receive))
        try:
            await asyncio.wait({running.task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            left = not running.task.done()
        finally:
            leaving.cancel()
            running.task.cancel()
            await asyncio.gather(running.task, leaving, return_exceptions=True)
        if running.aborted and running.task.cancelled():
            raise _Refusal(499, "The request was aborted.", kind="invalid_request_error", code="aborted")
        if left:
            raise _ClientLeft
        running.task.result()

    async def _answer(
        self, running: _Running, chat: ChatRequest, wanted: GenerationRequest, send: Send
    ) -> None:
        async with self._slots:
            deltas = cast(AsyncGenerator[Delta, None], self._engine.generate(wanted))
            async with aclosing(deltas):
                if chat.stream:
                    await self._stream(running, chat, deltas, send)
                    return
                body = await self._collect(running, chat, deltas)
        await _send_whole(send, 200, body, running.request_id)

    async def _collect(
        self, running: _Running, chat: ChatRequest, deltas: AsyncGenerator[Delta, None]
    ) -> bytes:
        texts: list[str] = []
        async for delta in deltas:
            running.count(delta)
            texts.append(delta.text)
            if delta.finish_reason is not None:
                return completion(
                    request_id=running.request_id,
                    model=chat.model or self._served_name,
                    created=int(time.time()),
                    text="".join(texts),
                    finish_reason=delta.finish_reason,
                    prompt_tokens=delta.prompt_tokens,
                    completion_tokens=delta.completion_tokens,
                    cached_tokens=delta.cached_tokens,
                )
        raise _Refusal(500, _FAILED, kind="server_error", code="engine_error")

    async def _stream(
        self, running: _Running, chat: ChatRequest, deltas: AsyncGenerator[Delta, None], send: Send
    ) -> None:
        # The first token comes before the status line: an engine that fails at once is a plain error.
        first = await anext(deltas, None)
        if first is None:
            raise _Refusal(500, _FAILED, kind="server_error", code="engine_error")
        running.count(first)
        chunks = ChunkWriter(
            chat,
            request_id=running.request_id,
            model=chat.model or self._served_name,
            created=int(time.time()),
        )
        running.begun = True
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-cache"),
                    (b"x-accel-buffering", b"no"),
                    (b"x-request-id", running.request_id.encode("latin-1", "replace")),
                ],
            }
        )
        event = chunks.role(first.prompt_tokens)
        delta: Delta | None = first
        while delta is not None:
            running.count(delta)
            if delta.text or (chunks.shows_every_token and delta.finish_reason is None):
                event += chunks.text(delta.text, delta.prompt_tokens, delta.completion_tokens)
            if delta.finish_reason is not None:
                event += chunks.finish(
                    delta.finish_reason, delta.prompt_tokens, delta.completion_tokens, delta.cached_tokens
                )
                await _send_end(send, event)
                return
            if event:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            event = b""
            delta = await anext(deltas, None)
        raise _Cut


class _Endpoint:
    """`EngineApp.chat` as an ASGI application: Starlette hands plain functions a Request instead."""

    def __init__(self, app: EngineApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app.chat(scope, receive, send)


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientLeft
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise _Refusal(
                413, "The body is too large.", kind="invalid_request_error", code="request_too_large"
            )
        if not message.get("more_body", False):
            return bytes(body)


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1")[:128] for key, value in scope["headers"] if key == name), "")


async def _send_whole(send: Send, status: int, body: bytes, request_id: str) -> None:
    headers = [
        (b"content-type", _JSON.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", request_id.encode("latin-1", "replace")),
    ]
    if status == 503:
        headers.append((b"retry-after", b"1"))
    if status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is never read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_end(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type=_JSON)


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        message, code = f"Method {request.method} is not allowed here.", "method_not_supported"
    else:
        message, code = f"Invalid URL ({request.method} {request.url.path})", None
    headers = error.headers if isinstance(error, HTTPException) else None
    body = error_body(message, kind="invalid_request_error", code=code)
    return Response(body, status_code=status, media_type=_JSON, headers=headers)


async def _server_error(request: Request, error: Exception) -> Response:
    return Response(error_body(_FAILED, kind="server_error"), status_code=500, media_type=_JSON)
