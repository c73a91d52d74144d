"""Wish against fact: which workers to create, drain or give up, so that the facts become the wish.

`plan` is pure; `reconcile` reads the facts, plans, and carries out. Both may run twice at once:
constraints and compare-and-set let one of them win.

The rules, in order, for each deployment:

1. A live worker holds its replica's place, so whatever runs is adopted before anything is created.
2. Surplus replicas drain, the highest number first.
3. A lost worker is replaced once there is a place for the next one; until then it may come back.
   When more than half of the nodes fell silent together, nothing is replaced: it is the network or us.
4. Workers of an old revision are drained one by one; those that do not serve yet, at once.
5. A replica without a worker gets one, after a pause that grows with its failures in a row,
   and never again by itself once it gave up.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial

from django.db import transaction
from django.db.models import F, Window
from django.db.models.functions import RowNumber

from inference.protocol import PERMANENT, Cause
from registry.actions.workers import create_worker, move_worker
from registry.errors import InvalidTransition
from registry.models import Deployment, Node, Worker
from registry.querysets import database_now
from registry.states import WORKER_STARTING, WORKER_TERMINAL, NodeState, WorkerState

log = logging.getLogger("roundhouse.reconcile")

BY = "reconcile"

FIRST_BACKOFF = timedelta(seconds=10)
"""Pause before the second restart in a row; the first one comes at once, each further one doubles."""

LONGEST_BACKOFF = timedelta(seconds=300)

CRASH_LOOP = 5
"""So many failures in a row with one cause, and the replica is given up."""

STABLE = timedelta(seconds=60)
"""A worker that was ready for this long ends a row of failures: its own end begins a new one."""

TOGETHER = timedelta(seconds=30)
"""Nodes whose last words lie within this time fell silent together."""

HISTORY = 12
"""Ended workers looked at per replica."""

OF_THE_MACHINE = frozenset({Cause.LOST, Cause.VANISHED})
"""Causes that say nothing about the wish: they never add up to giving up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentWish:
    id: int
    name: str
    replicas: int
    revision_id: int
    changed_at: datetime
    node_labels: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFact:
    """A live worker."""

    id: int
    name: str
    deployment_id: int
    replica: int
    revision_id: int
    node_id: int
    state: WorkerState
    state_changed_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFact:
    id: int
    name: str
    state: NodeState
    cordoned: bool = False
    labels: Mapping[str, object] = field(default_factory=dict)
    last_seen_at: datetime | None = None

    def refuses(self, wish: DeploymentWish) -> str | None:
        """Why this node gets no worker of the deployment; None when it may."""
        if self.cordoned:
            return f"{self.name} is cordoned"
        if self.state != NodeState.ONLINE:
            return f"{self.name} is {self.state.value}"
        for label, value in wish.node_labels.items():
            if self.labels.get(label) != value:
                return f"{self.name} lacks the label {label}={value}"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An ended run of a replica since its wish last changed."""

    deployment_id: int
    replica: int
    node_id: int
    cause: str
    detail: str
    ended_at: datetime
    ready_at: datetime | None = None
    stopped: bool = False
    """It ended because it was told to, which is no failure and ends a row of them."""

    @property
    def was_stable(self) -> bool:
        return self.ready_at is not None and self.ended_at - self.ready_at >= STABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    workers: Sequence[WorkerFact] = ()
    nodes: Sequence[NodeFact] = ()
    failures: Mapping[tuple[int, int], Sequence[Failure]] = field(default_factory=dict)
    """By deployment and replica, the newest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateWorker:
    deployment_id: int
    replica: int
    node_id: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainWorker:
    worker_id: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWorker:
    """End a worker that serves nothing and has nothing to finish: not taken up yet, or lost."""

    worker_id: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaceLost:
    """A lost worker does not get its place back: it is failed, and told to exit should it return."""

    worker_id: int
    reason: str


Command = CreateWorker | DrainWorker | StopWorker | ReplaceLost


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A replica's failures in a row, up to now."""

    count: int
    newest: Failure | None = None
    alike: int = 0
    """How many of the newest ones share one cause."""

    @property
    def gave_up(self) -> bool:
        """True when the same wish would only fail again; a changed wish or a retry begins anew."""
        if self.newest is None:
            return False
        return self.newest.cause in PERMANENT or (
            self.alike >= CRASH_LOOP and self.newest.cause not in OF_THE_MACHINE
        )

    def next_try_at(self) -> datetime | None:
        """When the replica may be started again; None: at once."""
        if self.newest is None or self.count < 2:
            return None
        # The exponent is bounded before it is used: a row may be long.
        pause = min(FIRST_BACKOFF * (1 << min(self.count - 2, 10)), LONGEST_BACKOFF)
        return self.newest.ended_at + pause


def failures_in_a_row(ended: Iterable[Failure]) -> Row:
    """Count back from the newest end to the last run that went well."""
    row: list[Failure] = []
    for failure in ended:
        if failure.stopped:
            break
        if failure.cause == Cause.VANISHED:
            # Its machine restarted. That takes long enough by itself.
            continue
        row.append(failure)
        if failure.was_stable:
            break
    alike = 0
    for failure in row:
        if failure.cause != row[0].cause:
            break
        alike += 1
    return Row(count=len(row), newest=row[0] if row else None, alike=alike)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    node: NodeFact | None
    refusals: tuple[str, ...] = ()
    """Why each node that was refused was; one clause each."""

    def explain(self) -> str:
        if not self.refusals:
            return "no node has joined"
        return "; ".join(self.refusals)


def place(
    wish: DeploymentWish, nodes: Iterable[NodeFact], load: Mapping[int, int], avoid: int | None = None
) -> Placement:
    """Choose a node: of those that may, the one with the fewest live workers.

    Among equals, one other than `avoid`, where the replica failed last.
    """
    refusals = []
    candidates = []
    for node in nodes:
        refusal = node.refuses(wish)
        if refusal is None:
            candidates.append(node)
        else:
            refusals.append(refusal)
    chosen = min(
        candidates, key=lambda node: (load.get(node.id, 0), node.id == avoid, node.name), default=None
    )
    return Placement(node=chosen, refusals=tuple(refusals))


def vanished_together(nodes: Iterable[NodeFact]) -> bool:
    """More than half of the nodes, and at least two, fell silent at about the same time.

    Nodes that were gone before are not counted on either side; neither are cordoned ones, so
    cordoning a node is how an operator says that it is really gone.
    """
    counted = [node for node in nodes if not node.cordoned]
    online = sum(node.state == NodeState.ONLINE for node in counted)
    silent = sorted(
        node.last_seen_at
        for node in counted
        if node.state in (NodeState.SUSPECT, NodeState.OFFLINE) and node.last_seen_at is not None
    )
    if not silent:
        return False
    last = sum(silent[-1] - instant <= TOGETHER for instant in silent)
    return last >= 2 and last > online


def plan(wishes: Iterable[DeploymentWish], facts: Facts, now: datetime) -> list[Command]:
    """What to do now. Pure: the same arguments give the same commands."""
    load = Counter(worker.node_id for worker in facts.workers)
    held = vanished_together(facts.nodes)
    by_deployment: dict[int, list[WorkerFact]] = {}
    for worker in facts.workers:
        by_deployment.setdefault(worker.deployment_id, []).append(worker)

    commands: list[Command] = []
    for wish in wishes:
        workers = {worker.replica: worker for worker in by_deployment.get(wish.id, ())}
        commands += _end_surplus(wish, workers)
        commands += _update_one(wish, workers)
        commands += _fill(wish, workers, facts, load, held=held, now=now)
    return commands


def _end(worker: WorkerFact, reason: str) -> Command:
    """Drain before stop, unless there is nothing to drain."""
    if worker.state in (WorkerState.REQUESTED, WorkerState.LOST):
        return StopWorker(worker_id=worker.id, reason=reason)
    return DrainWorker(worker_id=worker.id, reason=reason)


def _end_surplus(wish: DeploymentWish, workers: Mapping[int, WorkerFact]) -> list[Command]:
    surplus = sorted((replica for replica in workers if replica >= wish.replicas), reverse=True)
    return [
        _end(workers[replica], f"scaled to {wish.replicas}")
        for replica in surplus
        if workers[replica].state != WorkerState.DRAINING
    ]


def _update_one(wish: DeploymentWish, workers: Mapping[int, WorkerFact]) -> list[Command]:
    """Retire workers of old revisions. At most one replica at a time is taken out of service."""
    reason = "a newer revision replaces it"
    wished = [workers[replica] for replica in range(wish.replicas) if replica in workers]
    old = [worker for worker in wished if worker.revision_id != wish.revision_id]
    commands = [_end(worker, reason) for worker in old if worker.state in WORKER_STARTING]
    serving = [worker for worker in old if worker.state == WorkerState.READY]
    all_ready = len(wished) == wish.replicas and all(worker.state == WorkerState.READY for worker in wished)
    if serving and all_ready:
        commands.append(_end(max(serving, key=lambda worker: worker.replica), reason))
    return commands


def _fill(
    wish: DeploymentWish,
    workers: Mapping[int, WorkerFact],
    facts: Facts,
    load: Counter[int],
    *,
    held: bool,
    now: datetime,
) -> list[Command]:
    commands: list[Command] = []
    for replica in range(wish.replicas):
        worker = workers.get(replica)
        if worker is not None and (worker.state != WorkerState.LOST or held):
            continue
        ended = _ended(wish, replica, worker, facts)
        row = failures_in_a_row(ended)
        next_try_at = row.next_try_at()
        if row.gave_up or (next_try_at is not None and now < next_try_at):
            continue
        node = place(wish, facts.nodes, load, avoid=row.newest.node_id if row.newest else None).node
        if node is None:
            continue
        if worker is not None:
            commands.append(ReplaceLost(worker_id=worker.id, reason=f"replaced on {node.name}"))
            load[worker.node_id] -= 1
        commands.append(
            CreateWorker(
                deployment_id=wish.id, replica=replica, node_id=node.id, reason=_why(row, fresh=not ended)
            )
        )
        load[node.id] += 1
    return commands


def next_start(wish: DeploymentWish, facts: Facts, now: datetime) -> datetime | None:
    """When `plan` starts a worker of it next, `now` for at once, where none is live but lost ones; None when
    it will not: all gave up, or no node may take one. Pure."""
    if wish.replicas == 0 or place(wish, facts.nodes, {}).node is None:
        return None
    held = vanished_together(facts.nodes)
    lost = {worker.replica: worker for worker in facts.workers if worker.deployment_id == wish.id}
    starts = []
    for replica in range(wish.replicas):
        worker = lost.get(replica)
        if worker is not None and held:
            continue
        row = failures_in_a_row(_ended(wish, replica, worker, facts))
        if not row.gave_up:
            starts.append(max(row.next_try_at() or now, now))
    return min(starts, default=None)


def _ended(wish: DeploymentWish, replica: int, worker: WorkerFact | None, facts: Facts) -> Sequence[Failure]:
    """A replica's ends, the newest first; a lost worker of it counts as one."""
    ended = facts.failures.get((wish.id, replica), ())
    return ended if worker is None else [_as_failure(worker), *ended]


def _as_failure(worker: WorkerFact) -> Failure:
    return Failure(
        deployment_id=worker.deployment_id,
        replica=worker.replica,
        node_id=worker.node_id,
        cause=Cause.LOST,
        detail="It fell silent.",
        ended_at=worker.state_changed_at,
    )


def _why(row: Row, *, fresh: bool) -> str:
    if row.newest is None:
        return "wished for" if fresh else "started again"
    return f"started again after: {row.newest.cause or 'unknown cause'}"


# -- The impure half.


def read_wishes(deployments: Iterable[Deployment]) -> list[DeploymentWish]:
    return [
        DeploymentWish(
            id=deployment.pk,
            name=deployment.name,
            replicas=deployment.replicas,
            revision_id=deployment.revision_id,
            changed_at=deployment.wish_changed_at,
            node_labels=deployment.node_labels or {},
        )
        for deployment in deployments
        if deployment.revision_id is not None
    ]


def read_facts(wishes: Sequence[DeploymentWish]) -> Facts:
    """The facts that these wishes are held against, in two queries, or three when something is missing."""
    workers = [
        WorkerFact(
            id=worker.pk,
            name=worker.name,
            deployment_id=worker.deployment_id,
            replica=worker.replica,
            revision_id=worker.revision_id,
            node_id=worker.node_id,
            state=WorkerState(worker.state),
            state_changed_at=worker.state_changed_at,
        )
        for worker in Worker.objects.live()
        .only("name", "deployment_id", "replica", "revision_id", "node_id", "state", "state_changed_at")
        .order_by("id")
    ]
    nodes = [
        NodeFact(
            id=node.pk,
            name=node.name,
            state=NodeState(node.state),
            cordoned=node.cordoned,
            labels=node.labels or {},
            last_seen_at=node.last_seen_at,
        )
        for node in Node.objects.all()
    ]
    served = {
        (worker.deployment_id, worker.replica) for worker in workers if worker.state != WorkerState.LOST
    }
    missing = {
        wish.id
        for wish in wishes
        if any((wish.id, replica) not in served for replica in range(wish.replicas))
    }
    return Facts(workers=workers, nodes=nodes, failures=_read_failures(missing))


def _read_failures(deployment_ids: Collection[int]) -> dict[tuple[int, int], list[Failure]]:
    if not deployment_ids:
        return {}
    rows = (
        Worker.objects.filter(
            deployment_id__in=deployment_ids,
            state__in=WORKER_TERMINAL,
            state_changed_at__gt=F("deployment__wish_changed_at"),
            replica__lt=F("deployment__replicas"),
        )
        .annotate(
            newness=Window(
                RowNumber(), partition_by=[F("deployment_id"), F("replica")], order_by=F("epoch").desc()
            )
        )
        .filter(newness__lte=HISTORY)
        .order_by("deployment_id", "replica", "-epoch")
        .values_list(
            "deployment_id",
            "replica",
            "node_id",
            "cause",
            "state_reason",
            "state_changed_at",
            "ready_at",
            "state",
        )
    )
    failures: dict[tuple[int, int], list[Failure]] = {}
    for deployment_id, replica, node_id, cause, detail, ended_at, ready_at, state in rows:
        failures.setdefault((deployment_id, replica), []).append(
            Failure(
                deployment_id=deployment_id,
                replica=replica,
                node_id=node_id,
                cause=cause,
                detail=detail,
                ended_at=ended_at,
                ready_at=ready_at,
                stopped=state == WorkerState.STOPPED,
            )
        )
    return failures


def reconcile(nudge: Callable[[Collection[str]], None]) -> list[Command]:
    """Bring the facts one step nearer to the wishes; returns what was done.

    `nudge` gets the names of the nodes that have something new to ask for, after the commit.
    """
    wishes = read_wishes(Deployment.objects.all())
    facts = read_facts(wishes)
    done = []
    nodes: set[str] = set()
    for command in plan(wishes, facts, database_now()):
        try:
            nodes.add(_carry_out(command))
        except (InvalidTransition, Deployment.DoesNotExist, Node.DoesNotExist, Worker.DoesNotExist) as error:
            # Somebody else, another control or the worker itself, was faster. The next tick sees it.
            log.info("overtaken: %s", error, extra={"event": "reconcile_overtaken"})
        else:
            done.append(command)
    if nodes:
        transaction.on_commit(partial(nudge, sorted(nodes)))
    return done


def _carry_out(command: Command) -> str:
    """Do one command; returns the name of the node that it concerns."""
    if isinstance(command, CreateWorker):
        node = Node.objects.get(pk=command.node_id)
        deployment = Deployment.objects.select_related("revision").get(pk=command.deployment_id)
        worker = create_worker(
            deployment=deployment, replica=command.replica, node=node, by=BY, reason=command.reason
        )
        log.info(
            "worker %s wished for on %s: %s",
            worker,
            node,
            command.reason,
            extra={"event": "worker_created", "worker_id": worker.pk},
        )
        return node.name
    worker = Worker.objects.select_related("node").get(pk=command.worker_id)
    node_name = worker.node.name
    to, facts, only_from = _MOVES[type(command)]
    move_worker(worker=worker, to=to, reason=command.reason, by=BY, facts=dict(facts), only_from=only_from)
    log.info(
        "worker %s becomes %s: %s",
        worker,
        to.value,
        command.reason,
        extra={"event": "worker_moved", "worker_id": worker.pk},
    )
    return node_name


_MOVES: Mapping[type, tuple[WorkerState, Mapping[str, str], Collection[WorkerState] | None]] = {
    DrainWorker: (WorkerState.DRAINING, {}, None),
    # Stopped and failed can be reached from every live state; a worker that moved on meanwhile,
    # or came back, is not meant.
    StopWorker: (
        WorkerState.STOPPED,
        {"cause": Cause.STOPPED.value},
        (WorkerState.REQUESTED, WorkerState.LOST),
    ),
    ReplaceLost: (WorkerState.FAILED, {"cause": Cause.LOST.value}, (WorkerState.LOST,)),
}
