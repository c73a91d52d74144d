"""A worker that answers what a test tells it to, and remembers what it was asked: what the gateway does
does not depend on a model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from config.front import make_application
from registry.actions.events import publish_change
from tests.api.conftest import ROUTE, Served, eventually, serving
from tests.factories import make_api_key, make_deployment, make_worker


class Scripted:
    """Answers every POST with `answer`: an object as JSON, a list as the events of a stream, which ends
    with `[DONE]`; with `status` when that is another one."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        """Paths and bodies."""
        self.answer: Any = {}
        self.status = 200
        self.asgi = Starlette(routes=[Route("/{path:path}", self._answer, methods=["POST"])])
        self.url = ""

    async def _answer(self, request: Request) -> Response:
        self.asked.append((request.url.path, await request.json()))
        if not isinstance(self.answer, list):
            return JSONResponse(self.answer, status_code=self.status)
        events = [f"data: {json.dumps(one, separators=(',', ':'))}\n\n" for one in self.answer]
        return StreamingResponse(iter([*events, "data: [DONE]\n\n"]), media_type="text/event-stream")


@contextlib.contextmanager
def scripted(worker: Scripted | None = None) -> Iterator[Scripted]:
    """The worker, on a port of its own."""
    worker = worker or Scripted()
    listener = socket.create_server(("127.0.0.1", 0))
    worker.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(worker.asgi, lifespan="off", ws="none", log_config=None))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        eventually(lambda: server.started, "the worker listens")
        yield worker
    finally:
        server.should_exit = True
        thread.join(10)


@contextlib.contextmanager
def in_front_of(worker: Scripted, *capabilities: str, worker_id: int) -> Iterator[Served]:
    """A gateway whose one route leads to the worker."""
    deployment = make_deployment(route=ROUTE)
    make_worker(deployment=deployment, id=worker_id, url=worker.url, capabilities=list(capabilities))
    publish_change("route", ROUTE)
    front = make_application()
    with serving(front) as port:
        yield Served(port, make_api_key(name="tests")[1], front)
