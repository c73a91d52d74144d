"""A foreign server in a thread, and a worker of the upstream engine on it as a process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from tests.api.conftest import Worker, engine_process, eventually
from tests.node.upstreams import KEY, Foreign, foreign

WORKER_ID = 7114


@contextlib.contextmanager
def foreign_server(**given: Any) -> Iterator[Foreign]:
    running: list[Foreign] = []
    loop = asyncio.new_event_loop()
    over = asyncio.Event()

    async def serve() -> None:
        async with foreign(**given) as server:
            running.append(server)
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), name="foreign")
    thread.start()
    try:
        eventually(lambda: running, "the foreign server listens")
        yield running[0]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
        loop.close()


@contextlib.contextmanager
def upstream_worker(
    url: str, *, key: str = KEY, worker_id: int = WORKER_ID, wait: bool = True, **arguments: Any
) -> Iterator[Worker]:
    spec = {
        "engine": "upstream",
        "slots": 8,
        "served_name": "theirs",
        "arguments": {"url": url, **arguments},
        "upstream": {"key": key},
    }
    with engine_process(spec, worker_id) as worker:
        if wait:
            eventually(worker.healthy, "the upstream is found", seconds=30)
        yield worker
