"""Ranks of a route's deployments, queues bounded in tokens, and what those who wait are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from inference.dispatch.demand import Demand
from inference.dispatch.dispatcher import Dispatcher
from inference.dispatch.queue import Wish
from inference.dispatch.views import RouteView, Timeouts
from inference.errors import NoCapacity
from tests.unit.test_dispatch import KnownFleet, deployment, queued, route, worker


@pytest.fixture
def fleet() -> KnownFleet:
    return KnownFleet()


@pytest.fixture
def dispatcher(fleet: KnownFleet) -> Dispatcher:
    return Dispatcher(fleet)


def ranked(fleet: KnownFleet, **facts) -> RouteView:
    """Two slots of the first rank, in two deployments, and one fallback."""
    ours = deployment(1, worker(1, deployment_id=1))
    canary = deployment(2, worker(2, deployment_id=2))
    fallback = deployment(3, worker(3, deployment_id=3))
    fleet.see(ours, canary, fallback)
    targets = ((ours, 1), (canary, 1), (fallback, 100))
    return RouteView(name="route", targets=targets, ranks=(0, 0, 1), **facts)


async def test_a_fallback_is_asked_when_no_other_is_free(fleet, dispatcher):
    way = ranked(fleet)
    leases = [await dispatcher.acquire(way) for _ in range(3)]
    assert {one.worker.id for one in leases[:2]} == {1, 2}
    assert leases[2].worker.id == 3
    leases[0].release()
    again = await dispatcher.acquire(way)
    assert again.worker.id == leases[0].worker.id


async def test_a_fallback_is_asked_when_all_others_failed_the_request(fleet, dispatcher):
    way = ranked(fleet)
    assert (await dispatcher.acquire(way, Wish(avoid=frozenset({1, 2})))).worker.id == 3


async def test_the_last_try_goes_to_a_fallback(fleet, dispatcher):
    way = ranked(fleet)
    last = Wish(avoid=frozenset({1}), last_try=True)
    first = await dispatcher.acquire(way, last)
    assert first.worker.id == 3
    assert (await dispatcher.acquire(way, last)).worker.id == 2, "none is free there: back to the first rank"


async def test_a_queue_is_bounded_in_tokens(fleet, dispatcher):
    one = deployment(1, worker(1), queue_tokens=1000)
    fleet.see(one)
    way = route(one)
    lease = await dispatcher.acquire(way)
    long = asyncio.create_task(dispatcher.acquire(way, Wish(demand=Demand(b"x" * 8000))))
    await queued(dispatcher, 1)  # alone it may be longer than the bound
    with pytest.raises(NoCapacity, match="full"):
        await dispatcher.acquire(way, Wish(demand=Demand(b"x" * 40)))
    lease.release()
    (await long).release()

    lease = await dispatcher.acquire(way)
    some = [asyncio.create_task(dispatcher.acquire(way, Wish(demand=Demand(b"x" * 1600)))) for _ in range(2)]
    await queued(dispatcher, 2)
    with pytest.raises(NoCapacity, match="full"):
        await dispatcher.acquire(way, Wish(demand=Demand(b"x" * 1600)))
    few = asyncio.create_task(dispatcher.acquire(way, Wish(demand=Demand(b"x" * 400))))
    await queued(dispatcher, 3)
    lease.release()
    for task in (*some, few):
        (await task).release()


async def test_for_one_that_is_refused_for_its_tokens_nobody_is_sent_away(fleet, dispatcher):
    one = deployment(1, worker(1), queue_limit=3, queue_tokens=1000)
    fleet.see(one)
    way = route(one)
    lease = await dispatcher.acquire(way)
    some = [
        asyncio.create_task(dispatcher.acquire(way, Wish(project=1, demand=Demand(b"x" * 400))))
        for _ in range(3)
    ]
    await queued(dispatcher, 3)
    with pytest.raises(NoCapacity, match="full"):
        await dispatcher.acquire(way, Wish(project=2, demand=Demand(b"x" * 8000)))
    lease.release()
    for task in some:
        (await task).release()


async def test_a_route_says_how_long_its_requests_wait(fleet, dispatcher):
    one = deployment(1, worker(1), queue_seconds=60.0)
    fleet.see(one)
    way = replace(route(one), timeouts=Timeouts(queue=0.05))
    await dispatcher.acquire(way)
    async with asyncio.timeout(2):
        with pytest.raises(NoCapacity, match="was free"):
            await dispatcher.acquire(way)


def hears(
    heard: list[tuple[int, float | None]], *, again: bool = True
) -> Callable[[int, float | None], bool]:
    def told(ahead: int, seconds: float | None) -> bool:
        heard.append((ahead, seconds))
        return again

    return told


async def test_who_wants_to_hear_once_hears_once(fleet, dispatcher, monkeypatch):
    monkeypatch.setattr("inference.dispatch.dispatcher.TELL_SECONDS", 0.01)
    one = deployment(1, worker(1))
    fleet.see(one)
    way = route(one)
    lease = await dispatcher.acquire(way)
    heard: list[tuple[int, float | None]] = []
    waiting = asyncio.create_task(dispatcher.acquire(way, Wish(told=hears(heard, again=False))))
    await queued(dispatcher, 1)
    await asyncio.sleep(0.1)
    assert heard == [(0, None)]
    lease.release()
    (await waiting).release()


async def test_who_waits_hears_how_many_are_before_it(fleet, dispatcher, monkeypatch):
    monkeypatch.setattr("inference.dispatch.dispatcher.TELL_SECONDS", 0.02)
    one = deployment(1, worker(1))
    fleet.see(one)
    way = route(one)
    lease = await dispatcher.acquire(way)
    before = asyncio.create_task(dispatcher.acquire(way))
    await queued(dispatcher, 1)
    heard: list[tuple[int, float | None]] = []
    waiting = asyncio.create_task(dispatcher.acquire(way, Wish(told=hears(heard))))
    await queued(dispatcher, 2)
    assert set(heard) == {(1, None)}, "nothing was served yet: no pace is known"
    lease.release()
    (await before).release()
    (await waiting).release()
    # With a pace an estimate comes too.
    heard.clear()
    lease = await dispatcher.acquire(way)
    waiting = asyncio.create_task(dispatcher.acquire(way, Wish(told=hears(heard))))
    async with asyncio.timeout(5):
        while len(heard) < 2:  # noqa: ASYNC110 - again and again
            await asyncio.sleep(0.01)
    ahead, seconds = heard[-1]
    assert ahead == 0
    assert seconds is not None
    assert 0 < seconds < 1
    lease.release()
    (await waiting).release()


async def test_one_that_hears_and_leaves_keeps_no_slot(fleet, dispatcher):
    one = deployment(1, worker(1))
    fleet.see(one)
    way = route(one)
    lease = await dispatcher.acquire(way)
    waiting = asyncio.create_task(dispatcher.acquire(way, Wish(told=lambda ahead, seconds: False)))
    await queued(dispatcher, 1)
    lease.release()  # it has the slot from here on
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert fleet.tallies[1].leases == 0
    assert dispatcher.waiting(1) == 0


async def test_a_choice_is_explained(fleet, dispatcher):
    one = deployment(1, worker(1, slots=4), worker(2, slots=4), policy="least_tokens")
    fleet.see(one)
    first = await dispatcher.acquire(route(one), Wish(demand=Demand(b"x" * 4000)))
    second = await dispatcher.acquire(route(one), Wish(demand=Demand(b"x" * 40)))
    choice = second.choice
    assert (choice.deployment, choice.policy) == ("deployment-1", "least_tokens")
    assert choice.chosen == second.worker.name != first.worker.name
    assert {told.worker: (told.load, told.work) for told in choice.candidates} == {
        first.worker.name: (1, 1000),
        second.worker.name: (0, 0),
    }
