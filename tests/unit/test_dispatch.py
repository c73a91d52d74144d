"""Leases, queue and load, on a fleet without a database: only its views are given."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import replace

import pytest

from inference.dispatch.breaker import OPEN_SECONDS
from inference.dispatch.demand import BLOCK_BYTES, Demand
from inference.dispatch.dispatcher import Dispatcher
from inference.dispatch.fleet import Fleet
from inference.dispatch.leases import FADE_SECONDS, FRESH_SECONDS, Tally
from inference.dispatch.queue import Wish
from inference.dispatch.views import DeploymentView, RouteView, Timeouts, WorkerView
from inference.errors import NoCapacity, NoWorker
from inference.protocol import Load


def worker(worker_id: int, **facts) -> WorkerView:
    defaults = {
        "id": worker_id,
        "epoch": 1,
        "name": f"worker-{worker_id}",
        "node_name": "node",
        "deployment_id": 1,
        "deployment_name": "deployment",
        "engine": "simulated",
        "revision_id": 1,
        "url": "http://127.0.0.1:9",
        "secret": "secret",
        "slots": 1,
        "capabilities": frozenset(),
        "running": 0,
        "waiting": 0,
        "kv_use": 0.0,
        "speed": 0.0,
        "reported_at": float("-inf"),
    }
    return WorkerView(**defaults | facts)


def deployment(deployment_id: int, *workers: WorkerView, **facts) -> DeploymentView:
    defaults = {
        "id": deployment_id,
        "name": f"deployment-{deployment_id}",
        "engine": "simulated",
        "policy": "shortest_queue",
        "queue_limit": 4,
        "queue_seconds": 5.0,
        "context_length": 1000,
        "workers": workers,
    }
    return DeploymentView(**defaults | facts)


class KnownFleet(Fleet):
    """A fleet that is told what it sees."""

    async def look(self) -> None:
        """There is nothing else to see."""

    def see(self, *deployments: DeploymentView) -> None:
        now = time.monotonic()
        seen = {view.id for each in deployments for view in each.workers}
        self._deployments = {each.id: each for each in deployments}
        for each in deployments:
            for view in each.workers:
                if view.id not in self.tallies or self.tallies[view.id].worker.epoch != view.epoch:
                    self.tallies[view.id] = Tally(view)
                self.tallies[view.id].refresh(view, now)
        for gone in self.tallies.keys() - seen:
            del self.tallies[gone]
        self._age(now)


def route(*targets: DeploymentView | tuple[DeploymentView, int]) -> RouteView:
    pairs = tuple(target if isinstance(target, tuple) else (target, 1) for target in targets)
    return RouteView(name="route", targets=pairs)


@pytest.fixture
def fleet() -> KnownFleet:
    return KnownFleet()


@pytest.fixture
def dispatcher(fleet: KnownFleet) -> Dispatcher:
    return Dispatcher(fleet)


async def queued(dispatcher: Dispatcher, count: int, deployment_id: int = 1) -> None:
    async with asyncio.timeout(2):
        while dispatcher.waiting(deployment_id) != count:  # noqa: ASYNC110 - polled, with a deadline
            await asyncio.sleep(0)


async def test_a_free_slot_is_leased_without_waiting(fleet, dispatcher):
    one = deployment(1, worker(1))
    fleet.see(one)
    lease = await dispatcher.acquire(route(one))
    assert lease.worker.id == 1
    assert lease.queue_seconds == 0
    assert fleet.tallies[1].leases == 1
    lease.release()
    lease.release()
    assert fleet.tallies[1].leases == 0


async def test_never_more_leases_than_slots_and_first_come_first_served(fleet, dispatcher):
    one = deployment(1, worker(1, slots=2), queue_limit=50)
    fleet.see(one)
    running = 0
    most = 0
    order = []

    async def request(number: int) -> None:
        nonlocal running, most
        lease = await dispatcher.acquire(route(one))
        order.append(number)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        lease.release()

    await asyncio.gather(*(request(number) for number in range(40)))
    assert most == 2
    assert order == list(range(40))
    assert fleet.tallies[1].leases == 0
    assert dispatcher.waiting(1) == 0


async def test_the_queue_is_served_by_rank_and_then_in_order(fleet, dispatcher):
    one = deployment(1, worker(1), queue_limit=50)
    fleet.see(one)
    held = await dispatcher.acquire(route(one))
    served: list[int] = []

    async def wait(number: int, rank: int) -> None:
        lease = await dispatcher.acquire(route(one), Wish(rank=rank))
        served.append(number)
        lease.release()

    ranks = [2, 1, 0, 2, 1, 0, 1]
    tasks = [asyncio.create_task(wait(number, rank)) for number, rank in enumerate(ranks)]
    await queued(dispatcher, len(ranks))
    held.release()
    await asyncio.gather(*tasks)
    assert served == [2, 5, 1, 4, 6, 0, 3]


async def test_nobody_overtakes_the_queue(fleet, dispatcher):
    one = deployment(1, worker(1))
    fleet.see(one)
    first = await dispatcher.acquire(route(one))
    waiting = asyncio.create_task(dispatcher.acquire(route(one)))
    await queued(dispatcher, 1)
    first.release()
    # The waiting one has the slot now, although its task has not run since.
    late = asyncio.create_task(dispatcher.acquire(route(one)))
    lease = await waiting
    assert lease.queue_seconds > 0
    assert not late.done()
    lease.release()
    (await late).release()


async def test_a_client_that_leaves_the_queue_leaves_no_trace(fleet, dispatcher):
    one = deployment(1, worker(1))
    fleet.see(one)
    held = await dispatcher.acquire(route(one))
    leaver = asyncio.create_task(dispatcher.acquire(route(one)))
    stayer = asyncio.create_task(dispatcher.acquire(route(one)))
    await queued(dispatcher, 2)
    leaver.cancel()
    held.release()
    # The slot went past the one that is being cancelled.
    (await stayer).release()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    assert dispatcher.waiting(1) == 0
    assert fleet.tallies[1].leases == 0


async def test_a_slot_granted_to_a_client_that_leaves_in_the_same_moment_is_given_back(fleet, dispatcher):
    one = deployment(1, worker(1))
    fleet.see(one)
    held = await dispatcher.acquire(route(one))
    leaver = asyncio.create_task(dispatcher.acquire(route(one)))
    await queued(dispatcher, 1)
    held.release()
    leaver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    assert fleet.tallies[1].leases == 0
    (await dispatcher.acquire(route(one))).release()


async def test_a_full_queue_refuses_with_a_jittered_retry_after(fleet, dispatcher):
    one = deployment(1, worker(1), queue_limit=1)
    fleet.see(one)
    held = await dispatcher.acquire(route(one))
    waiting = asyncio.create_task(dispatcher.acquire(route(one)))
    await queued(dispatcher, 1)
    pauses = set()
    for _ in range(5):
        with pytest.raises(NoCapacity, match="full") as refused:
            await dispatcher.acquire(route(one))
        pauses.add(refused.value.retry_after)
    assert len(pauses) == 5
    assert all(1 <= pause <= 3 for pause in pauses)
    assert dispatcher.refused == {"no_worker": 0, "full": 5, "deadline": 0}
    held.release()
    (await waiting).release()


async def test_the_deadline_in_the_queue_is_no_capacity(fleet, dispatcher):
    one = deployment(1, worker(1), queue_seconds=0.05)
    fleet.see(one)
    held = await dispatcher.acquire(route(one))
    with pytest.raises(NoCapacity, match="was free"):
        await dispatcher.acquire(route(one))
    assert dispatcher.waiting(1) == 0
    assert dispatcher.refused == {"no_worker": 0, "full": 0, "deadline": 1}
    held.release()
    assert fleet.tallies[1].leases == 0


async def test_without_a_live_worker_nobody_waits(fleet, dispatcher):
    one = deployment(1)
    fleet.see(one)
    with pytest.raises(NoWorker, match="No worker serves the model `route` now"):
        await dispatcher.acquire(route(one))
    with pytest.raises(NoWorker):
        await dispatcher.acquire(RouteView(name="empty", targets=()))
    assert dispatcher.refused == {"no_worker": 2, "full": 0, "deadline": 0}


async def test_while_a_replacement_starts_requests_wait_for_it(fleet, dispatcher):
    one = deployment(1, starts_in=3.0, queue_limit=2)
    fleet.see(one)
    waiting = [asyncio.create_task(dispatcher.acquire(route(one))) for _ in range(2)]
    await queued(dispatcher, 2)
    with pytest.raises(NoCapacity, match="full"):
        await dispatcher.acquire(route(one))
    fleet.see(replace(one, workers=(worker(1, slots=2),), starts_in=0.0))
    assert {(await each).worker.id for each in waiting} == {1}


async def test_for_a_replacement_nobody_waits_longer_than_for_a_busy_worker(fleet, dispatcher):
    fleet.see(deployment(1, starts_in=0.0, queue_seconds=0.05))
    with pytest.raises(NoCapacity, match="was free"):
        await dispatcher.acquire(route(deployment(1)))
    assert dispatcher.waiting(1) == 0


async def test_one_that_starts_too_late_is_not_waited_for_and_the_client_is_told_when(fleet, dispatcher):
    one = deployment(1, starts_in=40.0, queue_seconds=30.0)
    fleet.see(one)
    with pytest.raises(NoWorker) as refused:
        await dispatcher.acquire(route(one))
    assert refused.value.retry_after == 40.0
    patient = replace(route(one), timeouts=Timeouts(queue=60.0))
    waiting = asyncio.create_task(dispatcher.acquire(patient))
    await queued(dispatcher, 1)
    waiting.cancel()


async def test_whose_worker_has_died_of_it_or_with_it_does_not_wait_for_the_next(fleet, dispatcher):
    one = deployment(1, starts_in=0.0)
    fleet.see(one)
    with pytest.raises(NoCapacity) as refused:
        await dispatcher.acquire(route(one), Wish(avoid=frozenset({1})))
    assert not isinstance(refused.value, NoWorker), "one is about to serve"
    assert dispatcher.waiting(1) == 0


async def test_a_worker_that_becomes_ready_serves_those_that_wait(fleet, dispatcher):
    one = deployment(1, worker(1))
    fleet.see(one)
    held = await dispatcher.acquire(route(one))
    waiting = asyncio.create_task(dispatcher.acquire(route(one)))
    await queued(dispatcher, 1)
    fleet.see(replace(one, workers=(worker(1), worker(2))))
    assert (await waiting).worker.id == 2
    held.release()


async def test_a_worker_that_ends_keeps_no_lease_from_being_given_back(fleet, dispatcher):
    one = deployment(1, worker(1))
    fleet.see(one)
    held = await dispatcher.acquire(route(one))
    fleet.see(replace(one, workers=(worker(2),)))
    # `one` is an old view: what it names has ended, and the newest view is what counts.
    assert (await dispatcher.acquire(route(one))).worker.id == 2
    held.release()


async def test_workers_that_failed_this_request_are_avoided(fleet, dispatcher):
    one = deployment(1, worker(1, slots=9), worker(2, slots=9))
    fleet.see(one)
    for _ in range(8):
        assert (await dispatcher.acquire(route(one), Wish(avoid=frozenset({1})))).worker.id == 2
    with pytest.raises(NoCapacity):
        await dispatcher.acquire(route(one), Wish(avoid=frozenset({1, 2})))


async def test_only_a_worker_that_honours_what_is_needed_is_leased(fleet, dispatcher):
    one = deployment(1, worker(1), worker(2, capabilities=frozenset({"seed", "stop"})))
    fleet.see(one)
    lease = await dispatcher.acquire(route(one), Wish(needs=frozenset({"seed"})))
    assert lease.worker.id == 2
    choosy = asyncio.create_task(dispatcher.acquire(route(one), Wish(needs=frozenset({"seed"}))))
    await queued(dispatcher, 1)
    # Worker 1 is free: the choosy one does not hold up the next.
    (await dispatcher.acquire(route(one))).release()
    lease.release()
    (await choosy).release()
    with pytest.raises(NoCapacity):
        await dispatcher.acquire(route(one), Wish(needs=frozenset({"never"})))


async def test_while_nothing_is_free_those_who_wait_are_not_looked_at(fleet, dispatcher, monkeypatch):
    one = deployment(1, worker(1, capabilities=frozenset({"endpoint:chat"})), queue_limit=50)
    fleet.see(one)
    wish = Wish(needs=frozenset({"endpoint:chat"}))
    held = await dispatcher.acquire(route(one), wish)
    waiting = [asyncio.create_task(dispatcher.acquire(route(one), wish)) for _ in range(50)]
    await queued(dispatcher, 50)
    looked = 0
    free = dispatcher._free

    def counted(*args):
        nonlocal looked
        looked += 1
        return free(*args)

    monkeypatch.setattr(dispatcher, "_free", counted)
    fleet.note_load(1, Load(running=1))
    assert looked == 0
    held.release()
    assert looked == 1
    (await waiting[0]).release()
    assert looked == 2
    for task in waiting[1:]:
        task.cancel()
    await asyncio.gather(*waiting[1:], return_exceptions=True)
    assert fleet.tallies[1].leases == 0


async def test_what_one_worker_has_in_its_cache_is_no_discount_at_the_next(fleet, dispatcher):
    first = deployment(1, worker(1), worker(2), policy="prefix_affinity")
    second = deployment(2, worker(3, deployment_id=2))
    fleet.see(first, second)
    body = b"x" * 4 * BLOCK_BYTES
    (await dispatcher.acquire(route(first), Wish(demand=Demand(body)))).release()
    demand = Demand(body)
    lease = await dispatcher.acquire(route(first), Wish(demand=demand))
    assert lease.choice.cached_tokens > 0
    lease.release()
    other = await dispatcher.acquire(route(second), Wish(demand=demand, avoid=frozenset({1, 2})))
    assert other.choice.cached_tokens == 0
    assert fleet.tallies[3].work == demand.work()


async def test_traffic_is_shared_by_weight_among_deployments_with_a_free_worker(fleet, dispatcher):
    big, small = deployment(1, worker(1, slots=9)), deployment(2, worker(2, slots=9, deployment_id=2))
    fleet.see(big, small)
    both = route((big, 3), (small, 1))
    chosen = Counter()
    for _ in range(2000):
        lease = await dispatcher.acquire(both)
        chosen[lease.worker.id] += 1
        lease.release()
    assert 0.70 < chosen[1] / 2000 < 0.80
    fleet.see(replace(big, workers=()), small)
    assert (await dispatcher.acquire(both)).worker.id == 2


async def test_when_all_are_saturated_the_first_that_is_freed_serves_whatever_its_deployment(
    fleet, dispatcher
):
    big, small = deployment(1, worker(1)), deployment(2, worker(2, deployment_id=2))
    fleet.see(big, small)
    both = route((big, 3), (small, 1))
    held = {lease.worker.id: lease for lease in [await dispatcher.acquire(both) for _ in range(2)]}
    waiting = asyncio.create_task(dispatcher.acquire(both))
    await queued(dispatcher, 1, deployment_id=1)
    await queued(dispatcher, 1, deployment_id=2)
    held[2].release()
    assert (await waiting).worker.id == 2
    assert dispatcher.waiting(1) == dispatcher.waiting(2) == 0
    held[1].release()


async def test_an_unreachable_worker_gets_nothing_until_a_newer_beat(fleet, dispatcher):
    one = deployment(1, worker(1, slots=9))
    fleet.see(one)
    fleet.mark_unreachable(one.workers[0])
    with pytest.raises(NoCapacity):
        await dispatcher.acquire(route(one))
    # The same old report again is no news.
    fleet.see(replace(one, workers=(worker(1, slots=9, reported_at=time.monotonic() - 3),)))
    with pytest.raises(NoCapacity):
        await dispatcher.acquire(route(one))
    fleet.note_load(1, Load())
    (await dispatcher.acquire(route(one))).release()


async def test_an_unreachable_worker_comes_back_with_its_next_epoch(fleet, dispatcher):
    one = deployment(1, worker(1))
    fleet.see(one)
    fleet.mark_unreachable(one.workers[0])
    fleet.see(replace(one, workers=(worker(1, epoch=2),)))
    (await dispatcher.acquire(route(one))).release()


async def test_the_others_load_counts_and_ours_is_not_counted_twice(fleet, dispatcher):
    one = deployment(1, worker(1, slots=4))
    fleet.see(one)
    leases = [await dispatcher.acquire(route(one)) for _ in range(2)]
    fleet.note_load(1, Load(running=2, waiting=1))
    # Of the three reported two are ours.
    assert fleet.tallies[1].load == 3
    leases.append(await dispatcher.acquire(route(one)))
    waiting = asyncio.create_task(dispatcher.acquire(route(one)))
    await queued(dispatcher, 1)
    fleet.note_load(1, Load(running=3))
    leases.append(await waiting)
    for lease in leases:
        lease.release()


async def test_a_report_from_before_our_requests_ended_does_not_fill_an_idle_worker(fleet, dispatcher):
    one = deployment(1, worker(1, slots=1))
    fleet.see(one)
    (await dispatcher.acquire(route(one))).release()
    # Written while our request ran, read after it ended.
    fleet.see(replace(one, workers=(worker(1, running=1, reported_at=time.monotonic()),)))
    (await dispatcher.acquire(route(one))).release()


def test_an_old_report_loses_weight_and_then_all_of_it():
    now = 1000.0
    tally = Tally(worker(1, slots=4))
    tally.report(Load(running=4), now, now)
    assert not tally.free
    tally.age(now + FRESH_SECONDS)
    assert tally.load == 4
    tally.age(now + FRESH_SECONDS + FADE_SECONDS / 2)
    assert tally.load == 2
    tally.age(now + FRESH_SECONDS + FADE_SECONDS)
    assert tally.load == 0


def test_snapshots_in_quick_succession_forget_nothing_of_our_requests():
    now = 1000.0
    tally = Tally(worker(1, slots=4))
    for _ in range(3):
        tally.take(1)
    tally.age(now)
    for _ in range(3):
        tally.give_back(1)
    for step in range(1, 40):
        tally.age(now + 0.05 * step)
    # Of a moment after they had ended; up to a second older.
    tally.report(Load(running=3), now + 0.9, now + 2)
    assert tally.load == 0


def test_a_full_kv_cache_saturates_a_worker_with_free_slots():
    tally = Tally(worker(1, slots=4))
    tally.report(Load(running=1, kv_use=0.95), 1000.0, 1000.0)
    assert not tally.free
    assert tally.reachable
    tally.report(Load(running=1, kv_use=0.94), 1001.0, 1001.0)
    assert tally.free


def test_an_older_report_never_replaces_a_newer_one():
    tally = Tally(worker(1, slots=4))
    tally.report(Load(running=3), 1000.0, 1000.0)
    tally.report(Load(running=0), 999.0, 1000.0)
    assert tally.load == 3


def test_a_worker_view_never_shows_its_secret():
    assert "secret" not in repr(worker(1, secret="secret"))


# -- breakers


def fail_often(lease) -> None:
    while not lease.failed():
        pass
    lease.release()


async def test_a_worker_that_fails_often_is_left_alone_while_there_are_others(fleet, dispatcher):
    both = deployment(1, worker(1, slots=9), worker(2, slots=9))
    fleet.see(both)
    fail_often(await dispatcher.acquire(route(both), Wish(avoid=frozenset({2}))))
    leases = [await dispatcher.acquire(route(both)) for _ in range(9)]
    assert {lease.worker.id for lease in leases} == {2}
    waiting = asyncio.create_task(dispatcher.acquire(route(both)))
    await queued(dispatcher, 1)
    leases.pop().release()
    assert (await waiting).worker.id == 2, "better to wait a moment than to be failed"


async def test_the_last_worker_is_asked_however_often_it_fails(fleet, dispatcher):
    both = deployment(1, worker(1, slots=9), worker(2, slots=9))
    fleet.see(both)
    fail_often(await dispatcher.acquire(route(both), Wish(avoid=frozenset({2}))))
    assert (await dispatcher.acquire(route(both), Wish(avoid=frozenset({2})))).worker.id == 1
    fail_often(await dispatcher.acquire(route(both), Wish(avoid=frozenset({1}))))
    assert (await dispatcher.acquire(route(both))).worker.id in (1, 2)


async def test_one_that_succeeds_as_a_probe_gets_all_again(fleet, dispatcher, monkeypatch):
    both = deployment(1, worker(1, slots=9), worker(2, slots=2))
    fleet.see(both)
    fail_often(await dispatcher.acquire(route(both), Wish(avoid=frozenset({2}))))
    now = time.monotonic() + OPEN_SECONDS
    monkeypatch.setattr(fleet.tallies[1].breaker, "_clock", lambda: now)
    others = [await dispatcher.acquire(route(both), Wish(avoid=frozenset({1}))) for _ in range(2)]
    probe = await dispatcher.acquire(route(both))
    assert probe.worker.id == 1
    waiting = asyncio.create_task(dispatcher.acquire(route(both)))
    await queued(dispatcher, 1)
    probe.succeeded()
    probe.release()
    assert (await waiting).worker.id == 1
    assert (await dispatcher.acquire(route(both))).worker.id == 1
    assert len(others) == 2
