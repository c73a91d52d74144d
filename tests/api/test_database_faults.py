"""PostgreSQL stops, dies and has no room, under gateways that go on: what their clients are told, and that
every token is in the ledger once. FAULTS.md's rows F26 to F30.

A gateway needs the database to learn of a key that it has not seen, and to hold a hard budget to its limit.
Everything else it does without it for a minute."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from statistics import median

import psycopg
import pytest

from tests.api.apart import AMPLE, Apart, Clients, Seen, own_server, public_id
from tests.api.conftest import Served, Worker, eventually
from tests.services import OwnPostgres

TIGHT = 4_000
"""A budget that has room for some of many requests only."""


@pytest.fixture(scope="module")
def server() -> Iterator[OwnPostgres]:
    with own_server() as running:
        yield running


@pytest.fixture(scope="module")
def apart(server: OwnPostgres, worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> Apart:
    return Apart(server.url, tmp_path_factory.mktemp("apart"), worker, limits=[AMPLE] * 20 + [TIGHT] * 2)


@pytest.fixture(scope="module")
def port(apart: Apart) -> Iterator[int]:
    with apart.gateway() as (number, _):
        yield number


def restart(server: OwnPostgres) -> None:
    server.stop()
    time.sleep(1)  # a quick one would be over before anybody asked
    server.start()


@contextlib.contextmanager
def stopped(server: OwnPostgres) -> Iterator[None]:
    server.stop()
    try:
        yield
    finally:
        server.start()


async def keep_asking(
    clients: Clients, apart: Apart, known: str, held: str, until: asyncio.Task[None], *, every: float
) -> tuple[list[Seen], list[Seen], list[Seen]]:
    """Ask with a key that the gateway knows, with one that has a hard budget, and with new ones."""
    asked: tuple[list[asyncio.Task[Seen]], ...] = ([], [], [])
    while not until.done():
        for tasks, key in zip(asked, (known, held, apart.key()), strict=True):
            tasks.append(asyncio.create_task(clients.ask(key)))
        await asyncio.sleep(every)
    seen, of_held, of_new = [await asyncio.gather(*tasks) for tasks in asked]
    return seen, of_held, of_new


async def test_f26_a_restart_touches_no_stream_and_no_key_that_is_known(
    server: OwnPostgres, apart: Apart, port: int
) -> None:
    """F26: others wait or are told to come again, within 5 s; an official client with its two retries does
    not notice. All of it is in the ledger at most 10 s after the database is back."""
    known, held, patient = apart.key(), apart.held_key(), apart.key()
    async with apart.clients(port) as clients:
        assert (await clients.ask(known)).whole
        assert (await clients.ask(held)).whole
        streams = [
            asyncio.create_task(clients.ask(key, "!tokens 80 !slow 0.05", stream=True))
            for key in (known, held) * 3
        ]
        await asyncio.sleep(0.5)
        restarting = asyncio.create_task(asyncio.to_thread(restart, server))
        asking = asyncio.create_task(keep_asking(clients, apart, known, held, restarting, every=0.25))
        await clients.until_ready(False, seconds=2)
        async with Served(port, patient).client(max_retries=2) as official:
            answer = await official.chat.completions.create(
                model="org/sim", messages=[{"role": "user", "content": "!tokens 3"}]
            )
        assert answer.choices[0].message.content
        of_known, of_held, of_new = await asking
        await restarting
        await clients.until_ready(seconds=5)
        assert (await clients.ask(held)).whole
        assert (await clients.ask(apart.key())).whole
        for stream in await asyncio.gather(*streams):
            assert stream.whole
            assert stream.tokens == 80
            assert stream.longest_pause < 2
        assert {each.status for each in of_known} == {200}
        assert max(each.waited for each in of_known) < 2
        assert all(each.whole or each.refused() for each in of_held + of_new)
        assert max(each.waited for each in of_held + of_new) < 5
        assert any(each.refused() for each in of_held)
        apart.agree(clients.seen)


@pytest.mark.full
@pytest.mark.timeout(180)
async def test_f27_half_a_minute_without_the_database_loses_and_doubles_nothing(
    server: OwnPostgres, apart: Apart, port: int
) -> None:
    """F27: known keys are served on and streams finish; what needs the database is refused at once."""
    known, held = apart.key(), apart.held_key()
    with apart.gateway() as (other_port, other):
        async with apart.clients(port) as clients, apart.clients(other_port) as others:
            for each in (clients, others):
                assert (await each.ask(known)).whole
                assert (await each.ask(held)).whole
            streams = [
                asyncio.create_task(clients.ask(key, "!tokens 280 !slow 0.1", stream=True))
                for key in (known, held) * 3
            ]
            await asyncio.sleep(0.5)
            with stopped(server):
                await clients.until_ready(False, seconds=2)
                half_a_minute = asyncio.create_task(asyncio.sleep(28))
                asking = asyncio.create_task(keep_asking(clients, apart, known, held, half_a_minute, every=1))
                # One ends meanwhile: what it could not bring in, the other one does.
                assert all([(await others.ask(known)).whole for _ in range(10)])
                assert (await others.ask(held)).refused()
                other.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(other.wait, 20) == 0
                of_known, of_held, of_new = await asking
                assert {each.status for each in of_known} == {200}
                assert all(each.refused() for each in of_held + of_new)
                assert median(each.waited for each in of_held + of_new) < 1
            await clients.until_ready(seconds=5)
            assert (await clients.ask(held)).whole
            for stream in await asyncio.gather(*streams):
                assert stream.whole
                assert stream.tokens == 280
            apart.agree(clients.seen + others.seen)


# -- A commit whose answer never came.


class Undecided:
    """A server whose commits are done and not told: each waits for a standby that there is not."""

    def __init__(self, server: OwnPostgres) -> None:
        self._url = server.url

    def __enter__(self) -> Undecided:
        self._say("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        return self

    def __exit__(self, *_: object) -> None:
        self._say("ALTER SYSTEM RESET synchronous_standby_names")

    def _say(self, setting: str) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute(setting)
            connection.execute("SELECT pg_reload_conf()")

    def waiting(self) -> list[int]:
        """Processes that have committed and wait to say so."""
        with psycopg.connect(self._url, autocommit=True) as connection:
            found = connection.execute("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
            return [pid for (pid,) in found]

    def kill_one(self) -> None:
        """Which makes the server end all the others, and begin anew."""
        with psycopg.connect(self._url, autocommit=True) as witness:
            os.kill(eventually(self.waiting, "a commit waits")[0], signal.SIGKILL)
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    witness.execute("SELECT pg_sleep(0.01)")
        eventually(self._answers, "the server has begun anew")

    def _answers(self) -> bool:
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self._url):
            return True
        return False


async def test_f28_a_commit_whose_answer_never_came_counts_once(
    server: OwnPostgres, apart: Apart, port: int
) -> None:
    """F28: the server is killed after it committed and before it said so: once while it sets a budget aside,
    and until an event is in the ledger and its gateway does not know."""
    known, held = apart.key(), apart.held_key()
    async with apart.clients(port) as clients:
        assert (await clients.ask(known)).whole
        assert (await clients.ask(held)).whole
        streams = [
            asyncio.create_task(clients.ask(key, "!tokens 20 !slow 0.02", stream=True))
            for key in (known, held)
        ]
        await asyncio.sleep(0.2)
        with Undecided(server) as undecided:
            unsure = asyncio.create_task(clients.ask(held))
            await asyncio.to_thread(undecided.kill_one)
            assert (await unsure).refused(), "it may be held, it may not: no worker is asked"
            done = await asyncio.gather(*streams)
            ids = {each.request_id for each in done}

            def committed() -> bool:
                undecided.kill_one()
                rows = apart.rows("SELECT request_id FROM registry_usageevent")
                return ids <= {request_id for (request_id,) in rows}

            await asyncio.to_thread(eventually, committed, "the events are committed", seconds=20)
            async with clients.session.get(f"http://127.0.0.1:{port}/readyz") as ready:
                assert (await ready.json())["spool_pending"] > 0, "and their gateway does not know"
        await clients.until_ready()
        assert (await clients.ask(held)).whole
        apart.agree(clients.seen)


@pytest.mark.full
@pytest.mark.timeout(180)
async def test_f28_backends_killed_at_random_instants_keep_a_hard_budget_exact(
    server: OwnPostgres, apart: Apart, port: int
) -> None:
    """F28: twenty kills, under traffic of a key with a hard budget."""
    held = apart.held_key()

    def kill_a_backend() -> None:
        with contextlib.suppress(psycopg.OperationalError, ProcessLookupError):
            rows = apart.rows(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' "
                "AND pid <> pg_backend_pid() ORDER BY state_change DESC LIMIT 1"
            )
            os.kill(rows[0][0], signal.SIGKILL)

    async with apart.clients(port) as clients:

        async def ask_on() -> None:
            while not ended.is_set():
                await clients.ask(held, "!tokens 5 !slow 0.01", stream=True)
                await asyncio.sleep(0.01)

        ended = asyncio.Event()
        asking = [asyncio.create_task(ask_on()) for _ in range(8)]
        for _ in range(20):
            await asyncio.sleep(0.7)
            await asyncio.to_thread(kill_a_backend)
        await asyncio.sleep(1)
        ended.set()
        await asyncio.gather(*asking)
        assert sum(each.whole for each in clients.seen) > 100
        assert any(each.refused() for each in clients.seen)
        assert all(each.whole or each.refused() for each in clients.seen)
        apart.agree(clients.seen)


# -- No connection, and no thread, is free.


@contextlib.contextmanager
def all_connections(server: OwnPostgres) -> Iterator[int]:
    """Take every connection that the server has, also those that others have now; says how many."""
    with contextlib.ExitStack() as stack:
        taken: list[psycopg.Connection] = []

        def take() -> None:
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    taken.append(stack.enter_context(psycopg.connect(server.url, autocommit=True)))

        take()
        ours = [connection.info.backend_pid for connection in taken]
        end_others = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND NOT pid = ANY(%s)"
        )
        while taken[0].execute(end_others, [ours]).fetchall():
            take()
            ours = [connection.info.backend_pid for connection in taken]
        yield len(taken)


async def test_f29_without_a_connection_to_the_database_nobody_waits(
    server: OwnPostgres, apart: Apart, port: int
) -> None:
    """F29: all connections are held by others. Health is well, known keys are served, and what needs the
    database is refused within 2 s, a hundred at once too."""
    known, held = apart.key(), apart.held_key()
    async with apart.clients(port) as clients:
        assert (await clients.ask(known)).whole
        assert (await clients.ask(held)).whole
        with all_connections(server) as taken:
            assert taken >= 100
            await clients.until_ready(False, seconds=5)
            for path, status in (("/healthz", 200), ("/health", 200), ("/readyz", 503)):
                assert await clients.status(path) == status
            asked = await asyncio.gather(
                *(clients.ask(held) for _ in range(100)),
                *(clients.ask(apart.key()) for _ in range(5)),
            )
            assert all(each.refused() for each in asked)
            assert max(each.waited for each in asked) < 3  # 2 s, and what a busy test machine takes
            assert (await clients.ask(known)).whole
            url = f"http://127.0.0.1:{port}/v1/organization/usage/completions?start_time=1"
            async with clients.session.get(url, headers={"Authorization": f"Bearer {known}"}) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (503, "storage")
        await clients.until_ready(seconds=5)
        assert (await clients.ask(held)).whole
        apart.agree(clients.seen)


@pytest.mark.full
async def test_f29_a_row_that_somebody_keeps_locked_stops_only_those_who_need_it(
    apart: Apart, port: int
) -> None:
    """F29: someone's open transaction has the row of a hot budget. Its requests are refused, most of them
    after 2 s and none after 5; keys without a hard budget are served meanwhile, new ones too."""
    hot, held, known = apart.held_key(), apart.held_key(), apart.key()
    async with apart.clients(port) as clients:
        for key in (hot, held, known):
            assert (await clients.ask(key)).whole
        with psycopg.connect(apart.url) as connection:
            connection.execute(
                "UPDATE registry_budgetperiod SET held = held WHERE budget_id = "
                "(SELECT id FROM registry_budget WHERE subject = %s)",
                (public_id(hot),),
            )
            stuck = [asyncio.create_task(clients.ask(hot)) for _ in range(30)]
            await asyncio.sleep(0.5)
            quick = await asyncio.gather(
                *(clients.ask(known) for _ in range(20)), *(clients.ask(apart.key()) for _ in range(5))
            )
            assert all(each.whole and each.waited < 1 for each in quick)
            refused = await asyncio.gather(*stuck)
            assert all(each.refused() for each in refused)
            waits = sorted(each.waited for each in refused)
            assert waits[-1] < 5.5
            assert waits[len(waits) // 2] < 3
            assert await clients.status("/readyz") == 200
        assert (await clients.ask(hot)).whole
        assert (await clients.ask(held)).whole
        apart.agree(clients.seen)


# -- Two hundred at once.


async def persist(clients: Clients, key: str, text: str, **fields: int) -> Seen:
    """Ask, and come again as often as official clients do when told that the storage is away."""
    for _ in range(3):
        seen = await clients.ask(key, text, **fields)
        if not seen.refused():
            break
        await asyncio.sleep(seen.retry_after or 0)
    return seen


@pytest.mark.timeout(120)
@pytest.mark.parametrize("at_once", [60, pytest.param(200, marks=pytest.mark.full)])
async def test_f30_many_at_once_on_one_budget_are_exact(apart: Apart, port: int, at_once: int) -> None:
    """F30: at two gateways, with room for all and with room for some. None fails, no two of the database's
    transactions wait for one another in a circle, and nothing goes over the limit. A few at once wait no
    50 ms for their budget, where nothing else keeps the machine busy."""
    plain, ample, tight = apart.key(), apart.held_key(), apart.held_key(TIGHT)
    deadlocks = "SELECT sum(deadlocks) FROM pg_stat_database"
    before = apart.rows(deadlocks)
    with apart.gateway() as (other_port, _):
        async with apart.clients(port) as clients, apart.clients(other_port) as others:
            both = (clients, others)
            for each in both:
                for key in (plain, ample, tight):
                    assert (await each.ask(key, max_tokens=100)).whole
            answered = await asyncio.gather(
                *(persist(each, ample, "!tokens 1") for each in both * (at_once // 2))
            )
            assert all(each.whole for each in answered)
            squeezed = await asyncio.gather(
                *(persist(each, tight, "!tokens 100", max_tokens=100) for each in both * (at_once // 2))
            )
            assert any(each.whole for each in squeezed)
            assert any(each.code == "insufficient_quota" for each in squeezed)
            assert all(each.whole or each.code == "insufficient_quota" for each in squeezed)
            waited: dict[str, list[float]] = {plain: [], ample: []}
            for key in (plain, ample) * 20:
                some = await asyncio.gather(*(each.ask(key, "!tokens 1") for each in both * 2))
                waited[key] += [each.waited for each in some]
            assert median(waited[ample]) < 0.05 + 3 * median(waited[plain])
            apart.agree(clients.seen + others.seen)
    assert apart.rows(deadlocks) == before
    [(spent,)] = apart.rows(
        "SELECT p.spent FROM registry_budgetperiod p JOIN registry_budget b ON b.id = p.budget_id "
        "WHERE b.subject = %s",
        public_id(tight),
    )
    assert 0 < spent <= TIGHT
