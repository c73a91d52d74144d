"""What a deployment's status is, why, and what to do about it. Derived on each look, never stored.

stopped     0 replicas are wished for
starting    none serves yet, and it is being worked on
ready       every wished replica serves
degraded    some serve, or those that did fell silent
failed      none serves and none will without a changed wish or a retry
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from inference.protocol import Cause
from inference.reconcile import (
    CRASH_LOOP,
    DeploymentWish,
    Facts,
    Failure,
    Row,
    WorkerFact,
    failures_in_a_row,
    place,
    read_facts,
    read_wishes,
    vanished_together,
)
from registry.models import Deployment, ModelCopy
from registry.querysets import database_now
from registry.states import WORKER_STARTING, CopyState, NodeState, WorkerState


class DeploymentState(StrEnum):
    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentStatus:
    state: DeploymentState
    reason: str
    """A sentence for people."""
    next_action: str = ""
    """What an operator can do; empty when nothing needs doing."""
    cause: str = ""
    """Of a failure, as in `protocol.Cause`."""
    ready: int = 0
    wished: int = 0


NEXT_ACTION: Mapping[str, str] = {
    Cause.BAD_ARGUMENT: "Correct the deployment's engine arguments.",
    Cause.CHECKSUM: "Correct the model's source or its pinned digest.",
    Cause.CRASHED: "Read the worker's log, then retry.",
    Cause.DRIVER: "Repair the accelerator's driver on the node, then retry.",
    Cause.DISK: "Make room on the node's disk, then retry.",
    Cause.FETCH: "Make the model's source reachable from the node, then retry.",
    Cause.HUNG: "Read the worker's log, then retry, perhaps with fewer slots.",
    Cause.KILLED: "Find out what ends processes on the node (the system log may tell), then retry.",
    Cause.MISSING_FILE: "Put the model's files where its source says, or correct the source, then retry.",
    Cause.OUT_OF_MEMORY: "Use fewer slots, a smaller or quantized model, or a larger node, then retry.",
    Cause.PORT: "Free the port on the node, then retry.",
    Cause.UNSAFE_FORMAT: "Use a model with safetensors weights.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Missing:
    """Why a wished replica does not serve."""

    text: str
    gave_up: Failure | None = None
    next_action: str = ""


def derive(
    wish: DeploymentWish, facts: Facts, now: datetime, *, copies: Mapping[int, str] | None = None
) -> DeploymentStatus:
    """A deployment's status. Pure. `copies`: by node, how far the model's files are."""
    workers = {worker.replica: worker for worker in facts.workers if worker.deployment_id == wish.id}
    if wish.replicas == 0:
        ending = len(workers)
        reason = f"{ending} worker(s) end." if ending else "Scaled to 0."
        return DeploymentStatus(state=DeploymentState.STOPPED, reason=reason)

    wished = [workers.get(replica) for replica in range(wish.replicas)]
    ready = [worker for worker in wished if worker is not None and worker.state == WorkerState.READY]
    if len(ready) == wish.replicas:
        old = sum(worker.revision_id != wish.revision_id for worker in ready)
        reason = f"{old} worker(s) still to be updated." if old else "Every replica serves."
        return DeploymentStatus(
            state=DeploymentState.READY, reason=reason, ready=len(ready), wished=wish.replicas
        )

    missing = [
        _why_missing(wish, replica, worker, facts, now, copies or {})
        for replica, worker in enumerate(wished)
        if worker not in ready
    ]
    gave_up = [why.gave_up for why in missing if why.gave_up is not None]
    if ready or any(
        worker is not None and worker.state in (WorkerState.SUSPECT, WorkerState.LOST, WorkerState.DRAINING)
        for worker in wished
    ):
        state = DeploymentState.DEGRADED
    elif len(gave_up) == len(missing):
        state = DeploymentState.FAILED
    else:
        state = DeploymentState.STARTING
    # What needs an operator comes first.
    first = next((why for why in missing if why.next_action), missing[0])
    return DeploymentStatus(
        state=state,
        reason=_together(missing),
        next_action=first.next_action,
        cause=gave_up[0].cause if gave_up else "",
        ready=len(ready),
        wished=wish.replicas,
    )


def _together(missing: Sequence[_Missing]) -> str:
    counted = Counter(why.text for why in missing)
    return " ".join(text if count == 1 else f"{count} replicas: {text}" for text, count in counted.items())


def _why_missing(
    wish: DeploymentWish,
    replica: int,
    worker: WorkerFact | None,
    facts: Facts,
    now: datetime,
    copies: Mapping[int, str],
) -> _Missing:
    row = failures_in_a_row(facts.failures.get((wish.id, replica), ()))
    if worker is not None and worker.state != WorkerState.LOST:
        return _Missing(text=_what_it_does(worker, facts, copies))
    if worker is not None and vanished_together(facts.nodes):
        return _Missing(
            text=f"{worker.name} is lost, and more than half of the nodes fell silent together: "
            "nothing is replaced until they return.",
            next_action="Check the network; cordon nodes that are really gone.",
        )
    if row.gave_up and row.newest is not None:
        return _Missing(
            text=_gave_up(row, row.newest),
            gave_up=row.newest,
            next_action=NEXT_ACTION.get(row.newest.cause, "Read the worker's log, then retry."),
        )
    placement = place(wish, facts.nodes, {})
    if placement.node is None:
        return _Missing(
            text=f"No node can take a worker: {placement.explain()}.",
            next_action="Let a node join, or change the nodes' labels or the deployment's.",
        )
    next_try_at = row.next_try_at()
    if row.newest is not None and next_try_at is not None and now < next_try_at:
        seconds = (next_try_at - now).total_seconds()
        return _Missing(text=f"Starts again in {seconds:.0f} s, after {_describe(row.newest)}")
    if worker is not None:
        return _Missing(text=f"{worker.name} is lost and about to be replaced.")
    return _Missing(text="A worker is about to be started.")


def _what_it_does(worker: WorkerFact, facts: Facts, copies: Mapping[int, str]) -> str:
    node = next((node for node in facts.nodes if node.id == worker.node_id), None)
    where = f" on {node.name}" if node is not None else ""
    if worker.state in (WorkerState.REQUESTED, WorkerState.LAUNCHING):
        if node is not None and node.state != NodeState.ONLINE:
            return f"{worker.name} waits for {node.name}, which is {node.state.value}."
        if worker.node_id in copies:
            return f"{worker.name}{where}: {copies[worker.node_id]}."
    if worker.state in WORKER_STARTING:
        return f"{worker.name} is {worker.state.value}{where}."
    if worker.state == WorkerState.DRAINING:
        return f"{worker.name} finishes its requests and is replaced."
    return f"{worker.name} is {worker.state.value}{where}."


def _gave_up(row: Row, failure: Failure) -> str:
    if row.alike >= CRASH_LOOP:
        return f"Gave up after {row.alike} ends in a row: {_describe(failure)}"
    return f"Gave up: {_describe(failure)}"


def _describe(failure: Failure) -> str:
    cause = failure.cause.replace("_", " ") or "unknown cause"
    detail = failure.detail.rstrip(".")
    return f"{cause}: {detail}." if detail else f"{cause}."


def read_statuses(deployments: Iterable[Deployment]) -> dict[int, DeploymentStatus]:
    """The status of each deployment by id, in a handful of queries however many there are."""
    deployments = list(deployments)
    now = database_now()
    wishes = read_wishes(deployments)
    facts = read_facts(wishes)
    models = {deployment.pk: deployment.language_model_id for deployment in deployments}
    copies = _read_copies(set(models.values()))
    return {wish.id: derive(wish, facts, now, copies=copies.get(models[wish.id], {})) for wish in wishes}


def _read_copies(model_ids: set[int]) -> dict[int, dict[int, str]]:
    """By model and node: what is being done to get its files ready, with a percentage when known."""
    copies: dict[int, dict[int, str]] = {}
    being_made = ModelCopy.objects.filter(
        language_model_id__in=model_ids, state__in=[CopyState.FETCHING, CopyState.CONVERTING]
    )
    for copy in being_made:
        doing = copy.step or copy.state
        share = f", {100 * copy.done // copy.total} %" if copy.total else ""
        copies.setdefault(copy.language_model_id, {})[copy.node_id] = f"{doing}{share}"
    return copies
