"""P5 at its hardest. Gateways and PostgreSQL are killed at random instants, under load: every answer that a
client saw is in the ledger, exactly once, with the client's own count; the budgets are the ledger's sums."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests import services
from tests.e2e.conftest import Roundhouse, eventually, free_port, new_roundhouse
from tests.e2e.nursery import Nursery, gateways
from tests.e2e.test_accounting import Seen, ask

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.full, pytest.mark.timeout(1800)]

GATEWAY_KILLS = 200
DATABASE_KILLS = 50
AT_ONCE = 6
"""Requests at each gateway at any time."""


class Gateway:
    """One more gateway of a running Roundhouse, which its test may kill."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self.port = free_port()
        self._process: psutil.Process | None = None

    def start(self) -> None:
        self._process = self._nursery.start(self.port)

    async def ready(self) -> None:
        deadline = time.monotonic() + 180
        while not await asyncio.to_thread(self._is_ready):
            assert time.monotonic() < deadline, f"no gateway came: {self._nursery.log.read_text()[-3000:]}"
            await asyncio.sleep(0.025)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def client(self, key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=30
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

    async def under_way(self) -> None:
        """Wait for a stream that has begun."""
        deadline = time.monotonic() + 60
        while not self.in_flight:
            assert time.monotonic() < deadline, "nothing is answered"
            await asyncio.sleep(0.01)

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
                # Killed, not back yet, or without its database.
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


def make_key(roundhouse: Roundhouse, name: str, *budget: str) -> str:
    """A new key with a budget in tokens that nothing here uses up."""
    key = roundhouse.manage("key", "create", name).stdout.strip()
    roundhouse.manage("budget", "set", "--key", name, "--tokens", "--limit", str(10**12), *budget)
    return key


async def killed_often(gateway: Gateway, key: str, kills: int, seed: int) -> list[Seen]:
    """What the clients of a gateway saw while it was killed so often."""
    source = random.Random(seed)
    async with Traffic(gateway.client(key), "killed", seed).flowing() as traffic:
        for _ in range(kills):
            await gateway.ready()
            if source.random() < 0.85:
                await traffic.under_way()
            # Else at any instant: while it hears of its first requests, too.
            await asyncio.sleep(source.uniform(0, 0.5))
            gateway.kill()
            gateway.start()
        await gateway.ready()
        # Enough of it is answered in peace, too.
        await asyncio.sleep(2)
    return traffic.seen


def agree(roundhouse: Roundhouse, key_name: str, seen: list[Seen], *, unseen: int) -> None:
    """The ledger holds what the clients saw: each request once, no token less than the client had. Of others
    there are at most so many, whose clients could not learn the id. Their budget is their sum."""
    ids = {each.request_id for each in seen}
    assert len(ids) == len(seen)

    def ledger() -> list[tuple[Any, ...]] | None:
        rows = roundhouse.rows(
            "SELECT request_id, prompt_tokens, completion_tokens, outcome FROM registry_usageevent "
            "WHERE key_name = %s",
            key_name,
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
    answered = {request_id for request_id, (*_, outcome) in events.items() if outcome != "failed"}
    assert len(answered - ids) <= unseen

    def budget() -> bool:
        found = roundhouse.rows(
            "SELECT p.spent, p.held, (SELECT count(*) FROM registry_hold h WHERE h.budget_period_id = p.id), "
            "(SELECT sum(prompt_tokens + completion_tokens) FROM registry_usageevent WHERE key_name = %s) "
            "FROM registry_budgetperiod p JOIN registry_budget b ON b.id = p.budget_id "
            "WHERE b.subject_name = %s",
            key_name,
            key_name,
        )
        ((spent, held, holds, used),) = found
        return (spent, held, holds) == (used, 0, 0)

    # A hold whose commit came after its gateway's end, and its event, is given back within two minutes.
    eventually(budget, seconds=150, what="the budget is the sum of the ledger, and nothing is held", every=1)


@pytest.fixture
def two_gateways(roundhouse: Roundhouse) -> Iterator[list[Gateway]]:
    with gateways(roundhouse) as nursery:
        two = [Gateway(nursery), Gateway(nursery)]
        for gateway in two:
            gateway.start()
        yield two
        for gateway in two:
            gateway.kill()


def test_gateways_killed_at_random_instants_lose_and_double_nothing(
    roundhouse: Roundhouse, two_gateways: list[Gateway]
) -> None:
    roundhouse.deploy_simulated("killed", token_seconds=0.02)
    key = make_key(roundhouse, "killed clients", "--per", "total")

    async def all_of_it() -> list[list[Seen]]:
        each = GATEWAY_KILLS // len(two_gateways)
        return await asyncio.gather(
            *(killed_often(gateway, key, each, seed) for seed, gateway in enumerate(two_gateways, 1))
        )

    seen = [each for saw in asyncio.run(all_of_it()) for each in saw]
    agree(roundhouse, "killed clients", seen, unseen=GATEWAY_KILLS * AT_ONCE)
    # Each start has a name of its own; what was open when it was killed is `interrupted`.
    ((met,),) = roundhouse.rows(
        "SELECT count(DISTINCT gateway) FROM registry_usageevent "
        "WHERE key_name = 'killed clients' AND outcome = 'interrupted'"
    )
    print(f"{GATEWAY_KILLS} kills of a gateway, {met} with requests in flight; {len(seen)} requests seen")
    assert met >= GATEWAY_KILLS * 3 // 4, "most kills met requests in flight"


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
    """Without a hard budget requests are answered while it is away; with one they are refused for so long."""
    with on_a_database_of_its_own() as (roundhouse, server):
        roundhouse.deploy_simulated("outlived", token_seconds=0.02)
        keys = {
            "free clients": make_key(roundhouse, "free clients", "--per", "total", "--soft"),
            "held clients": make_key(roundhouse, "held clients", "--per", "total"),
        }

        async def all_of_it() -> tuple[dict[str, list[Seen]], int]:
            source = random.Random(7)
            met = 0
            async with contextlib.AsyncExitStack() as stack:
                traffics = {}
                for seed, (name, key) in enumerate(keys.items(), 7):
                    client = openai.AsyncOpenAI(
                        base_url=roundhouse.credentials["base_url"], api_key=key, max_retries=0, timeout=30
                    )
                    traffic = Traffic(client, "outlived", seed)
                    traffics[name] = await stack.enter_async_context(traffic.flowing())
                for _ in range(DATABASE_KILLS):
                    await asyncio.sleep(source.uniform(0.1, 0.8))
                    met += any(traffic.in_flight for traffic in traffics.values())
                    await asyncio.to_thread(server.kill)
                    await asyncio.to_thread(server.start)
                await asyncio.sleep(2)
            return {name: traffic.seen for name, traffic in traffics.items()}, met

        seen, met = asyncio.run(all_of_it())
        counts = {name: len(saw) for name, saw in seen.items()}
        print(f"{DATABASE_KILLS} kills of PostgreSQL, {met} with requests in flight; seen: {counts}")
        assert met >= DATABASE_KILLS * 3 // 4
        for name, saw in seen.items():
            # No gateway ends here: whatever was answered was seen.
            agree(roundhouse, name, saw, unseen=0)
