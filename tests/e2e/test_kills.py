"""Kills at random instants, under load: every answer that a client saw is in the ledger, exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import services
from tests.e2e.conftest import ROOT, Roundhouse, eventually, free_port, new_roundhouse
from tests.e2e.test_accounting import Seen, ask

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.full, pytest.mark.timeout(1800)]

GATEWAY_KILLS = 200
DATABASE_KILLS = 50
AT_ONCE = 6
"""Requests at each gateway at any time."""


class Gateway:
    """One more gateway of a running Roundhouse, which its test may kill."""

    def __init__(self, roundhouse: Roundhouse) -> None:
        self._roundhouse = roundhouse
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # Its own log would grow with each start; nobody reads it.
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "manage.py"),
                "gateway",
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
            ],
            cwd=self._roundhouse.data,
            env=self._roundhouse.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    async def ready(self) -> None:
        for _ in range(2400):
            if await asyncio.to_thread(self._is_ready):
                return
            await asyncio.sleep(0.025)
        raise AssertionError("a gateway did not come back within a minute")

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(10)

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key=self._roundhouse.credentials["api_key"],
            max_retries=0,
            timeout=30,
        )


class Traffic:
    """Clients that ask without end, and what each of them saw."""

    def __init__(self, client: openai.AsyncOpenAI, model: str, seed: int) -> None:
        self.seen: list[Seen] = []
        self._open: list[Seen] = []
        self._client = client
        self._model = model
        self._ending = False
        self._numbers = iter(range(seed * 1_000_000, (seed + 1) * 1_000_000))

    @property
    def in_flight(self) -> bool:
        """Whether a stream has begun and not ended."""
        return any(seen.request_id and not seen.finished for seen in self._open)

    async def one(self) -> None:
        while not self._ending:
            number = next(self._numbers)
            seen = Seen()
            self._open.append(seen)
            await ask(self._client, number, aborted=number % 10 == 0, model=self._model, seen=seen)
            self._open.remove(seen)
            if seen.request_id is not None:
                self.seen.append(seen)
            else:
                await asyncio.sleep(0.05)

    @contextlib.asynccontextmanager
    async def flowing(self) -> AsyncIterator[Traffic]:
        async with self._client:
            tasks = [asyncio.create_task(self.one()) for _ in range(AT_ONCE)]
            try:
                yield self
            finally:
                # Those under way end by themselves: what they see is to be counted too.
                self._ending = True
                await asyncio.gather(*tasks)


async def killed_often(gateway: Gateway, kills: int, seed: int) -> tuple[list[Seen], int]:
    """What the clients of a gateway saw while it was killed so often; and how many of these kills met
    requests in flight."""
    source = random.Random(seed)
    met = 0
    async with Traffic(gateway.client(), "killed", seed).flowing() as traffic:
        for _ in range(kills):
            await gateway.ready()
            # From the first request's arrival to streams in full flow.
            await asyncio.sleep(source.uniform(0.05, 0.7))
            met += traffic.in_flight
            gateway.kill()
            gateway.start()
        await gateway.ready()
        # Enough of it is answered in peace, too.
        await asyncio.sleep(2)
    return traffic.seen, met


def agree(roundhouse: Roundhouse, route: str, seen: list[Seen]) -> None:
    """The ledger holds what the clients saw: each request once, no token less than the client had."""
    ids = {each.request_id for each in seen}
    assert len(ids) == len(seen)

    def ledger() -> list[tuple[Any, ...]] | None:
        rows = roundhouse.rows(
            "SELECT request_id, prompt_tokens, completion_tokens, outcome FROM registry_usageevent "
            "WHERE route = %s",
            route,
        )
        return rows if ids <= {row[0] for row in rows} else None

    rows = eventually(ledger, seconds=60, what="every request is in the ledger", every=0.5)
    events = {row[0]: row[1:] for row in rows}
    assert len(events) == len(rows), "one event per request id"
    finished = [each for each in seen if each.finished]
    for each in seen:
        prompt, completion, outcome = events[each.request_id]
        if each.finished:
            assert (prompt, completion, outcome) == (each.prompt_tokens, each.completion_tokens, "ok")
        else:
            assert completion >= each.completion_tokens, each
    assert len(finished) > len(seen) // 4, "many were answered whole"


@pytest.fixture
def two_gateways(roundhouse: Roundhouse) -> Iterator[list[Gateway]]:
    gateways = [Gateway(roundhouse), Gateway(roundhouse)]
    for gateway in gateways:
        gateway.start()
    yield gateways
    for gateway in gateways:
        gateway.kill()


def test_gateways_killed_at_random_instants_lose_and_double_nothing(
    roundhouse: Roundhouse, two_gateways: list[Gateway]
) -> None:
    roundhouse.deploy_simulated("killed", token_seconds=0.01)

    async def all_of_it() -> list[tuple[list[Seen], int]]:
        each = GATEWAY_KILLS // len(two_gateways)
        return await asyncio.gather(
            *(killed_often(gateway, each, seed) for seed, gateway in enumerate(two_gateways, 1))
        )

    results = asyncio.run(all_of_it())
    met = sum(met for _, met in results)
    assert met >= GATEWAY_KILLS * 3 // 4, "most kills met requests in flight"
    agree(roundhouse, "killed", [each for seen, _ in results for each in seen])


@contextlib.contextmanager
def on_a_database_of_its_own() -> Iterator[tuple[Roundhouse, services.OwnPostgres]]:
    data = Path(tempfile.mkdtemp(prefix="rh-kills-"))
    with services.own_postgres() as server:
        roundhouse = new_roundhouse(data, DATABASE_URL=server.url)
        try:
            roundhouse.up()
            yield roundhouse, server
        finally:
            roundhouse.down()
            shutil.rmtree(data, ignore_errors=True)


def test_a_database_killed_at_random_instants_loses_and_doubles_nothing() -> None:
    with on_a_database_of_its_own() as (roundhouse, server):
        roundhouse.deploy_simulated("outlived", token_seconds=0.01)

        async def all_of_it() -> tuple[list[Seen], int]:
            source = random.Random(7)
            client = roundhouse.async_client(max_retries=0, timeout=30)
            met = 0
            async with Traffic(client, "outlived", 7).flowing() as traffic:
                for _ in range(DATABASE_KILLS):
                    await asyncio.sleep(source.uniform(0.1, 0.8))
                    met += traffic.in_flight
                    await asyncio.to_thread(server.kill)
                    await asyncio.to_thread(server.start)
                await asyncio.sleep(2)
            return traffic.seen, met

        seen, met = asyncio.run(all_of_it())
        assert met >= DATABASE_KILLS * 3 // 4
        agree(roundhouse, "outlived", seen)
