"""The HTTP face of an engine that generates text: generation, load, abort.

    POST /v1/chat/completions   POST /v1/completions
    GET /v1/models   GET /load   GET /health   POST /abort

A client that leaves, streaming or not, ends its generation at once; so does `/abort`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any, cast

from starlette.types import Receive, Scope, Send

from inference.engines.base import BadRequest, Delta, Engine, EngineError, GenerationRequest
from inference.engines.chat import ChatRequest, ChunkWriter, completion, parse_chat, to_generation
from inference.engines.completions import (
    CompletionRequest,
    TextChunks,
    Totals,
    parse_completion,
    to_generations,
)
from inference.engines.completions import completion as text_completion
from inference.engines.http import (
    FAILED,
    ClientLeft,
    Refusal,
    Running,
    WorkerApp,
    header,
    read_body,
    send_end,
    send_whole,
)

logger = logging.getLogger(__name__)


_Begun = Callable[[Send], Coroutine[Any, Any, None]]
"""A request that was read and checked; called, it answers."""


class _Cut(Exception):
    """The engine's answer ended without a finish reason. The connection is broken off with it: an
    answer that was cut must not look finished."""


class EngineApp(WorkerApp):
    """Serves one engine. `ready` and `accepting` are switched by the process around it."""

    def __init__(self, engine: Engine, *, slots: int, served_name: str) -> None:
        super().__init__(
            engine,
            slots=slots,
            served_name=served_name,
            answers={
                "/v1/chat/completions": partial(self._serve, self._begin_chat),
                "/v1/completions": partial(self._serve, self._begin_completions),
            },
        )
        self._engine = engine

    async def _serve(
        self, begin: Callable[[Running, bytes], _Begun], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer one request; returns when the answer is sent or nobody waits for it."""
        request_id = header(scope, b"x-request-id") or uuid.uuid4().hex
        running = Running(request_id)
        try:
            await self._run(begin, running, receive, send)
        except ClientLeft:
            return
        except Refusal as refusal:
            if running.begun:
                await send_end(send, b"data: " + refusal.body + b"\n\n")
            else:
                await send_whole(send, refusal.status, refusal.body, request_id)

    async def _run(
        self, begin: Callable[[Running, bytes], _Begun], running: Running, receive: Receive, send: Send
    ) -> None:
        body = await read_body(receive)
        try:
            answer = begin(running, body)
            async with self._active_while(running):
                await self._until_left(running, answer(send), receive)
        except BadRequest as bad:
            raise Refusal(
                400, bad.message, kind="invalid_request_error", param=bad.param, code=bad.code
            ) from None
        except EngineError:
            logger.warning("event=request_failed the engine failed a request", exc_info=True)
            raise Refusal(500, FAILED, kind="server_error", code="engine_error") from None

    def _engine_id(self, running: Running) -> str:
        """Fresh: two requests with one id must not meet inside the engine."""
        return f"{running.request_id}.{next(self._numbers)}"

    # -- chat

    def _begin_chat(self, running: Running, body: bytes) -> _Begun:
        chat = parse_chat(body)
        self._refuse_unless_serving()
        wanted = to_generation(chat, self._engine_id(running), self._engine.capabilities)
        return partial(self._answer, running, chat, wanted)

    async def _answer(
        self, running: Running, chat: ChatRequest, wanted: GenerationRequest, send: Send
    ) -> None:
        async with self._slots:
            deltas = cast(AsyncGenerator[Delta, None], self._engine.generate(wanted))
            async with aclosing(deltas):
                if chat.stream:
                    await self._stream(running, chat, deltas, send)
                    return
                body = await self._collect(running, chat, deltas)
        await send_whole(send, 200, body, running.request_id)

    async def _collect(
        self, running: Running, chat: ChatRequest, deltas: AsyncGenerator[Delta, None]
    ) -> bytes:
        texts: list[str] = []
        async for delta in deltas:
            _count(running, delta)
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
        raise Refusal(500, FAILED, kind="server_error", code="engine_error")

    async def _stream(
        self, running: Running, chat: ChatRequest, deltas: AsyncGenerator[Delta, None], send: Send
    ) -> None:
        # The first token comes before the status line: an engine that fails at once is a plain error.
        first = await anext(deltas, None)
        if first is None:
            raise Refusal(500, FAILED, kind="server_error", code="engine_error")
        _count(running, first)
        chunks = ChunkWriter(
            chat,
            request_id=running.request_id,
            model=chat.model or self._served_name,
            created=int(time.time()),
        )
        await _begin_stream(running, send)
        event = chunks.role(first.prompt_tokens)
        delta: Delta | None = first
        while delta is not None:
            _count(running, delta)
            if delta.text or (chunks.shows_every_token and delta.finish_reason is None):
                event += chunks.text(delta.text, delta.prompt_tokens, delta.completion_tokens)
            if delta.finish_reason is not None:
                event += chunks.finish(
                    delta.finish_reason, delta.prompt_tokens, delta.completion_tokens, delta.cached_tokens
                )
                await send_end(send, event)
                return
            if event:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            event = b""
            delta = await anext(deltas, None)
        raise _Cut

    # -- completions

    def _begin_completions(self, running: Running, body: bytes) -> _Begun:
        asked = parse_completion(body)
        self._refuse_unless_serving()
        wanted = to_generations(asked, self._engine_id(running), self._engine.capabilities)
        return partial(self._answer_texts, running, asked, wanted)

    async def _answer_texts(
        self, running: Running, asked: CompletionRequest, wanted: list[GenerationRequest], send: Send
    ) -> None:
        totals = Totals(len(wanted))
        model, created = asked.model or self._served_name, int(time.time())
        async with aclosing(self._together(running, totals, wanted)) as deltas:
            if asked.stream:
                chunks = TextChunks(asked, request_id=running.request_id, model=model, created=created)
                await self._stream_texts(running, chunks, totals, deltas, send)
                return
            texts: list[list[str]] = [[] for _ in wanted]
            reasons = [""] * len(wanted)
            async for at, delta in deltas:
                texts[at].append(delta.text)
                reasons[at] = delta.finish_reason or ""
        if totals.unfinished:
            raise Refusal(500, FAILED, kind="server_error", code="engine_error")
        body = text_completion(
            request_id=running.request_id,
            model=model,
            created=created,
            texts=["".join(pieces) for pieces in texts],
            reasons=reasons,
            totals=totals,
        )
        await send_whole(send, 200, body, running.request_id)

    async def _stream_texts(
        self,
        running: Running,
        chunks: TextChunks,
        totals: Totals,
        deltas: AsyncGenerator[tuple[int, Delta], None],
        send: Send,
    ) -> None:
        # As in chat, the first token comes before the status line.
        step = await anext(deltas, None)
        if step is None:
            raise Refusal(500, FAILED, kind="server_error", code="engine_error")
        await _begin_stream(running, send)
        while step is not None:
            at, delta = step
            if delta.text or delta.finish_reason is not None or chunks.shows_every_token:
                event = chunks.text(at, delta, totals)
                if not totals.unfinished:
                    await send_end(send, event + chunks.end(totals))
                    return
                await send({"type": "http.response.body", "body": event, "more_body": True})
            step = await anext(deltas, None)
        raise _Cut

    async def _together(
        self, running: Running, totals: Totals, wanted: list[GenerationRequest]
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """The prompts' deltas as they come, counted, each prompt with a slot of its own. What one of them
        raises ends all."""
        # No longer than this: a client that reads slowly holds the engine's answers up, not our memory.
        queue: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue(len(wanted))

        async def follow(at: int, one: GenerationRequest) -> None:
            try:
                async with self._slots:
                    deltas = cast(AsyncGenerator[Delta, None], self._engine.generate(one))
                    async with aclosing(deltas):
                        async for delta in deltas:
                            await queue.put((at, delta))
                            if delta.finish_reason is not None:
                                break
            except Exception as error:
                await queue.put((at, error))
            else:
                await queue.put((at, None))

        following = [asyncio.create_task(follow(at, one)) for at, one in enumerate(wanted)]
        open_ = len(wanted)
        try:
            while open_:
                at, got = await queue.get()
                if isinstance(got, BaseException):
                    raise got
                if got is None:
                    open_ -= 1
                    continue
                totals.take(at, got)
                running.prompt_tokens = totals.prompt_tokens
                running.completion_tokens = totals.completion_tokens
                yield at, got
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)


async def _begin_stream(running: Running, send: Send) -> None:
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


def _count(running: Running, delta: Delta) -> None:
    running.prompt_tokens = delta.prompt_tokens
    running.completion_tokens = delta.completion_tokens
