"""Real engine and worker processes for tests, and small ways to talk to them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parents[2]
SECRET = "worker-s3cret"
AUTH = {"Authorization": f"Bearer {SECRET}"}


async def until(
    question: Callable[[], Awaitable[bool] | bool], what: str, *, seconds: float = 30.0, every: float = 0.02
) -> float:
    """Ask until the answer is yes; returns how long that took."""
    started = time.monotonic()
    while True:
        answer = question()
        if await answer if isinstance(answer, Awaitable) else answer:
            return time.monotonic() - started
        if time.monotonic() - started > seconds:
            raise AssertionError(f"Not within {seconds} s: {what}")
        await asyncio.sleep(every)


def child_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


@contextmanager
def engine_process(*, slots: int = 4, engine: str = "simulated", **arguments: Any) -> Iterator[str]:
    """An engine server of its own; its base URL. It is not ready yet."""
    spec = {"engine": engine, "slots": slots, "served_name": "sim", "arguments": arguments}
    listener = socket.create_server(("127.0.0.1", 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "inference.engines.server", f"--fd={listener.fileno()}"],
        stdin=subprocess.PIPE,
        pass_fds=(listener.fileno(),),
        env=child_environment(ROUNDHOUSE_WORKER_SECRET=SECRET),
    )
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(spec).encode())
        process.stdin.close()
        yield url
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def ready(session: aiohttp.ClientSession, url: str) -> None:
    async def healthy() -> bool:
        async with session.get(f"{url}/health") as reply:
            return reply.status == 200

    await until(healthy, "the engine is ready")


async def load_of(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(f"{url}/load") as reply:
        assert reply.status == 200
        loaded: dict[str, Any] = await reply.json()
        return loaded


def question(content: str, **fields: Any) -> dict[str, Any]:
    return {"model": "asked", "messages": [{"role": "user", "content": content}], **fields}


async def events_of(reply: aiohttp.ClientResponse) -> list[tuple[float, str]]:
    """The `data:` of every event, each with the moment its bytes came."""
    found: list[tuple[float, str]] = []
    rest = b""
    async for data in reply.content.iter_any():
        *whole, rest = (rest + data).split(b"\n\n")
        for event in whole:
            assert event.startswith(b"data: ")
            found.append((time.monotonic(), event[6:].decode()))
    assert rest == b""
    return found


def text_of(events: list[tuple[float, str]]) -> str:
    texts = []
    for _, event in events:
        if event != "[DONE]":
            for choice in json.loads(event)["choices"]:
                texts.append(choice["delta"].get("content") or "")
    return "".join(texts)
