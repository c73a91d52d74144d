"""A small server that speaks the OpenAI API as a test tells it to, and the upstream engine on it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import uvicorn
from aiohttp import web

from inference.engines.base import EngineSpec
from inference.engines.upstream.app import UpstreamApp
from inference.engines.upstream.engine import UpstreamEngine
from inference.protocol import Progress, Upstream
from tests.node.engine_tools import until

KEY = "sk-canary-upstream-key-0042"
MODEL = "theirs"


def piece(text: str, *, index: int = 0, reason: str | None = None, **more: Any) -> dict[str, Any]:
    """A chunk as a plain server writes it."""
    delta = {"content": text} if text else {}
    choice = {"index": index, "delta": delta, "finish_reason": reason}
    return {"id": "x", "object": "chat.completion.chunk", "model": MODEL, "choices": [choice], **more}


def usage(prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    figures = {"prompt_tokens": prompt, "completion_tokens": completion}
    return figures | {"total_tokens": prompt + completion} | more


STREAM = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    piece("Hello"),
    piece(" there"),
    piece("", reason="stop"),
    {"id": "x", "choices": [], "usage": usage(11, 5, prompt_tokens_details={"cached_tokens": 4})},
    "[DONE]",
]
ANSWER = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": MODEL,
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "Hello there"}, "finish_reason": "stop"}
    ],
    "usage": usage(11, 5),
}


@dataclass
class Foreign:
    """Answers POSTs with `answer`: a list is the events of a stream, anything else JSON; with `status` when
    that is another one. A number in a list is a pause in seconds, `cut` the end of the connection."""

    answer: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    models: Any = field(default_factory=lambda: {"object": "list", "data": [{"id": MODEL}]})
    models_status: int = 200
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    """Paths, headers and bodies of the POSTs."""
    looked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Paths and headers of the GETs."""
    broken: int = 0
    """Streams whose client closed the connection before their end."""
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            self.looked.append((request.path, dict(request.headers)))
            if request.path.endswith("/models"):
                return web.json_response(self.models, status=self.models_status, headers=self.headers)
            return web.json_response({"default_generation_settings": {"n_ctx": 777}})
        self.asked.append((request.path, dict(request.headers), await request.json()))
        answer = self.answer
        if self.status != 200 or not isinstance(answer, list):
            if isinstance(answer, str):
                return web.Response(text=answer, status=self.status, headers=self.headers)
            return web.json_response(answer, status=self.status, headers=self.headers)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await response.prepare(request)
            for event in answer:
                if event == "cut":
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                if isinstance(event, float):
                    await asyncio.sleep(event)
                elif isinstance(event, bytes):
                    await response.write(event)
                else:
                    data = event if isinstance(event, str) else json.dumps(event)
                    await response.write(f"data: {data}\n\n".encode())
        except (ConnectionError, asyncio.CancelledError):
            self.broken += 1
            raise
        return response


@contextlib.asynccontextmanager
async def foreign(**given: Any) -> AsyncIterator[Foreign]:
    """The server, on a port of its own."""
    server = Foreign(**given)
    app = web.Application(handler_args={"handler_cancellation": True})
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    await web.SockSite(runner, listener).start()
    try:
        yield server
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def serving(
    server: Foreign | str, *, key: str = KEY, allowed: Sequence[str] = (), slots: int = 4, **arguments: Any
) -> AsyncIterator[Worker]:
    """The upstream engine behind its HTTP face, in this process: loaded, and guarded by nothing."""
    url = server if isinstance(server, str) else server.url
    access = Upstream(key=key, allowed=list(allowed))
    engine = UpstreamEngine(
        EngineSpec(model_path=None, slots=slots, arguments={"url": url, **arguments}, upstream=access)
    )
    told: list[Progress] = []
    listener = socket.create_server(("127.0.0.1", 0))
    try:
        await engine.load(told.append)
        app = UpstreamApp(engine, slots=slots, served_name="served")
        app.ready = True
        behind = uvicorn.Server(uvicorn.Config(app.asgi, lifespan="off", ws="none", log_config=None))
        behind.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        task = asyncio.create_task(behind.serve(sockets=[listener]))
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with aiohttp.ClientSession(base) as session:
            await until(lambda: behind.started, "it listens")
            yield Worker(engine, app, session)
        behind.should_exit = True
        await task
    finally:
        listener.close()
        await engine.close()


@dataclass
class Worker:
    engine: UpstreamEngine
    app: UpstreamApp
    session: aiohttp.ClientSession

    async def post(self, path: str, **fields: Any) -> tuple[int, Any]:
        """Status and answer, which is a list of events for a stream."""
        async with self.session.post(path, json=fields, headers={"X-Request-Id": "req_1"}) as reply:
            text = await reply.text()
            if reply.content_type == "text/event-stream":
                events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
                return reply.status, [one if one == "[DONE]" else json.loads(one) for one in events]
            return reply.status, json.loads(text)

    async def chat(self, content: str = "Say hello to them.", **fields: Any) -> tuple[int, Any]:
        messages = [{"role": "user", "content": content}]
        return await self.post("/v1/chat/completions", model="asked", messages=messages, **fields)

    async def stream(self, **fields: Any) -> tuple[int, Any]:
        return await self.chat(stream=True, stream_options=ASKED_OPTIONS, **fields)

    async def load(self) -> dict[str, int]:
        async with self.session.get("/load") as reply:
            loaded: dict[str, int] = await reply.json()
            return loaded

    async def abort(self, request_id: str = "req_1") -> dict[str, int]:
        async with self.session.post("/abort", json={"request_id": request_id}) as reply:
            told: dict[str, int] = await reply.json()
            return told


ASKED_OPTIONS = {"include_usage": True, "continuous_usage_stats": True}
"""As gateways ask for it."""


def text_of(events: list[Any], index: int = 0) -> str:
    found = [choice for event in events[:-1] for choice in event["choices"] if choice["index"] == index]
    return "".join(one["delta"].get("content") or "" if "delta" in one else one["text"] for one in found)
