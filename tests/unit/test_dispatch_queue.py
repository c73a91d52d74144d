"""Whose turn it is: classes, shares of projects, patience, and what those who are refused are told."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from inference.dispatch.demand import Demand
from inference.dispatch.queue import LONGEST_RETRY_SECONDS, PATIENCE_SECONDS, Queue, Waiter, Wish
from tests.cost import cpu_seconds


class Clock:
    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> Queue:
    return Queue(clock)


def wait(queue: Queue, clock: Clock, *, tokens: int = 100, **wish) -> Waiter:
    waiter = Waiter(Wish(demand=Demand(b"x" * 4 * tokens), **wish))
    waiter.since = clock.now
    queue.add(waiter)
    waiter.queues.append(queue)
    return waiter


def serve(queue: Queue) -> Waiter:
    first = next(iter(queue.in_order()))
    queue.note_grant(first)
    first.leave()
    return first


def projects_served(queue: Queue, times: int) -> list[int]:
    return [serve(queue).wish.project for _ in range(times)]


async def test_a_project_with_many_requests_does_not_hold_up_one_with_few(queue, clock):
    for _ in range(20):
        wait(queue, clock, project=1)
    for _ in range(3):
        wait(queue, clock, project=2)
    served = projects_served(queue, 7)
    assert served.count(2) == 3, served
    assert projects_served(queue, 16) == [1] * 16


async def test_projects_share_by_tokens_not_by_requests(queue, clock):
    for _ in range(40):
        wait(queue, clock, project=1, tokens=1000)
        wait(queue, clock, project=2, tokens=100)
    served = Counter(projects_served(queue, 33))
    assert served[2] == pytest.approx(10 * served[1], abs=3)


async def test_who_was_away_has_saved_up_no_turns(queue, clock):
    for _ in range(30):
        wait(queue, clock, project=1)
    projects_served(queue, 20)
    for _ in range(10):
        wait(queue, clock, project=2)
    served = projects_served(queue, 10)
    assert 4 <= served.count(1) <= 6, served


async def test_within_a_project_first_come_first_served(queue, clock):
    waiters = [wait(queue, clock, project=1, tokens=tokens) for tokens in (500, 1, 30)]
    assert [serve(queue) for _ in waiters] == waiters


async def test_the_more_urgent_class_is_served_first(queue, clock):
    batch = wait(queue, clock, rank=2, project=1)
    default = wait(queue, clock, rank=1, project=1)
    interactive = wait(queue, clock, rank=0, project=1)
    assert [serve(queue) for _ in range(3)] == [interactive, default, batch]


async def test_nobody_waits_for_ever_behind_more_urgent_requests(queue, clock):
    """One a tenth of a second is served, and two more urgent ones come: the queue only grows."""
    came = clock.now
    batch = wait(queue, clock, rank=2, project=1)
    while True:
        for _ in range(2):
            wait(queue, clock, rank=0, project=2)
        clock.now += 0.1
        if serve(queue) is batch:
            break
        assert clock.now - came < 60
    assert 2 * PATIENCE_SECONDS <= clock.now - came < 2 * PATIENCE_SECONDS + 0.5


async def test_an_idle_queue_forgets_shares(queue, clock):
    for _ in range(10):
        wait(queue, clock, project=1)
    projects_served(queue, 10)
    first = wait(queue, clock, project=1)
    wait(queue, clock, project=2)
    assert serve(queue) is first


async def test_those_refused_are_told_the_time_that_the_queue_takes(queue, clock):
    for _ in range(60):
        wait(queue, clock)
    for _ in range(20):
        clock.now += 0.25
        serve(queue)
    told = [queue.retry_after() for _ in range(200)]
    # 40 wait, four are served in a second.
    assert 7 < min(told) < 8.5 < 11 < max(told) < 13
    assert len(set(told)) > 100


async def test_what_they_are_told_is_bounded(queue, clock):
    wait(queue, clock)
    assert 1 <= queue.retry_after() <= 3, "nothing is known yet"
    for _ in range(500):
        wait(queue, clock)
    for _ in range(2):
        clock.now += 20
        serve(queue)
    assert queue.retry_after() <= 1.25 * LONGEST_RETRY_SECONDS
    clock.now += 1000
    assert queue.retry_after() <= 3, "the pace of long ago says nothing"


async def test_who_waits_long_with_many_gets_no_more_than_his_share(queue, clock):
    """A project that has so many waiting that each of them waits for longer than its patience."""
    served = Counter()
    for _ in range(400):
        while sum(waiter.wish.project == 1 for waiter in queue._waiters) < 90:
            wait(queue, clock, project=1)
        while sum(waiter.wish.project == 2 for waiter in queue._waiters) < 4:
            wait(queue, clock, project=2)
        clock.now += 0.1
        served[serve(queue).wish.project] += 1
    assert served[1] == pytest.approx(served[2], rel=0.05)


async def test_a_full_queue_is_shared(queue, clock):
    many = [wait(queue, clock, project=1) for _ in range(10)]
    assert queue.make_room(Wish(project=2))
    assert many[-1].future.exception().retry_after > 0
    assert many[-1].sent_away
    assert len(queue) == 9
    for _ in range(4):
        wait(queue, clock, project=2)
    assert queue.make_room(Wish(project=2)), "nine and four"
    assert not queue.make_room(Wish(project=1)), "it has the most itself"
    for _ in range(3):
        wait(queue, clock, project=2)
    assert not queue.make_room(Wish(project=2)), "eight and seven"
    assert served_fairly(queue)


def served_fairly(queue: Queue) -> bool:
    """Those sent away are not counted as served."""
    return 3 <= projects_served(queue, 8).count(1) <= 5


async def test_nobody_more_urgent_is_sent_away(queue, clock):
    urgent = [wait(queue, clock, project=1, rank=0) for _ in range(5)]
    assert not queue.make_room(Wish(project=2, rank=1))
    lazy = wait(queue, clock, project=1, rank=2)
    wait(queue, clock, project=1, rank=0)
    assert queue.make_room(Wish(project=2, rank=1))
    assert lazy.sent_away
    assert not any(one.future.done() for one in urgent)


async def test_places_in_a_long_queue_are_looked_up_twice_a_second(queue, clock):
    waiters = [wait(queue, clock, project=1) for _ in range(1000)]
    assert queue.place(waiters[700]) == 700
    assert [queue.place(waiter) for waiter in waiters] == list(range(1000))
    took = cpu_seconds(lambda: [queue.place(waiter) for waiter in waiters], enough=0.2)
    assert took < 0.2, "each looked up alone, they would take half a second"
    late = wait(queue, clock, project=1)
    assert queue.place(late) == 1000
    serve(queue)
    clock.now += 0.5
    assert queue.place(waiters[700]) == 699
    for waiter in waiters[1:900]:
        waiter.leave()
    assert len(queue._places) == len(queue) == 101, "nobody is kept who has left"
