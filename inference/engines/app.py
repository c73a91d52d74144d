"""The HTTP face of an engine that generates text: generation, load, abort.

    POST /v1/chat/completions   POST /v1/completions   POST /tokenize   POST /detokenize
    GET /v1/models   GET /load   GET /health   POST /abort

A client that leaves, streaming or not, ends its generation at once; so does `/abort`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import TypedDict, TypeVar, cast

from starlette.types import Send

from inference.engines.base import Delta, Engine, GenerationRequest
from inference.engines.chat import SampledRequest, parse_chat, to_generations
from inference.engines.chat_answers import ChatChunks, WholeChat
from inference.engines.completions import TextChunks, WholeTexts, parse_completion
from inference.engines.completions import to_generations as texts_to_generations
from inference.engines.http import (
    FAILED,
    Begun,
    Refusal,
    Running,
    WorkerApp,
    begin_stream,
    send_end,
    send_whole,
)
from inference.engines.tokenize import detokenize, tokenize
from inference.engines.usage import Totals

Step = TypeVar("Step")
_Chunks = ChatChunks | TextChunks
_Whole = WholeChat | WholeTexts


class _Told(TypedDict):
    """What every answer says of itself."""

    request_id: str
    model: str
    created: int


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
                "/v1/chat/completions": self._begin_chat,
                "/v1/completions": self._begin_completions,
                "/tokenize": partial(self._begin_tokens, tokenize),
                "/detokenize": partial(self._begin_tokens, detokenize),
            },
        )
        self._engine = engine

    def _engine_id(self, running: Running) -> str:
        """Fresh: two requests with one id must not meet inside the engine."""
        return f"{running.request_id}.{next(self._numbers)}"

    # -- tokens

    def _begin_tokens(
        self, answer: Callable[[Engine, bytes], Awaitable[bytes]], running: Running, body: bytes
    ) -> Begun:
        self._refuse_unless_serving()

        async def begun(send: Send) -> None:
            await send_whole(send, 200, await answer(self._engine, body), running.request_id)

        return begun

    # -- chat and completions

    def _begin_chat(self, running: Running, body: bytes) -> Begun:
        chat = parse_chat(body)
        self._refuse_unless_serving()
        wanted = to_generations(chat, self._engine_id(running), self._engine.capabilities)
        totals = Totals(samples=len(wanted))
        told = self._told(running, chat)
        writer: _Chunks | _Whole
        if chat.stream:
            writer = ChatChunks(chat, wanted[0], totals, form=self._engine.tool_form, **told)
        else:
            writer = WholeChat(wanted[0], totals, form=self._engine.tool_form, **told)
        return partial(self._answer, running, wanted, totals, writer)

    def _begin_completions(self, running: Running, body: bytes) -> Begun:
        asked = parse_completion(body)
        self._refuse_unless_serving()
        wanted = texts_to_generations(asked, self._engine_id(running), self._engine.capabilities)
        totals = Totals(len(wanted) // asked.samples, asked.samples)
        told = self._told(running, asked)
        writer: _Chunks | _Whole
        writer = TextChunks(asked, totals, **told) if asked.stream else WholeTexts(asked, totals, **told)
        return partial(self._answer, running, wanted, totals, writer)

    def _told(self, running: Running, asked: SampledRequest) -> _Told:
        return {
            "request_id": running.request_id,
            "model": asked.model or self._served_name,
            "created": int(time.time()),
        }

    async def _answer(
        self,
        running: Running,
        wanted: list[GenerationRequest],
        totals: Totals,
        writer: _Chunks | _Whole,
        send: Send,
    ) -> None:
        running.spent = totals
        if len(wanted) == 1:  # nearly always, so nothing is put between the engine and its answer
            async with self._slots:
                deltas = cast(AsyncGenerator[Delta, None], self._engine.generate(wanted[0]))
                await self._write(running, deltas, partial(writer.step, 0), totals, send)
        else:
            steps = self._together(wanted)
            await self._write(running, steps, lambda step: writer.step(*step), totals, send)
        if not isinstance(writer, _Chunks):
            await send_whole(send, 200, writer.body(), running.request_id)

    async def _write(
        self,
        running: Running,
        steps: AsyncGenerator[Step, None],
        write: Callable[[Step], bytes | None],
        totals: Totals,
        send: Send,
    ) -> None:
        """Let `write` have every step, and send what it makes of them, if anything, as it comes."""
        async with aclosing(steps):
            # The first token comes before the status line: an engine that fails at once is a plain error.
            step = await anext(steps, None)
            while step is not None:
                event = write(step)
                if event is not None and not running.begun:
                    await begin_stream(running, send)
                if not totals.unfinished:
                    if event is not None:
                        await send_end(send, event)
                    return
                if event:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                step = await anext(steps, None)
        if running.begun:
            raise _Cut
        raise Refusal(500, FAILED, kind="server_error", code="engine_error")

    async def _together(self, wanted: list[GenerationRequest]) -> AsyncGenerator[tuple[int, Delta], None]:
        """The choices' deltas as they come, each choice with a slot of its own. What one of them raises
        ends all."""
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
                yield at, got
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)
