"""Workers: created by reconcile, moved by agent, worker and reaper, each by compare-and-set."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import Max

from registry.actions.events import publish_change, record_event
from registry.errors import InvalidTransition
from registry.models import Deployment, Node, Worker
from registry.querysets import database_now
from registry.states import WORKER_TERMINAL, WORKER_TRANSITIONS, WorkerState, sources_of


@transaction.atomic
def create_worker(*, deployment: Deployment, replica: int, node: Node, by: str, reason: str = "") -> Worker:
    """Wish for one run of a replica, with the next epoch. Raises InvalidTransition if one is live already."""
    if deployment.revision is None:
        raise InvalidTransition(f"{deployment} has no revision to start from.")
    last = (
        Worker.objects.filter(deployment=deployment, replica=replica).aggregate(last=Max("epoch"))["last"]
        or 0
    )
    now = database_now()
    try:
        with transaction.atomic():
            worker = Worker.objects.create(
                name=f"{deployment.name}-{replica}",
                deployment=deployment,
                revision=deployment.revision,
                node=node,
                replica=replica,
                epoch=last + 1,
                state_changed_at=now,
                created_at=now,
            )
    except IntegrityError as error:
        # Two reconciles at once: the constraint lets one of them win.
        raise InvalidTransition(f"Replica {replica} of {deployment} has a live worker already.") from error
    record_event(worker, worker.state, reason=reason, by=by, data={"epoch": worker.epoch, "node": node.name})
    return worker


@transaction.atomic
def move_worker(
    *,
    worker: Worker,
    to: WorkerState,
    reason: str,
    by: str,
    facts: dict[str, Any] | None = None,
    only_from: Collection[WorkerState] | None = None,
) -> None:
    """Move a worker's state by compare-and-set and note it. `facts` are further columns to write.

    Raises InvalidTransition when the worker is no longer in a state from which it may move there,
    or not in one of `only_from`, where the reason to move it holds in some states only.
    """
    now = database_now()
    columns: dict[str, Any] = {
        "state": to,
        "state_changed_at": now,
        "state_reason": reason[:500],
        **(facts or {}),
    }
    if to in WORKER_TERMINAL:
        columns |= {"running": 0, "waiting": 0, "kv_use": 0}
    if to == WorkerState.READY:
        columns |= {"ready_at": now, "heartbeat_at": now}
    sources: Collection[WorkerState] = sources_of(to, WORKER_TRANSITIONS)
    if only_from is not None:
        sources = sorted(frozenset(sources) & frozenset(only_from))
    changed = Worker.objects.filter(pk=worker.pk, epoch=worker.epoch, state__in=sources).update(**columns)
    if not changed:
        raise InvalidTransition(f"Worker {worker} cannot become {to} now.")
    worker.refresh_from_db()
    record_event(
        worker,
        to,
        reason=reason,
        by=by,
        data={
            key: value
            for key, value in {
                "epoch": worker.epoch,
                "pid": worker.pid,
                "engine_pid": worker.engine_pid,
                "cause": worker.cause,
                "exit_code": worker.exit_code,
            }.items()
            if value not in (None, "")
        },
    )
    publish_change("worker", str(worker.pk))


def retire_worker(*, worker: Worker, by: str) -> None:
    """Let a worker finish its requests and end; reconcile then starts another in its place.

    One that serves nothing (not taken up yet, or lost) ends at once. Raises InvalidTransition.
    """
    idle = (WorkerState.REQUESTED, WorkerState.LOST)
    reason = "replaced on request"
    if worker.state in idle:
        facts = {"cause": "stopped"}
        move_worker(worker=worker, to=WorkerState.STOPPED, reason=reason, by=by, facts=facts, only_from=idle)
    else:
        move_worker(worker=worker, to=WorkerState.DRAINING, reason=reason, by=by)


@transaction.atomic
def record_loads(rows: Iterable[Worker], *, fields: list[str]) -> None:
    """Write many workers' beats in one statement. Changes no state; a terminal worker stays as it was."""
    Worker.objects.bulk_update(list(rows), fields)
