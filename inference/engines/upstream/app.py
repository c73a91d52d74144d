"""The HTTP face of an upstream worker: each request goes to the server behind it.

    POST /v1/chat/completions   /v1/completions   /v1/embeddings   /v1/rerank   /v1/score
    POST /tokenize   /detokenize

and what every engine has (inference.engines.http). A client that leaves, and `/abort`, close the connection
to the server, which is how servers are told to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial

import aiohttp
from starlette.types import Send

from inference.engines.http import Begun, Running, WorkerApp, begin_stream, send_end, send_whole
from inference.engines.upstream.answers import Count, NoAnswer, Stream, whole
from inference.engines.upstream.engine import UpstreamEngine
from inference.engines.upstream.remote import (
    AWAY,
    BadKey,
    Doubtful,
    ending_with_its_connection,
    read_bounded,
    unavailable,
)
from inference.engines.upstream.requests import PATHS, Prepared, prepare
from inference.sse import DONE, BadStream, EventSplitter

MAX_ANSWER_BYTES = 64 * 1024 * 1024
DRAIN_SECONDS = 0.1
"""How long the end of a finished stream is waited for, so that its connection can be used again."""


class UpstreamApp(WorkerApp):
    """Serves one `UpstreamEngine`."""

    def __init__(self, engine: UpstreamEngine, *, slots: int, served_name: str) -> None:
        super().__init__(
            engine,
            slots=slots,
            served_name=served_name,
            answers={path: partial(self._begin, path) for path in PATHS},
        )
        self._engine = engine

    def _begin(self, path: str, running: Running, body: bytes) -> Begun:
        self._refuse_unless_serving()
        prepared = prepare(
            path,
            body,
            model=self._engine.model,
            capabilities=self._engine.capabilities,
            preset=self._engine.remote.preset,
        )
        return partial(self._answer, path, running, prepared)

    async def _answer(self, path: str, running: Running, prepared: Prepared, send: Send) -> None:
        running.spent = count = Count(prepared)
        async with self._slots:
            self._engine.running += 1
            try:
                await self._forward(path, running, prepared, count, send)
            finally:
                self._engine.running -= 1
                self._engine.tokens += count.completion_tokens

    async def _forward(
        self, path: str, running: Running, prepared: Prepared, count: Count, send: Send
    ) -> None:
        model, created = prepared.model or self._served_name, int(time.time())
        response = None
        try:
            response = await self._engine.remote.post(path, prepared.body)
            if prepared.streamed:
                stream = Stream(
                    path, prepared, count, request_id=running.request_id, model=model, created=created
                )
                await self._relay(response, stream, running, send)
                return
            with ending_with_its_connection(response):
                answer = await read_bounded(response, MAX_ANSWER_BYTES)
            if answer is None:
                raise NoAnswer("an answer that is too long")
            told = whole(path, answer, count, request_id=running.request_id, model=model, created=created)
        except BadKey as error:
            self._engine.doubt(error)
            raise unavailable(AWAY) from None
        except (aiohttp.ClientError, OSError, BadStream, NoAnswer):
            self._engine.doubt()
            raise unavailable(AWAY) from None
        except Doubtful:
            self._engine.doubt()
            raise
        finally:
            if response is not None:
                # At the end of an answer the connection is in the pool already; else this ends the request.
                response.close()
        await send_whole(send, 200, told, running.request_id)

    async def _relay(
        self, response: aiohttp.ClientResponse, stream: Stream, running: Running, send: Send
    ) -> None:
        """Pass the events on as they come. The status line waits for the first of them."""
        if response.content_type != "text/event-stream":
            raise NoAnswer("no stream")
        events = EventSplitter()
        done = False
        with ending_with_its_connection(response):
            while not done and (chunk := await response.content.readany()):
                for event in events.feed(chunk):
                    if done := event == DONE:
                        break
                    if told := stream.event(event):
                        await self._send_event(told, running, send)
        last = stream.end(done=done)
        await self._send_event(b"", running, send)
        await send_end(send, last)
        await _drain(response)

    async def _send_event(self, event: bytes, running: Running, send: Send) -> None:
        if not running.begun:
            await begin_stream(running, send)
        if event:
            await send({"type": "http.response.body", "body": event, "more_body": True})


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Wait a moment for the end of a finished stream, so that its connection can be used again."""
    with contextlib.suppress(aiohttp.ClientError, OSError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while not response.content.at_eof():
                await response.content.readany()
