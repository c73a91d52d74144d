"""Choosing a worker and taking the lease: the one place where it happens."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from operator import attrgetter

from inference.dispatch.demand import NO_DEMAND, Demand
from inference.dispatch.fleet import Fleet
from inference.dispatch.leases import Lease, Tally
from inference.dispatch.poison import Poison
from inference.dispatch.policies import policy_named
from inference.dispatch.retries import RetryBudget
from inference.dispatch.views import DeploymentView, RouteView
from inference.errors import NoCapacity

logger = logging.getLogger("roundhouse.dispatch")

NOTHING: frozenset[int] = frozenset()
NO_NEEDS: frozenset[str] = frozenset()


class _Waiter:
    """A request in the queues of its route's deployments, until the first of three: a lease, its
    deadline, its client's leaving."""

    __slots__ = ("avoid", "demand", "future", "needs", "queues", "rank", "since")

    def __init__(self, avoid: frozenset[int], needs: frozenset[str], rank: int, demand: Demand) -> None:
        self.future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self.avoid = avoid
        self.needs = needs
        self.rank = rank
        self.demand = demand
        self.since = time.monotonic()
        self.queues: list[OrderedDict[_Waiter, None]] = []

    def leave(self) -> None:
        for queue in self.queues:
            queue.pop(self, None)
        self.queues.clear()

    def expire(self) -> None:
        self.leave()
        if not self.future.done():
            waited = time.monotonic() - self.since
            self.future.set_exception(
                NoCapacity(_retry_after(), f"All workers were busy for {waited:.0f} seconds.")
            )


class Dispatcher:
    """Leases of one gateway process. Everything happens on one event loop."""

    def __init__(self, fleet: Fleet) -> None:
        self.retries = RetryBudget()
        self.poison = Poison()
        self._fleet = fleet
        self._queues: dict[int, OrderedDict[_Waiter, None]] = {}
        fleet.on_refresh(self._serve_all)

    async def acquire(
        self,
        route: RouteView,
        *,
        avoid: frozenset[int] = NOTHING,
        needs: frozenset[str] = NO_NEEDS,
        rank: int = 1,
        demand: Demand = NO_DEMAND,
    ) -> Lease:
        """A lease on a worker of this route; the caller releases it in a `finally`.

        A deployment is drawn by weight among those with a free worker, then a worker by its policy.
        When all are saturated the request waits for the first that is freed: the lowest `rank` first,
        and first come first served among equals.
        `avoid`: ids of workers that failed this request already. `needs`: request fields that the
        worker must honour. `demand`: what it costs, for the policies that care. Raises NoCapacity when
        no live worker could ever take it, when the queues are full, or at the deadline.
        """
        if not avoid:
            self.retries.note_request()
        lease = self._take(route, avoid, needs, demand)
        if lease is not None:
            return lease
        return await self._wait(route, avoid, needs, rank, demand)

    def waiting(self, deployment_id: int) -> int:
        """How many requests wait for this deployment."""
        queue = self._queues.get(deployment_id)
        return len(queue) if queue else 0

    # -- without waiting

    def _take(
        self, route: RouteView, avoid: frozenset[int], needs: frozenset[str], demand: Demand
    ) -> Lease | None:
        targets = route.targets
        if len(targets) == 1:
            deployment = self._fleet.current(targets[0][0])
            free = self._free(deployment, avoid, needs)
            return self._lease(deployment, free, demand, 0.0) if free else None
        choices: list[tuple[DeploymentView, list[Tally], int]] = []
        total = 0
        for target, weight in targets:
            deployment = self._fleet.current(target)
            free = self._free(deployment, avoid, needs)
            if free:
                choices.append((deployment, free, weight))
                total += weight
        drawn = random.random() * total  # noqa: S311 - spreads load, hides nothing
        for deployment, free, weight in choices:
            drawn -= weight
            if drawn < 0:
                return self._lease(deployment, free, demand, 0.0)
        return None

    def _free(self, deployment: DeploymentView, avoid: frozenset[int], needs: frozenset[str]) -> list[Tally]:
        tallies = self._fleet.tallies
        free: list[Tally] = []
        ejected: list[Tally] = []
        for worker in deployment.workers:
            tally = tallies[worker.id]
            if tally.free and worker.id not in avoid and needs <= worker.capabilities:
                (free if tally.trusted else ejected).append(tally)
        if ejected and not free and not self._could_serve(deployment, avoid, needs, trusted=True):
            # A worker that fails often is better than none.
            return ejected
        return free

    def _lease(
        self, deployment: DeploymentView, free: list[Tally], demand: Demand, queue_seconds: float
    ) -> Lease:
        if len(deployment.workers) == 1:
            tally = free[0]
        else:
            # Also where one alone is free: a policy remembers where it sent what.
            tally = policy_named(deployment.policy)(free, demand, random.random)
        return Lease(tally, demand.work(), queue_seconds, self._serve)

    # -- with waiting

    async def _wait(
        self,
        route: RouteView,
        avoid: frozenset[int],
        needs: frozenset[str],
        rank: int,
        demand: Demand,
    ) -> Lease:
        usable = [
            deployment
            for deployment in (self._fleet.current(target) for target, _ in route.targets)
            if self._could_serve(deployment, avoid, needs)
        ]
        if not usable:
            raise NoCapacity(_retry_after(), f"No live worker of {route.name} can take the request.")
        open_to = [one for one in usable if self.waiting(one.id) < one.queue_limit]
        if not open_to:
            raise NoCapacity(_retry_after(), f"The queue of {route.name} is full.")
        waiter = _Waiter(avoid, needs, rank, demand)
        for deployment in open_to:
            queue = self._queues.setdefault(deployment.id, OrderedDict())
            queue[waiter] = None
            waiter.queues.append(queue)
        longest = max(deployment.queue_seconds for deployment in open_to)
        deadline = asyncio.get_running_loop().call_later(longest, waiter.expire)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            # The lease may have been granted in the same moment: nobody else would give it back.
            future = waiter.future
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().release()
            raise
        finally:
            deadline.cancel()
            waiter.leave()

    def _could_serve(
        self,
        deployment: DeploymentView,
        avoid: frozenset[int],
        needs: frozenset[str],
        *,
        trusted: bool = False,
    ) -> bool:
        tallies = self._fleet.tallies
        return any(
            tallies[worker.id].reachable
            and (not trusted or tallies[worker.id].breaker_closed)
            and worker.id not in avoid
            and needs <= worker.capabilities
            for worker in deployment.workers
        )

    def _serve_all(self) -> None:
        """The fleet has changed: new workers, other loads."""
        for deployment_id in self._queues:
            self._serve(deployment_id)

    def _serve(self, deployment_id: int) -> None:
        """Give what is free of this deployment to those that wait, the first first."""
        queue = self._queues.get(deployment_id)
        if not queue:
            return
        deployment = self._fleet.deployment(deployment_id)
        if deployment is None:
            return
        # Sorting is stable: equals stay in the order in which they came.
        for waiter in sorted(queue, key=_RANK):
            if waiter.future.done():
                # Its client left; its task has not run since.
                continue
            free = self._free(deployment, waiter.avoid, waiter.needs)
            if free:
                lease = self._lease(deployment, free, waiter.demand, time.monotonic() - waiter.since)
                waiter.leave()
                waiter.future.set_result(lease)
            elif not waiter.avoid and not waiter.needs:
                # Nothing is free for anybody. (One that is choosy does not hold up those behind it.)
                return


_RANK = attrgetter("rank")


def _retry_after() -> float:
    return 1.0 + 2.0 * random.random()  # noqa: S311 - spreads retries, hides nothing
