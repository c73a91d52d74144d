"""F41: gateways that are restarted one after the other, behind something that asks them whether they are
ready."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from registry.models import UsageEvent
from registry.states import Outcome
from registry.threads import in_database
from tests.api.conftest import ROOT, eventually, process_serving, say
from tests.services import free_port

pytestmark = [pytest.mark.full, pytest.mark.django_db(transaction=True), pytest.mark.timeout(240)]

CLIENTS = 24


class Balancer:
    """Sends each request to a gateway that is ready; one that takes no connection is left out. It keeps
    connections, and tries nothing twice that was sent."""

    def __init__(self, ports: list[int], key: str) -> None:
        self._ready = dict.fromkeys(ports, True)
        self._key = key
        self.seen: collections.Counter[str] = collections.Counter()
        self.failed: list[str] = []
        self.ids: set[str] = set()

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        headers = {"Authorization": f"Bearer {self._key}"}
        ending = asyncio.Event()
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            tasks = [asyncio.create_task(self._watch(session, port)) for port in self._ready]
            clients = [asyncio.create_task(self._ask(session, ending)) for _ in range(CLIENTS)]
            try:
                yield
            finally:
                ending.set()
                await asyncio.gather(*clients)
                for task in tasks:
                    task.cancel()

    async def _watch(self, session: aiohttp.ClientSession, port: int) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"http://127.0.0.1:{port}/readyz") as answer:
                    self._ready[port] = answer.status == 200
            await asyncio.sleep(0.25)

    async def _ask(self, session: aiohttp.ClientSession, ending: asyncio.Event) -> None:
        while not ending.is_set():
            port = random.choice([port for port, ready in self._ready.items() if ready])
            stream = random.random() < 0.5
            body = say("!tokens 40 !slow 0.03" if stream else "!tokens 3", stream=stream)
            try:
                async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as answer:
                    text = await answer.text()
                    whole = text.endswith("data: [DONE]\n\n") if stream else '"usage"' in text
                    if answer.status != 200 or not whole:
                        self.failed.append(f"{port}: {answer.status} {text[-100:]!r}")
                    self.ids.add(answer.headers["x-request-id"])
                    self.seen[f"{port}"] += 1
            except aiohttp.ClientConnectorError:
                self._ready[port] = False
            except aiohttp.ClientError as error:
                self.failed.append(f"{port}: {error!r}")


async def test_gateways_restarted_in_turn_fail_no_request(facts: str, tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    stacks: dict[int, contextlib.ExitStack] = {}
    processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(port: int) -> None:
        command = (str(ROOT / "manage.py"), "gateway", "--port", str(port))
        stacks[port] = contextlib.ExitStack()
        data: Any = tmp_path / str(port)
        log = {"ROUNDHOUSE_LOG_LEVEL": "ERROR"}
        processes[port] = stacks[port].enter_context(process_serving(*command, port=port, data=data, **log))

    for port in ports:
        await asyncio.to_thread(start, port)
    balancer = Balancer(ports, facts)
    try:
        async with balancer.working():
            for port in ports * 2:
                await asyncio.sleep(2)
                began = time.monotonic()
                processes[port].send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(processes[port].wait, 60) == 0
                print(f"drained in {time.monotonic() - began:.1f} s", file=sys.stderr)
                await asyncio.to_thread(start, port)
            await asyncio.sleep(2)
    finally:
        for stack in stacks.values():
            await asyncio.to_thread(stack.close)
    print(dict(balancer.seen), file=sys.stderr)
    assert balancer.failed == []
    assert min(balancer.seen.values()) > 100

    def ledger() -> set[str]:
        return set(UsageEvent.objects.filter(outcome=Outcome.OK).values_list("request_id", flat=True))

    await in_database(lambda: eventually(lambda: ledger() == balancer.ids, "the ledger has them all"))
