"""Who is served next when all workers of a deployment are busy."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import NamedTuple

from inference.dispatch.demand import NO_DEMAND, Demand
from inference.dispatch.leases import Lease
from inference.errors import NoCapacity

PATIENCE_SECONDS = 5.0
"""When one of a class has waited for so long, the class counts as one more urgent, and again after as long.
In it each has the share of its project: nobody waits for ever behind requests that keep coming. (Were those
that wait long favoured one by one, a project with many of them would have more than its share.)"""
PACE_SAMPLES = 64
"""Grants that the pace is measured by."""
LONGEST_RETRY_SECONDS = 60.0
LONG = 200
PLACED_SECONDS = 0.5


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
    last_try: bool = False
    """Where it fails once more it is refused: a fallback is asked rather."""
    told: Callable[[int, float | None], bool] | None = None
    """Called when it begins to wait, and every second while it returns True: how many are served first, and
    in about how many seconds its turn comes (None while that cannot be said)."""


class Waiter:
    """A request in the queues of its route's deployments, until the first of three: a lease, its
    deadline, its client's leaving."""

    __slots__ = ("future", "queues", "sent_away", "since", "tag", "wish", "work")

    def __init__(self, wish: Wish) -> None:
        self.future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self.wish = wish
        self.work = wish.demand.work()
        self.since = time.monotonic()
        self.tag = 0.0
        self.sent_away = False
        self.queues: list[Queue] = []

    def tell(self) -> bool:
        """Say to whom it concerns how far it is, in the queue where it is the furthest. True: it is to be
        told again."""
        if self.wish.told is None or not self.queues:
            return False
        place, queue = min(((queue.place(self), queue) for queue in self.queues), key=itemgetter(0))
        return self.wish.told(place, queue.seconds(place))

    def give_way(self, queue: Queue) -> None:
        """Wait in this queue no longer."""
        queue.remove(self)
        self.queues.remove(queue)
        if not self.queues and not self.future.done():
            self.sent_away = True
            self.future.set_exception(NoCapacity(queue.retry_after(), "The queue is full."))

    def leave(self) -> None:
        for queue in self.queues:
            queue.remove(self)
        self.queues.clear()

    def expire(self) -> None:
        retry = min((queue.retry_after() for queue in self.queues), default=1.0)
        self.leave()
        if not self.future.done():
            waited = time.monotonic() - self.since
            self.future.set_exception(NoCapacity(retry, f"No worker was free for {waited:.0f} seconds."))


class Queue:
    """Of one deployment. The most urgent class first; within it projects share by the work they ask for,
    however many requests each of them has waiting; within a project first come, first served.

    The sharing is start-time fair queueing (Goyal, Vin and Cheng, 1996): a project's next request starts, on
    the queue's own clock of work, where its last one ended, but not before now.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiters: dict[Waiter, None] = {}
        self.work = 0
        """Of all that wait, as `Demand.work` counts."""
        self._ends: dict[int, float] = {}
        """Where each project's last request ends."""
        self._now = 0.0
        """The start of the request served last."""
        self._granted: deque[float] = deque(maxlen=PACE_SAMPLES)
        self._places: dict[Waiter, int] = {}
        self._placed_at = float("-inf")
        """When places were last looked up in a long queue."""

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, waiter: Waiter) -> None:
        wish = waiter.wish
        waiter.tag = max(self._now, self._ends.get(wish.project, 0.0))
        self._ends[wish.project] = waiter.tag + max(1, waiter.work)
        self._waiters[waiter] = None
        self.work += waiter.work

    def remove(self, waiter: Waiter) -> None:
        if waiter in self._waiters:
            del self._waiters[waiter]
            self.work -= waiter.work
            self._places.pop(waiter, None)
        if not self._waiters:
            # Nobody has a share of what is idle.
            self._ends.clear()
            self._now = 0.0

    def in_order(self) -> Iterable[Waiter]:
        """Those that wait, as they are to be served now."""
        now = self._clock()
        classes: dict[int, int] = {}
        for waiter in self._waiters:  # the first of each class has waited longest
            rank = waiter.wish.rank
            if rank not in classes:
                classes[rank] = max(0, rank - int((now - waiter.since) / PATIENCE_SECONDS))
        # Sorting is stable: equals stay in the order in which they came.
        return sorted(self._waiters, key=lambda waiter: (classes[waiter.wish.rank], waiter.tag))

    def make_room(self, wish: Wish) -> bool:
        """A full queue is shared, too: send the newest request of the project with the most in it away, if
        it still has no fewer then than the project of `wish` with this one. None more urgent is sent away."""
        waiting = Counter(waiter.wish.project for waiter in self._waiters)
        if not waiting:
            return False
        project, most = waiting.most_common(1)[0]
        if waiting[wish.project] + 1 >= most:
            return False
        for waiter in reversed(self._waiters):
            if waiter.wish.project == project and waiter.wish.rank >= wish.rank:
                self._ends[project] = max(0.0, self._ends[project] - max(1, waiter.work))
                waiter.give_way(self)
                return True
        return False

    def place(self, waiter: Waiter) -> int:
        """How many of those that wait now are served before it; in a long queue, where each of them asks
        every second, as of half a second ago."""
        if len(self._waiters) <= LONG:
            return next((at for at, one in enumerate(self.in_order()) if one is waiter), 0)
        now = self._clock()
        if now - self._placed_at >= PLACED_SECONDS:
            self._places = {one: at for at, one in enumerate(self.in_order())}
            self._placed_at = now
        return self._places.get(waiter, len(self._waiters) - 1)

    def seconds(self, place: int) -> float | None:
        """In how many seconds the turn of one at this place comes, by the pace of late; None while that
        cannot be said."""
        per_second = self._pace()
        return None if per_second is None else (place + 1) / per_second

    def note_grant(self, waiter: Waiter) -> None:
        """It gets a worker."""
        self._now = max(self._now, waiter.tag)
        self._granted.append(self._clock())

    def retry_after(self) -> float:
        """Seconds until those that wait now are probably served, jittered, so that those refused together do
        not come back together."""
        jitter = 0.75 + 0.5 * random.random()  # noqa: S311 - spreads retries, hides nothing
        per_second = self._pace()
        if per_second is None:
            return 2.0 * jitter
        return min(max(1.0, len(self._waiters) / per_second), LONGEST_RETRY_SECONDS) * jitter

    def _pace(self) -> float | None:
        """Grants per second, of late."""
        granted = self._granted
        # The pace of long ago says nothing of now.
        if len(granted) < 2 or (since := self._clock() - granted[0]) > 2 * LONGEST_RETRY_SECONDS:
            return None
        return len(granted) / max(since, 0.001)
