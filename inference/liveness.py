"""The reaper: judges silence, by the database's clock alone.

Workers are judged by their own beats. Those that do not beat yet, because their node still
prepares them, are judged by their node. Silence counts only while a gateway was there to hear it.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta

from django.db.models import Q

from inference.protocol import Cause
from registry.actions.nodes import move_node
from registry.actions.workers import move_worker
from registry.errors import InvalidTransition
from registry.models import Node, Worker
from registry.querysets import heard_until
from registry.states import NodeState, WorkerState

log = logging.getLogger("roundhouse.liveness")

BY = "reaper"

SUSPECT_AFTER = timedelta(seconds=5)
"""Silent for this long: gets no new request. Two beats of 2 s may be lost before it."""

LOST_AFTER = timedelta(seconds=10)
"""Silent for this long: counts as gone. More than the time after which a worker fences itself."""

FIRST_BEAT_WITHIN = timedelta(seconds=60)
"""A process that its agent started must speak for itself within this time."""

GRACE_SECONDS = 15.0
"""A gateway must have been there for this long before silence says anything."""


def reap(now: datetime) -> int:
    """Move what fell silent, one step each; returns how many moved.

    `now` is the database's clock. Does nothing unless a gateway was there to hear beats.
    """
    heard = heard_until(now, for_seconds=GRACE_SECONDS)
    return 0 if heard is None else _reap_nodes(heard) + _reap_workers(heard)


def _reap_nodes(now: datetime) -> int:
    moved = 0
    for node in Node.objects.silent_since(now - SUSPECT_AFTER).order_by("id"):
        silent = now - (node.last_seen_at or node.state_changed_at)
        if node.state == NodeState.ONLINE:
            moved += _move_node(node, NodeState.SUSPECT, silent)
        elif silent >= LOST_AFTER:
            moved += _move_node(node, NodeState.OFFLINE, silent)
    return moved


def _reap_workers(now: datetime) -> int:
    moved = 0
    silent = Worker.objects.silent_since(now - SUSPECT_AFTER).order_by("id")
    for worker in silent:
        since = worker.heartbeat_at or worker.state_changed_at
        lost = now - since >= LOST_AFTER
        if worker.state == WorkerState.READY:
            moved += _move_worker(worker, WorkerState.SUSPECT, _silence(now - since))
        elif lost and worker.state == WorkerState.DRAINING:
            # It was to end anyway. Should it still run, its agent finds it in no order and ends it.
            moved += _move_worker(worker, WorkerState.STOPPED, "fell silent while it drained", Cause.LOST)
        elif lost:
            moved += _move_worker(worker, WorkerState.LOST, _silence(now - since))

    unprepared = Worker.objects.filter(
        Q(state=WorkerState.REQUESTED) | Q(state=WorkerState.LAUNCHING), node__state=NodeState.OFFLINE
    )
    for worker in unprepared.order_by("id"):
        moved += _move_worker(worker, WorkerState.LOST, "its node is offline")

    # An agent's word that the process runs set the heartbeat of a launching worker.
    speechless = Worker.objects.filter(state=WorkerState.LAUNCHING, heartbeat_at__lt=now - FIRST_BEAT_WITHIN)
    for worker in speechless.order_by("id"):
        moved += _move_worker(worker, WorkerState.LOST, "its process runs but never reported")
    return moved


def _silence(silent: timedelta) -> str:
    return f"silent for {silent.total_seconds():.0f} s"


def _move_node(node: Node, to: NodeState, silent: timedelta) -> int:
    reason = _silence(silent)
    try:
        move_node(node=node, to=to, reason=reason, by=BY)
    except InvalidTransition:
        # It was heard in this very moment, or another control was faster.
        return 0
    log.warning("node %s becomes %s: %s", node, to.value, reason, extra={"event": f"node_{to.value}"})
    return 1


def _move_worker(worker: Worker, to: WorkerState, reason: str, cause: Cause | None = None) -> int:
    facts = {"cause": cause.value} if cause is not None else None
    try:
        # Only from the state that the silence was judged in: a beat may have arrived since.
        move_worker(
            worker=worker, to=to, reason=reason, by=BY, facts=facts, only_from=[WorkerState(worker.state)]
        )
    except InvalidTransition:
        return 0
    log.warning(
        "worker %s becomes %s: %s",
        worker,
        to.value,
        reason,
        extra={"event": f"worker_{to.value}", "worker_id": worker.pk},
    )
    return 1
