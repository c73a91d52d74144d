"""The gateway's picture of the fleet: polled from the database, kept while the database is away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, cast

from django.conf import settings
from django.db import models
from django.db.models.functions import Now

from inference.dispatch.leases import Tally
from inference.dispatch.views import DeploymentView, RouteView, Timeouts, WorkerView
from inference.protocol import BeatOrder, Load
from inference.reconcile import next_start, read_facts, read_wishes
from registry.adapters import adapters_of
from registry.keys import worker_secret
from registry.models import Change, Deployment, Route, RouteTarget, Worker
from registry.querysets import database_now
from registry.states import WORKER_LIVE, WORKER_TERMINAL, WorkerState
from registry.threads import read_from_database

logger = logging.getLogger("roundhouse.fleet")

POLL_SECONDS = 0.5
LOOK_SECONDS = 0.1
"""What a poll said is new enough for so long to refuse a request by it."""
STRUCTURE_SECONDS = 10.0
"""Routes and deployments are read again after this long even if the change feed is silent."""
CHANGE_WINDOW_SECONDS = 15.0
"""How far back each poll reads the change feed: rows of slow transactions become visible late, and
out of the order of their ids."""
OVERDUE_SECONDS = 3.0
"""A poll that hangs for this long counts as the database being away."""
FORGET_ALL = "*"
"""The key that subscribers get when changes may have been missed: any object may have changed."""
STRUCTURE_KINDS = frozenset({"deployment", "route", "language_model"})
MAX_ENDED = 10_000
"""Ended workers remembered, the oldest forgotten first; a forgotten one is asked for again."""


@dataclass(frozen=True, slots=True)
class _WorkerRow:
    """A worker as the database has it, and the clock there when it was read."""

    worker: Worker
    read_at: datetime


@dataclass(frozen=True, slots=True)
class _Structure:
    deployments: dict[int, DeploymentView]
    """Without workers."""
    routes: dict[str, _Route]


@dataclass(frozen=True, slots=True)
class _Route:
    continues: bool
    timeouts: Timeouts
    targets: list[tuple[int, int, int]]
    """Deployment id, weight and rank of each, the lowest rank first."""


@dataclass(frozen=True, slots=True)
class _Reading:
    changes: list[tuple[int, str, str]]
    structure: _Structure | None
    workers: list[_WorkerRow]
    starts_in: dict[int, float]
    """For deployments that have no worker, or will have none: see `DeploymentView`."""


class Fleet:
    """Workers, deployments and routes as of half a second ago. One event loop owns it.

    While the database is away everything answers from the last snapshot.
    """

    def __init__(self, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._poll_seconds = poll_seconds
        self.tallies: dict[int, Tally] = {}
        """Load by worker id; every worker in a view has one."""
        self._routes: dict[str, RouteView] = {}
        self._deployments: dict[int, DeploymentView] = {}
        self._structure = _Structure({}, {})
        self._structure_at = float("-inf")
        self._live: dict[int, tuple[int, str]] = {}
        """Epoch and state of live workers, by id."""
        self._ended: dict[int, None] = {}
        self._unknown: set[int] = set()
        """Ids of workers that beat and are in no snapshot: the next poll asks for them."""
        self._seen_changes: set[int] = set()
        self._subscribers: dict[str, list[Callable[[str], None]]] = {}
        self._refreshed: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._polling = asyncio.Lock()
        self._look: asyncio.Task[None] | None = None
        self._answered_at: float | None = None
        """When the last poll that worked ended."""
        self._started_at = time.monotonic()
        self._away = False

    # -- life

    async def start(self) -> None:
        """Take the first snapshot and poll from then on. If the database does not answer, it goes on
        trying in the background."""
        if self._task is None:
            self._started_at = time.monotonic()
            await self.poll()
            self._task = asyncio.create_task(self._poll_forever(), name="fleet")

    async def stop(self) -> None:
        for task in (self._task, self._look):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        self._task = self._look = None

    # -- questions

    @property
    def routes(self) -> Mapping[str, RouteView]:
        """Every enabled route by name."""
        return self._routes

    @property
    def deployments(self) -> Iterable[DeploymentView]:
        """Every deployment."""
        return self._deployments.values()

    @property
    def states(self) -> Mapping[str, int]:
        """How many live workers there are in each state."""
        return Counter(state for _, state in self._live.values())

    def route(self, name: str) -> RouteView | None:
        """The enabled route of that name."""
        return self._routes.get(name)

    def deployment(self, deployment_id: int) -> DeploymentView | None:
        return self._deployments.get(deployment_id)

    def current(self, deployment: DeploymentView) -> DeploymentView:
        """The newest view of a deployment; one that was deleted has no workers any more."""
        found = self._deployments.get(deployment.id)
        return found if found is not None else replace(deployment, workers=())

    def is_gone(self, worker_id: int) -> bool:
        """It was silent for so long that it counts as lost, or it has ended."""
        known = self._live.get(worker_id)
        return worker_id in self._ended if known is None else known[1] == WorkerState.LOST

    def order(self, worker_id: int, epoch: int) -> BeatOrder:
        """What to answer a worker's beat. EXIT only when the database has said that this epoch is over:
        a worker that no snapshot has yet goes on, and the next poll asks for it."""
        known = self._live.get(worker_id)
        if known is not None:
            live_epoch, state = known
            if epoch != live_epoch:
                return BeatOrder.EXIT
            return BeatOrder.DRAIN if state == WorkerState.DRAINING else BeatOrder.CONTINUE
        if worker_id in self._ended:
            return BeatOrder.EXIT
        self._unknown.add(worker_id)
        return BeatOrder.CONTINUE

    @property
    def database_away_seconds(self) -> float:
        """For how long the database has not answered; 0 when the last poll worked."""
        now = time.monotonic()
        since = self._answered_at if self._answered_at is not None else self._started_at
        if self._away or now - since > max(OVERDUE_SECONDS, 3 * self._poll_seconds):
            return now - since
        return 0.0

    # -- news

    def note_load(self, worker_id: int, load: Load) -> None:
        """A beat that this process heard itself: fresher than the database."""
        tally = self.tallies.get(worker_id)
        if tally is not None:
            now = time.monotonic()
            tally.report(load, now, now)
            self._tell_refreshed()

    def mark_unreachable(self, worker: WorkerView) -> None:
        """No connection could be made: it gets nothing until a newer beat of it, or its next epoch."""
        tally = self.tallies.get(worker.id)
        if tally is not None and tally.worker.epoch == worker.epoch:
            tally.mark_unreachable(time.monotonic())
            logger.warning(
                "event=worker_unreachable %s cannot be reached; it gets no request until its next beat",
                worker.name,
                extra={"event": "worker_unreachable", "worker_id": worker.id},
            )

    def subscribe(self, kind: str, callback: Callable[[str], None]) -> None:
        """Call `callback(key)` within a second after an object of this kind changed anywhere.

        The key `FORGET_ALL` means that changes may have been missed: any of them may have changed.
        """
        self._subscribers.setdefault(kind, []).append(callback)

    def on_refresh(self, callback: Callable[[], None]) -> None:
        """Call back after each change of workers or loads."""
        self._refreshed.append(callback)

    # -- polling

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            await self.poll()

    async def look(self) -> None:
        """Poll now, for who finds no worker: one may have become ready in the meantime. All who ask at once
        share an answer. Returns within half a second, at once while the database is away or the last snapshot
        is quite new."""
        if self._away or time.monotonic() - (self._answered_at or 0.0) < LOOK_SECONDS:
            return
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(self.poll(), name="fleet-look")
        await asyncio.wait([self._look], timeout=POLL_SECONDS)

    async def poll(self) -> None:
        """Read the database once and take over what it says. Never raises for what goes wrong there."""
        async with self._polling:
            await self._poll()

    async def _poll(self) -> None:
        unknown = frozenset(self._unknown)
        due = time.monotonic() - self._structure_at >= STRUCTURE_SECONDS
        try:
            began = time.monotonic()
            reading = await read_from_database(
                _read, unknown, self._seen_changes, self._structure, with_structure=due
            )
            self._apply(reading, unknown, began)
        except Exception as error:
            if not self._away:
                self._away = True
                logger.warning(
                    "event=database_away the database does not answer; serving from the last snapshot: %s",
                    type(error).__name__,
                    extra={"event": "database_away"},
                    exc_info=error,
                )
            self._age(time.monotonic())
            return
        if self._away:
            self._away = False
            logger.warning("event=database_back the database answers again", extra={"event": "database_back"})
        silent = began - (self._answered_at if self._answered_at is not None else began)
        self._answered_at = time.monotonic()
        # Less than the window by what a slow transaction may need.
        self._tell_subscribers(reading.changes, missed=silent > CHANGE_WINDOW_SECONDS / 2)

    def _apply(self, reading: _Reading, unknown: frozenset[int], now: float) -> None:
        if reading.structure is not None:
            self._structure = reading.structure
            self._structure_at = now
        before = self._live
        self._live = {}
        ready: dict[int, list[WorkerView]] = {}
        for row in reading.workers:
            worker = row.worker
            if worker.state in WORKER_TERMINAL:
                continue
            self._live[worker.pk] = (worker.epoch, worker.state)
            if worker.state == WorkerState.READY and worker.url:
                if worker.deployment_id not in self._structure.deployments:
                    # Created since the structure was read.
                    self._structure_at = float("-inf")
                    continue
                view = self._worker_view(row, now)
                ready.setdefault(view.deployment_id, []).append(view)
        self._note_ended((before.keys() | unknown) - self._live.keys())
        self._unknown -= unknown
        self._take_over(ready, reading.starts_in, now)
        self._age(now)

    def _worker_view(self, row: _WorkerRow, now: float) -> WorkerView:
        worker = row.worker
        known = self.tallies.get(worker.pk)
        same = known is not None and known.worker.epoch == worker.epoch
        age = (row.read_at - worker.heartbeat_at).total_seconds() if worker.heartbeat_at else float("inf")
        return WorkerView(
            id=worker.pk,
            epoch=worker.epoch,
            name=worker.name,
            node_name=worker.node.name,
            deployment_id=worker.deployment_id,
            deployment_name=self._structure.deployments[worker.deployment_id].name,
            engine=self._structure.deployments[worker.deployment_id].engine,
            revision_id=worker.revision_id,
            url=worker.url.rstrip("/"),
            secret=known.worker.secret
            if known is not None and same
            else worker_secret(settings.SECRET_KEY, worker.pk, worker.epoch),
            slots=worker.revision.slots,
            capabilities=_capabilities(tuple(worker.capabilities)),
            running=worker.running,
            waiting=worker.waiting,
            kv_use=worker.kv_use,
            speed=worker.tokens_per_second,
            reported_at=now - max(0.0, age),
        )

    def _take_over(
        self, ready: Mapping[int, Iterable[WorkerView]], starts_in: Mapping[int, float], now: float
    ) -> None:
        """Replace views and tallies together: every worker in a view has its tally."""
        for views in ready.values():
            for view in views:
                tally = self.tallies.get(view.id)
                if tally is None or tally.worker.epoch != view.epoch:
                    tally = self.tallies[view.id] = Tally(view)
                tally.refresh(view, now)
        # One that is not ready keeps its tally while it lives: it may come back with our requests.
        for worker_id in self.tallies.keys() - self._live.keys():
            del self.tallies[worker_id]
        self._deployments = {
            deployment.id: replace(
                deployment,
                workers=tuple(ready.get(deployment.id, ())),
                starts_in=starts_in.get(deployment.id),
            )
            for deployment in self._structure.deployments.values()
        }
        routes = {
            name: RouteView(
                name=name,
                targets=tuple((self._deployments[target], weight) for target, weight, _ in route.targets),
                ranks=tuple(rank for _, _, rank in route.targets),
                timeouts=route.timeouts,
                continues=route.continues,
            )
            for name, route in self._structure.routes.items()
        }
        adapted: dict[str, RouteView] = {}
        for route in routes.values():
            adapted |= route.adapted()
        # A route that an operator gave such a name goes before.
        self._routes = adapted | routes

    def _note_ended(self, worker_ids: Iterable[int]) -> None:
        for worker_id in worker_ids:
            self._ended[worker_id] = None
        while len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    def _age(self, now: float) -> None:
        for tally in self.tallies.values():
            tally.age(now)
        self._tell_refreshed()

    def _tell_refreshed(self) -> None:
        for callback in self._refreshed:
            callback()

    def _tell_subscribers(self, changes: list[tuple[int, str, str]], *, missed: bool) -> None:
        news = [(kind, key) for number, kind, key in changes if number not in self._seen_changes]
        # What has left the window cannot come back into it.
        self._seen_changes = {number for number, _, _ in changes}
        if missed:
            news = [(kind, FORGET_ALL) for kind in self._subscribers]
        for kind, key in dict.fromkeys(news):
            for callback in self._subscribers.get(kind, ()):
                try:
                    callback(key)
                except Exception:
                    # One deaf subscriber must not stop the snapshot for all.
                    logger.exception("event=subscriber_failed a change of %s could not be passed on", kind)


@lru_cache(maxsize=256)
def _capabilities(announced: tuple[str, ...]) -> frozenset[str]:
    """What a worker can do. One that names no endpoint answers chat, as every OpenAI-like server does."""
    if any(name.startswith("endpoint:") for name in announced):
        return frozenset(announced)
    return frozenset((*announced, "endpoint:chat"))


def _read(unknown: frozenset[int], seen: set[int], known: _Structure, *, with_structure: bool) -> _Reading:
    """In a database thread. Changes first: what they announce is then in everything read after them."""
    changes = list(
        Change.objects.filter(at__gt=Now() - timedelta(seconds=CHANGE_WINDOW_SECONDS))
        .order_by("id")
        .values_list("id", "kind", "key")
    )
    fresh = any(kind in STRUCTURE_KINDS and number not in seen for number, kind, _ in changes)
    structure = _read_structure() if with_structure or fresh else None
    workers = _read_workers(unknown)
    deployments = (structure or known).deployments
    starts_in = _starts_in(deployments.values(), [row.worker for row in workers])
    return _Reading(changes, structure, workers, starts_in)


def _read_workers(unknown: frozenset[int]) -> list[_WorkerRow]:
    wanted = models.Q(state__in=WORKER_LIVE)
    if unknown:
        wanted |= models.Q(pk__in=unknown)
    workers = (
        Worker.objects.filter(wanted)
        .select_related("node", "revision")
        .only(
            "name", "epoch", "state", "url", "capabilities", "heartbeat_at", "running", "waiting", "kv_use",
            "tokens_per_second", "deployment_id", "replica", "node__name", "revision__slots",
        )
        .annotate(read_at=Now())
        .order_by("pk")
    )  # fmt: skip
    return [_WorkerRow(worker, cast(Any, worker).read_at) for worker in workers]


def _starts_in(deployments: Iterable[DeploymentView], workers: Iterable[Worker]) -> dict[int, float]:
    """In how many seconds a worker is started, by deployment: 0 where one is live that is not lost. Asks the
    database only about those without one; of those that nobody wishes for, or that none is started of, it
    tells nothing."""
    replicas = {deployment.id: deployment.replicas for deployment in deployments}
    found = {
        worker.deployment_id: 0.0
        for worker in workers
        if worker.state not in WORKER_TERMINAL
        and worker.state != WorkerState.LOST
        and worker.replica < replicas.get(worker.deployment_id, 0)
    }
    missing = [number for number, count in replicas.items() if count and number not in found]
    if missing:
        wishes = read_wishes(Deployment.objects.filter(pk__in=missing))
        facts, now = read_facts(wishes), database_now()
        for wish in wishes:
            at = next_start(wish, facts, now)
            if at is not None:
                found[wish.id] = (at - now).total_seconds()
    return found


def _read_structure() -> _Structure:
    deployments = {
        deployment.pk: DeploymentView(
            id=deployment.pk,
            name=deployment.name,
            engine=deployment.engine,
            replicas=deployment.replicas,
            policy=deployment.policy,
            queue_limit=deployment.queue_limit,
            queue_seconds=float(deployment.queue_seconds),
            queue_tokens=deployment.queue_tokens,
            context_length=deployment.language_model.context_length,
            workers=(),
            adapters=adapters_of(deployment.engine, deployment.arguments),
        )
        for deployment in Deployment.objects.select_related("language_model").only(
            "name",
            "engine",
            "arguments",
            "policy",
            "queue_limit",
            "queue_seconds",
            "queue_tokens",
            "replicas",
            "language_model__context_length",
        )
    }
    # A route without targets is known too: its requests are refused for capacity, not as unknown.
    routes = {
        route.name: _Route(
            route.continues,
            Timeouts(
                connect=route.connect_seconds,
                queue=route.queue_seconds,
                first_token=route.first_token_seconds,
                idle=route.idle_seconds,
                total=route.total_seconds,
            ),
            [],
        )
        for route in Route.objects.filter(enabled=True)
    }
    targets = RouteTarget.objects.order_by("rank", "id")
    for name, *target in targets.values_list("route__name", "deployment_id", "weight", "rank"):
        if name in routes and target[0] in deployments:
            routes[name].targets.append((target[0], target[1], target[2]))
    return _Structure(deployments, routes)
