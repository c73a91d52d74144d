"""Who is served next when all workers of a deployment are busy."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from inference.dispatch.demand import NO_DEMAND, Demand
from inference.dispatch.leases import Lease
from inference.errors import NoCapacity

PATIENCE_SECONDS = 5.0
"""Who has waited for so long counts as one class more urgent, and again after as long. Of the most urgent
class then, it has the share of its project: nobody waits for ever behind requests that keep coming."""
PACE_SAMPLES = 64
"""Grants that the pace is measured by."""
LONGEST_RETRY_SECONDS = 60.0


class Wish(NamedTuple):
    """What a request asks of dispatch."""

    avoid: frozenset[int] = frozenset()
    """Ids of workers that failed this request already."""
    needs: frozenset[str] = frozenset()
    """Request fields that the worker must honour."""
    rank: int = 1
    """Its class: 0 is the most urgent."""
    project: int = 0
    """Whose share of a busy deployment it uses."""
    demand: Demand = NO_DEMAND


class Waiter:
    """A request in the queues of its route's deployments, until the first of three: a lease, its
    deadline, its client's leaving."""

    __slots__ = ("future", "queues", "since", "tag", "wish")

    def __init__(self, wish: Wish) -> None:
        self.future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self.wish = wish
        self.since = time.monotonic()
        self.tag = 0.0
        self.queues: list[Queue] = []

    def leave(self) -> None:
        for queue in self.queues:
            queue.remove(self)
        self.queues.clear()

    def expire(self) -> None:
        retry = min((queue.retry_after() for queue in self.queues), default=1.0)
        self.leave()
        if not self.future.done():
            waited = time.monotonic() - self.since
            self.future.set_exception(NoCapacity(retry, f"All workers were busy for {waited:.0f} seconds."))


class Queue:
    """Of one deployment. The most urgent class first; within it projects share by the work they ask for,
    however many requests each of them has waiting; within a project first come, first served.

    The sharing is start-time fair queueing (Goyal, Vin and Cheng, 1996): a project's next request starts, on
    the queue's own clock of work, where its last one ended, but not before now.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiters: dict[Waiter, None] = {}
        self._ends: dict[int, float] = {}
        """Where each project's last request ends."""
        self._now = 0.0
        """The start of the request served last."""
        self._granted: deque[float] = deque(maxlen=PACE_SAMPLES)

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, waiter: Waiter) -> None:
        wish = waiter.wish
        waiter.tag = max(self._now, self._ends.get(wish.project, 0.0))
        self._ends[wish.project] = waiter.tag + max(1, wish.demand.work())
        self._waiters[waiter] = None

    def remove(self, waiter: Waiter) -> None:
        self._waiters.pop(waiter, None)
        if not self._waiters:
            # Nobody has a share of what is idle.
            self._ends.clear()
            self._now = 0.0

    def in_order(self) -> Iterable[Waiter]:
        """Those that wait, as they are to be served now."""
        now = self._clock()

        def place(waiter: Waiter) -> tuple[int, float]:
            return max(0, waiter.wish.rank - int((now - waiter.since) / PATIENCE_SECONDS)), waiter.tag

        # Sorting is stable: equals stay in the order in which they came.
        return sorted(self._waiters, key=place)

    def note_grant(self, waiter: Waiter) -> None:
        """It gets a worker."""
        self._now = max(self._now, waiter.tag)
        self._granted.append(self._clock())

    def retry_after(self) -> float:
        """Seconds until those that wait now are probably served, jittered, so that those refused together do
        not come back together."""
        jitter = 0.75 + 0.5 * random.random()  # noqa: S311 - spreads retries, hides nothing
        granted = self._granted
        # The pace of long ago says nothing of now.
        if len(granted) < 2 or (since := self._clock() - granted[0]) > 2 * LONGEST_RETRY_SECONDS:
            return 2.0 * jitter
        per_second = len(granted) / max(since, 0.001)
        return min(max(1.0, len(self._waiters) / per_second), LONGEST_RETRY_SECONDS) * jitter
