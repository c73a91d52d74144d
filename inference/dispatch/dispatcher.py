"""Choosing a worker and taking the lease: the one place where it happens."""

from __future__ import annotations

import asyncio
import logging
import random
import time

from inference.dispatch.demand import Demand
from inference.dispatch.explanations import EXPLAINED, Candidate, Choice
from inference.dispatch.fleet import Fleet
from inference.dispatch.leases import Lease, Tally
from inference.dispatch.poison import Poison
from inference.dispatch.policies import policy_named
from inference.dispatch.queue import LONGEST_RETRY_SECONDS, Queue, Waiter, Wish
from inference.dispatch.retries import RetryBudget
from inference.dispatch.views import DeploymentView, RouteView
from inference.errors import NoCapacity, NoWorker

logger = logging.getLogger("roundhouse.dispatch")

NO_WISH = Wish()
TELL_SECONDS = 1.0
"""Who wants to know hears so often how far it is in the queue."""


class Dispatcher:
    """Leases of one gateway process. Everything happens on one event loop."""

    def __init__(self, fleet: Fleet) -> None:
        self.retries = RetryBudget()
        self.poison = Poison()
        self.refused = dict.fromkeys(("no_worker", "full", "deadline"), 0)
        """Requests that got no worker, by reason."""
        self._fleet = fleet
        self._queues: dict[int, Queue] = {}
        fleet.on_refresh(self._serve_all)

    async def acquire(self, route: RouteView, wish: Wish = NO_WISH) -> Lease:
        """A lease on a worker of this route; the caller releases it in a `finally`.

        A deployment is drawn by weight among those of the lowest rank that has a free worker, then a worker
        by its policy. When all are saturated the request waits for the first that is freed, in the order of
        `Queue`. So it does while there is no worker but one is about to be, such as a replacement. Raises
        NoCapacity when no live worker could ever take it (NoWorker where none will come), when the queues are
        full, or at the deadline.
        """
        if not wish.avoid:
            self.retries.note_request()
        lease = self._take(route, wish)
        return lease if lease is not None else await self._wait(route, wish)

    def waiting(self, deployment_id: int) -> int:
        """How many requests wait for this deployment."""
        queue = self._queues.get(deployment_id)
        return 0 if queue is None else len(queue)

    def waiting_work(self, deployment_id: int) -> int:
        """What they ask for, as `Demand.work` counts."""
        queue = self._queues.get(deployment_id)
        return 0 if queue is None else queue.work

    # -- without waiting

    def _take(self, route: RouteView, wish: Wish) -> Lease | None:
        targets = route.targets
        if len(targets) == 1:
            deployment = self._fleet.current(targets[0][0])
            free = self._free(deployment, wish)
            return self._lease(deployment, free, wish.demand, 0.0) if free else None
        ranks = route.ranks or (0,) * len(targets)
        order = sorted(set(ranks))
        if wish.last_try:
            order = [*order[1:], order[0]]
        for rank in order:
            choices: list[tuple[DeploymentView, list[Tally], int]] = []
            total = 0
            for (target, weight), its in zip(targets, ranks, strict=True):
                if its == rank:
                    deployment = self._fleet.current(target)
                    free = self._free(deployment, wish)
                    if free:
                        choices.append((deployment, free, weight))
                        total += weight
            drawn = random.random() * total  # noqa: S311 - spreads load, hides nothing
            for deployment, free, weight in choices:
                drawn -= weight
                if drawn < 0:
                    return self._lease(deployment, free, wish.demand, 0.0)
        return None

    def _free(self, deployment: DeploymentView, wish: Wish) -> list[Tally]:
        tallies, avoid, needs = self._fleet.tallies, wish.avoid, wish.needs
        free: list[Tally] = []
        ejected: list[Tally] = []
        for worker in deployment.workers:
            tally = tallies[worker.id]
            if tally.free and worker.id not in avoid and needs <= worker.capabilities:
                (free if tally.trusted else ejected).append(tally)
        if ejected and not free and not self._could_serve(deployment, wish, trusted=True):
            # A worker that fails often is better than none.
            return ejected
        return free

    def _any_free(self, deployment: DeploymentView) -> bool:
        """Is a slot free, for whomever? Asked for each beat and each release, before anybody who waits is
        looked at."""
        tallies = self._fleet.tallies
        return any(tallies[worker.id].free for worker in deployment.workers)

    def _lease(
        self, deployment: DeploymentView, free: list[Tally], demand: Demand, queue_seconds: float
    ) -> Lease:
        demand.cached_tokens = 0  # by a worker that was chosen before, and failed
        if len(deployment.workers) == 1:
            tally = free[0]
        else:
            # Also where one alone is free: a policy remembers where it sent what.
            tally = policy_named(deployment.policy)(free, demand, random.random)
        choice = Choice(
            deployment.name,
            deployment.policy,
            [Candidate(one.worker.name, one.load, one.work, one.speed) for one in free[:EXPLAINED]],
            tally.worker.name,
            demand.cached_tokens,
        )
        return Lease(tally, demand.work(demand.cached_tokens), queue_seconds, choice, self._serve)

    # -- with waiting

    async def _wait(self, route: RouteView, wish: Wish) -> Lease:
        usable = self._usable(route, wish)
        if not usable:
            await self._fleet.look()
            lease = self._take(route, wish)
            if lease is not None:
                return lease
            usable = self._usable(route, wish)
        if not usable:
            targets = [self._fleet.current(target) for target, _ in route.targets]
            usable = [one for one in targets if _starts_within(one, _patience(route, one))]
            # One whose worker failed it is not kept waiting: its client may have waited for long already.
            if wish.avoid or not usable:
                self.refused["no_worker"] += 1
                retry = 1.0 + 2.0 * random.random()  # noqa: S311 - spreads retries, hides nothing
                if usable or any(one.workers for one in targets):
                    raise NoCapacity(retry, f"No live worker of {route.name} can take the request.")
                later = min((one.starts_in for one in targets if one.starts_in), default=0.0)
                raise NoWorker(
                    min(max(retry, later), LONGEST_RETRY_SECONDS),
                    f"No worker serves the model `{route.name}` now, and none is about to. "
                    "Please try again later.",
                )
        waiter = Waiter(wish)
        open_to = [one for one in usable if self._has_room(one, waiter)]
        if not open_to:
            self.refused["full"] += 1
            soonest = min(self._queues[one.id].retry_after() for one in usable)
            raise NoCapacity(soonest, f"The queue of {route.name} is full.")
        for deployment in open_to:
            queue = self._queues[deployment.id]
            queue.add(waiter)
            waiter.queues.append(queue)
        longest = max(_patience(route, deployment) for deployment in open_to)
        deadline = asyncio.get_running_loop().call_later(longest, waiter.expire)
        try:
            while waiter.tell():
                done, _ = await asyncio.wait([waiter.future], timeout=TELL_SECONDS)
                if done:
                    break
            return await waiter.future
        except NoCapacity:
            self.refused["full" if waiter.sent_away else "deadline"] += 1
            raise
        except asyncio.CancelledError:
            # The lease may have been granted in the same moment: nobody else would give it back.
            future = waiter.future
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().release()
            raise
        finally:
            deadline.cancel()
            waiter.leave()

    def _usable(self, route: RouteView, wish: Wish) -> list[DeploymentView]:
        targets = (self._fleet.current(target) for target, _ in route.targets)
        return [one for one in targets if self._could_serve(one, wish)]

    def _has_room(self, deployment: DeploymentView, waiter: Waiter) -> bool:
        queue = self._queues.setdefault(deployment.id, Queue())
        most = deployment.queue_tokens
        if queue and most is not None and queue.work + waiter.work > most:
            return False
        # Last, for it sends another one away.
        return len(queue) < deployment.queue_limit or queue.make_room(waiter.wish)

    def _could_serve(self, deployment: DeploymentView, wish: Wish, *, trusted: bool = False) -> bool:
        tallies = self._fleet.tallies
        return any(
            tallies[worker.id].reachable
            and (not trusted or tallies[worker.id].breaker_closed)
            and worker.id not in wish.avoid
            and wish.needs <= worker.capabilities
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
        if deployment is None or not self._any_free(deployment):
            return
        for waiter in queue.in_order():
            if waiter.future.done():
                # Its client left; its task has not run since.
                continue
            wish = waiter.wish
            free = self._free(deployment, wish)
            if free:
                lease = self._lease(deployment, free, wish.demand, time.monotonic() - waiter.since)
                queue.note_grant(waiter)
                waiter.leave()
                waiter.future.set_result(lease)
                if not self._any_free(deployment):
                    return
            # else: it is choosy, which does not hold up those behind it


def _patience(route: RouteView, deployment: DeploymentView) -> float:
    return route.timeouts.queue or deployment.queue_seconds


def _starts_within(deployment: DeploymentView, seconds: float) -> bool:
    return deployment.starts_in is not None and deployment.starts_in <= seconds
