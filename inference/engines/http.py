"""What every engine's HTTP face has, whatever it answers: one request from its acceptance to its end.

    GET /v1/models   GET /load   GET /health   POST /abort

A client that leaves ends its work at once; so does `/abort`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from inference.engines.base import BadRequest, EngineError, Model
from inference.engines.chat import MAX_BODY_BYTES, error_body
from inference.protocol import AbortReply, AbortRequest, Load

logger = logging.getLogger(__name__)

JSON = "application/json"
BUSY = "This worker takes no new requests."
FAILED = "The engine failed to answer this request."


class Refusal(Exception):
    """An answer other than 200, decided before the status line."""

    def __init__(
        self, status: int, message: str, *, kind: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, kind=kind, param=param, code=code)


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


@contextmanager
def as_refusals() -> Iterator[None]:
    """What an engine raises becomes what its client is told. Raises Refusal."""
    try:
        yield
    except BadRequest as bad:
        raise Refusal(
            400, bad.message, kind="invalid_request_error", param=bad.param, code=bad.code
        ) from None
    except EngineError:
        logger.warning("event=request_failed the engine failed a request", exc_info=True)
        raise Refusal(500, FAILED, kind="server_error", code="engine_error") from None


class Spent(Protocol):
    """What a request has cost so far."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True, eq=False)
class Nothing:
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True, eq=False)
class Running:
    """One request, from its acceptance until its engine work has ended."""

    request_id: str
    spent: Spent = field(default_factory=Nothing)
    aborted: bool = False
    begun: bool = False
    """The status line was sent."""
    task: asyncio.Task[None] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)


Begun = Callable[[Send], Coroutine[Any, Any, None]]
"""A request that was read; called, it answers."""
Begin = Callable[[Running, bytes], Begun]
"""Takes a request and its body. Raises Refusal or BadRequest."""


class WorkerApp:
    """Serves one engine. `ready` and `accepting` are switched by the process around it.

    `asgi` is the application: the endpoints above, and a POST route for each of `answers`.
    """

    def __init__(self, engine: Model, *, slots: int, served_name: str, answers: Mapping[str, Begin]) -> None:
        self.ready = False
        self.accepting = True
        self._model = engine
        self._served_name = served_name
        self._slots = asyncio.Semaphore(slots)
        self._active: dict[str, list[Running]] = {}
        self._numbers = itertools.count(1)
        self._started = int(time.time())
        self.asgi = Starlette(
            routes=[
                # A class-based endpoint would be called per request; this one is the ASGI application.
                *(
                    Route(path, _Endpoint(partial(self._serve, begin)), methods=["POST"])
                    for path, begin in answers.items()
                ),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/load", self._load, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/abort", self._abort, methods=["POST"]),
            ],
            exception_handlers={HTTPException: _http_error, 500: _server_error},
        )

    def load_report(self) -> Load:
        """The engine's own report; what waits here for a slot counts as waiting."""
        load = self._model.load_report()
        active = sum(len(same) for same in self._active.values())
        return msgspec.structs.replace(load, waiting=max(load.waiting, active - load.running))

    # -- the small endpoints

    async def _models(self, request: Request) -> Response:
        entry = {
            "id": self._served_name,
            "object": "model",
            "created": self._started,
            "owned_by": "roundhouse",
            "max_model_len": self._model.context_length if self.ready else None,
        }
        return _json({"object": "list", "data": [entry]})

    async def _load(self, request: Request) -> Response:
        return _json(msgspec.structs.asdict(self.load_report()))

    async def _health(self, request: Request) -> Response:
        try:
            well = self.ready and self._model.healthy()
        except EngineError:  # the process is about to end, and says why itself
            well = False
        return Response(status_code=200 if well else 503)

    async def _abort(self, request: Request) -> Response:
        try:
            wanted = msgspec.json.decode(await request.body(), type=AbortRequest)
        except (msgspec.DecodeError, UnicodeDecodeError):
            body = error_body("The body must be {'request_id': text}.", kind="invalid_request_error")
            return Response(body, status_code=400, media_type=JSON)
        ended = list(self._active.get(wanted.request_id, ()))
        for running in ended:
            running.aborted = True
            if running.task is not None:
                running.task.cancel()
        for running in ended:
            await running.ended.wait()
        reply = AbortReply(
            prompt_tokens=sum(running.spent.prompt_tokens for running in ended),
            completion_tokens=sum(running.spent.completion_tokens for running in ended),
        )
        return _json(msgspec.structs.asdict(reply))

    # -- a request's life

    async def _serve(self, begin: Begin, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; returns when the answer is sent or nobody waits for it."""
        running = Running(header(scope, b"x-request-id") or uuid.uuid4().hex)
        try:
            body = await read_body(receive)
            with as_refusals():
                answer = begin(running, body)
                del body
                async with self._active_while(running):
                    await self._until_left(running, answer(send), receive)
        except ClientLeft:
            return
        except Refusal as refusal:
            if running.begun:
                await send_end(send, b"data: " + refusal.body + b"\n\n")
            else:
                await send_whole(send, refusal.status, refusal.body, running.request_id)

    def _refuse_unless_serving(self) -> None:
        if not self.ready or not self.accepting:
            raise Refusal(503, BUSY, kind="service_unavailable_error", code="server_is_overloaded")

    @asynccontextmanager
    async def _active_while(self, running: Running) -> AsyncIterator[None]:
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
        self, running: Running, answer: Coroutine[Any, Any, None], receive: Receive
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
            raise Refusal(499, "The request was aborted.", kind="invalid_request_error", code="aborted")
        if left:
            raise ClientLeft
        running.task.result()


class _Endpoint:
    """A method as an ASGI application: Starlette hands plain functions a Request instead."""

    def __init__(self, answer: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(receive: Receive) -> bytes:
    """The whole body. Raises Refusal when it is too large, ClientLeft when it never ends."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise Refusal(
                413, "The body is too large.", kind="invalid_request_error", code="request_too_large"
            )
        if not message.get("more_body", False):
            return bytes(body)


def header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1")[:128] for key, value in scope["headers"] if key == name), "")


async def send_whole(send: Send, status: int, body: bytes, request_id: str) -> None:
    headers = [
        (b"content-type", JSON.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", request_id.encode("latin-1", "replace")),
    ]
    if status == 503:
        headers.append((b"retry-after", b"1"))
    if status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is never read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def begin_stream(running: Running, send: Send) -> None:
    """The status line and headers of a stream of events."""
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


async def send_end(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type=JSON)


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        message, code = f"Method {request.method} is not allowed here.", "method_not_supported"
    else:
        message, code = f"Invalid URL ({request.method} {request.url.path})", None
    headers = error.headers if isinstance(error, HTTPException) else None
    body = error_body(message, kind="invalid_request_error", code=code)
    return Response(body, status_code=status, media_type=JSON, headers=headers)


async def _server_error(request: Request, error: Exception) -> Response:
    return Response(error_body(FAILED, kind="server_error"), status_code=500, media_type=JSON)
