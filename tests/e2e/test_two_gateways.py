"""Two gateways on one PostgreSQL and one Redis, one of them killed in the middle: budgets and limits are
exact, by the clients' own count and by the ledger."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests import services
from tests.e2e.conftest import Roundhouse, eventually, new_roundhouse
from tests.e2e.nursery import gateways
from tests.e2e.test_kills import Gateway

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.full, pytest.mark.timeout(600)]

MODEL = "shared"
CLIENTS = 8
"""At each gateway."""
MICROS = 1000
"""What a request costs, however long it is."""


@dataclasses.dataclass
class Told:
    """What one client was told, and when."""

    sent: float
    request_id: str = ""
    began: float = 0.0
    ended: float = 0.0
    tokens: int = 0


class Crowd:
    """Clients of both gateways that ask without end."""

    def __init__(self) -> None:
        self.answered: list[Told] = []
        self.refused: list[Told] = []
        self.failed: list[Told] = []
        """Told to come again: no worker had room, or the database was busy."""
        self.lost: list[Told] = []
        """Cut off by the kill: whether they were let through is not known."""
        self.ending = False

    async def one(self, client: openai.AsyncOpenAI, question: dict[str, Any]) -> None:
        while not self.ending:
            told = Told(time.monotonic())
            try:
                async with client.chat.completions.with_streaming_response.create(
                    **question, stream=True, stream_options={"include_usage": True}
                ) as raw:
                    told.began = time.monotonic()
                    told.request_id = raw.headers["x-request-id"]
                    async for chunk in await raw.parse():
                        if chunk.usage:
                            told.tokens = chunk.usage.total_tokens
                told.ended = time.monotonic()
                self.answered.append(told)
            except openai.RateLimitError:
                self.refused.append(told)
                await asyncio.sleep(0.02)
            except openai.InternalServerError as error:
                if error.status_code != 503:
                    raise
                self.failed.append(told)
                await asyncio.sleep(0.1)
            except (openai.APIError, httpx.HTTPError) as error:
                if not isinstance(error.__cause__, httpx.ConnectError):
                    self.lost.append(told)
                await asyncio.sleep(0.05)

    async def until(self, question: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 120
        while not await asyncio.to_thread(question):
            assert time.monotonic() < deadline, f"not within two minutes: {what}"
            await asyncio.sleep(0.1)

    async def until_refused(self) -> None:
        """Wait until so many more were refused that all must have met their limit."""
        so_far = len(self.refused)
        await self.until(lambda: len(self.refused) >= so_far + 4 * CLIENTS, "the limit is met")

    async def until_only_refused(self) -> None:
        """Wait until nothing else has happened for two seconds."""

        def others() -> int:
            return len(self.answered) + len(self.failed) + len(self.lost)

        before = -1
        while others() > before:
            before = others()
            await self.until_refused()
            await asyncio.sleep(2)


class Pair:
    """A Roundhouse with its own gateway, and another that is killed."""

    def __init__(self, roundhouse: Roundhouse, other: Gateway) -> None:
        self.roundhouse = roundhouse
        self.other = other

    def key(self, name: str) -> str:
        return self.roundhouse.manage("key", "create", name).stdout.strip()

    async def kill_one(self) -> None:
        """Returns when it is back."""
        self.other.kill()
        self.other.start()
        await self.other.ready()

    @contextlib.asynccontextmanager
    async def crowd(self, key: str, **question: Any) -> AsyncIterator[Crowd]:
        """`CLIENTS` at each of the two, until the end of the block; what they began they see ended."""
        crowd = Crowd()
        question = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]} | question
        here = openai.AsyncOpenAI(
            base_url=self.roundhouse.credentials["base_url"], api_key=key, max_retries=0, timeout=30
        )
        async with here, self.other.client(key) as there:
            tasks = [
                asyncio.create_task(crowd.one(client, question))
                for client in (here, there)
                for _ in range(CLIENTS)
            ]
            try:
                yield crowd
            finally:
                crowd.ending = True
                await asyncio.gather(*tasks)
                print({name: len(those) for name, those in vars(crowd).items() if isinstance(those, list)})

    def all_is_settled(self) -> None:
        """Wait until the spools of those that were killed have been read."""
        spool = self.roundhouse.data / "spool"
        eventually(
            lambda: sum(not folder.name.startswith(".") for folder in spool.iterdir()) == 2,
            seconds=30,
            what="only the two that live have a spool",
        )


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    data = Path(tempfile.mkdtemp(prefix="rh-two-"))
    with services.own_postgres() as database, services.own_redis() as redis:
        if redis is None:
            services.missing("no redis-server is installed")
        roundhouse = new_roundhouse(data, DATABASE_URL=database.url, REDIS_URL=redis.url)
        try:
            roundhouse.up()
            with gateways(roundhouse) as nursery:
                pair = Pair(roundhouse, Gateway(nursery))
                pair.other.start()
                asyncio.run(pair.other.ready())
                roundhouse.deploy_simulated(MODEL, token_seconds=0.01, tokens=5)
                yield pair
                pair.other.kill()
        finally:
            roundhouse.down()
            shutil.rmtree(data, ignore_errors=True)


def test_a_hard_budget_is_used_to_its_last_request_and_no_further(pair: Pair) -> None:
    requests = 400
    key = pair.key("budgeted")
    pair.roundhouse.manage("price", "set", MODEL, "--request", str(MICROS / 10**6))
    limit = str(requests * MICROS / 10**6)
    pair.roundhouse.manage("budget", "set", "--key", "budgeted", "--limit", limit, "--per", "total")

    def sums() -> tuple[int, int]:
        ((spent, held),) = pair.roundhouse.rows(
            "SELECT spent, held FROM registry_budgetperiod p JOIN registry_budget b ON b.id = p.budget_id "
            "WHERE b.subject_name = 'budgeted'"
        )
        return spent, held

    def used_up() -> bool:
        spent, held = sums()
        return held == 0 and spent + MICROS > requests * MICROS

    async def all_of_it() -> Crowd:
        async with pair.crowd(key) as crowd:
            await crowd.until(lambda: len(crowd.answered) >= requests // 3, "a third is answered")
            await pair.kill_one()
            await crowd.until(used_up, "the budget is used up")
            # Now all are refused; and one gateway is killed while it asks for their budget.
            await asyncio.sleep(0.5)
            await pair.kill_one()
        return crowd

    crowd = asyncio.run(all_of_it())
    pair.all_is_settled()
    assert sums() == (requests * MICROS, 0)
    charged = dict(
        pair.roundhouse.rows(
            "SELECT request_id, cost_micros FROM registry_usageevent "
            "WHERE key_name = 'budgeted' AND cost_micros <> 0"
        )
    )
    assert set(charged.values()) == {MICROS}
    assert len(charged) == requests
    assert {each.request_id for each in crowd.answered} <= set(charged)
    assert 0 <= requests - len(crowd.answered) <= len(crowd.lost)
    assert crowd.refused


def test_so_many_requests_per_minute_are_let_through_and_no_more(pair: Pair) -> None:
    burst, per_second = 60, 1
    key = pair.key("hurried")
    limit = f"{per_second * 60}/minute"
    pair.roundhouse.manage("limit", "set", "requests", limit, "--burst", str(burst), "--key", "hurried")

    async def all_of_it() -> Crowd:
        async with pair.crowd(key) as crowd:
            await crowd.until_refused()
            await pair.kill_one()
            await crowd.until_refused()
        return crowd

    crowd = asyncio.run(all_of_it())
    asked = [*crowd.answered, *crowd.refused, *crowd.failed, *crowd.lost]
    began, ended = min(each.sent for each in asked), max(each.began for each in crowd.answered)
    assert len(crowd.answered) <= burst + per_second * (ended - began)
    # When the last was refused, there was not room for one.
    first = min(each.began for each in crowd.answered)
    last = max(each.sent for each in crowd.refused)
    let_through = len(crowd.answered) + len(crowd.failed) + len(crowd.lost)
    assert let_through > burst - 1 + per_second * (last - first)


def test_so_many_tokens_are_let_through_and_no_more(pair: Pair) -> None:
    """They are estimated before, and put right by what was used: in the end the limit is used up to less
    than what one more request is thought to use."""
    most, estimate = 5000, 100
    key = pair.key("talkative")
    pair.roundhouse.manage("limit", "set", "tokens", f"{most}/day", "--key", "talkative")

    async def all_of_it() -> Crowd:
        async with pair.crowd(key, max_tokens=20) as crowd:
            await crowd.until(lambda: len(crowd.answered) >= 100, "a hundred are answered")
            await pair.kill_one()
            # What has ended is told to Redis within moments: then there is room for the last of them.
            await crowd.until_only_refused()
        return crowd

    crowd = asyncio.run(all_of_it())
    used = sum(each.tokens for each in crowd.answered)
    leaked = most / 86400 * 300
    assert used <= most + leaked
    # Those that were cut off stay counted with what they were thought to use.
    assert used > most - estimate * (1 + len(crowd.lost))
    assert crowd.refused


def test_so_many_run_in_parallel_and_no_more(pair: Pair) -> None:
    at_once, tokens = 4, 80
    key = pair.key("parallel")
    pair.roundhouse.manage("limit", "set", "parallel", str(at_once), "--key", "parallel")
    question = {"messages": [{"role": "user", "content": f"!tokens {tokens} at once"}]}

    def most_at_once(answers: list[Told]) -> int:
        # A client may hear of an end a moment later than the gateway that frees its place.
        ends = [(each.ended - 0.3, -1) for each in answers]
        running = highest = 0
        for _, change in sorted([(each.began, 1) for each in answers] + ends):
            running += change
            highest = max(highest, running)
        return highest

    async def all_of_it() -> tuple[Crowd, Crowd]:
        async with pair.crowd(key, **question) as before:
            await asyncio.sleep(6)
            await pair.kill_one()
        # Places of requests whose gateway was killed are free again after a minute.
        await asyncio.sleep(61)
        async with pair.crowd(key, **question) as after:
            await asyncio.sleep(4)
        return before, after

    before, after = asyncio.run(all_of_it())
    assert most_at_once(before.answered) == at_once
    assert most_at_once(after.answered) == at_once
