"""Which models a person can choose from, and how each of them is right now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from inference.status import DeploymentState, DeploymentStatus, read_statuses
from registry.models import Deployment, Route, Worker
from registry.states import WORKER_STARTING

CHAT = "endpoint:chat"
BEST_FIRST = (
    DeploymentState.READY,
    DeploymentState.DEGRADED,
    DeploymentState.STARTING,
    DeploymentState.FAILED,
    DeploymentState.STOPPED,
)


def list_models() -> list[dict[str, str]]:
    """Every enabled route that leads to a model one can talk to: name, state, and what is being done."""
    routes = list(
        Route.objects.filter(enabled=True, targets__isnull=False)
        .distinct()
        .order_by("name")
        .prefetch_related("targets__deployment")
    )
    deployments = {
        target.deployment_id: target.deployment for route in routes for target in route.targets.all()
    }
    silent = _without_chat(deployments.values())
    statuses = read_statuses(list(deployments.values()))
    loading = _loading(deployments)
    listed = []
    for route in routes:
        talking = [
            target.deployment_id for target in route.targets.all() if target.deployment_id not in silent
        ]
        if talking:
            best = min(talking, key=lambda id_: BEST_FIRST.index(statuses[id_].state))
            status = statuses[best]
            listed.append(
                {
                    "name": route.name,
                    "state": status.state.value,
                    "detail": _detail(status, loading.get(best)),
                }
            )
    return listed


def _without_chat(deployments: Iterable[Deployment]) -> set[int]:
    """Deployments whose workers say that they do other things. Who said nothing is taken to chat."""
    told: dict[int, Any] = dict(
        Worker.objects.filter(deployment__in=[deployment.pk for deployment in deployments])
        .exclude(capabilities=[])
        .order_by("id")
        .values_list("deployment_id", "capabilities")
    )
    silent = set()
    for deployment in deployments:
        endpoints = [name for name in told.get(deployment.pk, ()) if name.startswith("endpoint:")]
        if (endpoints and CHAT not in endpoints) or (not endpoints and deployment.engine == "embedding"):
            silent.add(deployment.pk)
    return silent


def _loading(deployments: Iterable[int]) -> dict[int, str]:
    """By deployment, how far a worker of it is with starting."""
    workers = Worker.objects.filter(deployment__in=list(deployments), state__in=WORKER_STARTING)
    loading = {}
    for worker in workers.exclude(progress_step="").order_by("id"):
        share = f", {100 * worker.progress_done // worker.progress_total} %" if worker.progress_total else ""
        loading[worker.deployment_id] = f"{worker.progress_step}{share}"
    return loading


def _detail(status: DeploymentStatus, loading: str | None) -> str:
    """For people who are no operators: no machine's name, no log line."""
    match status.state:
        case DeploymentState.READY:
            return ""
        case DeploymentState.STARTING:
            return loading or "starting"
        case DeploymentState.DEGRADED:
            return f"{status.ready} of {status.wished} replicas serve"
        case DeploymentState.FAILED:
            cause = status.cause.replace("_", " ")
            return f"it could not be started: {cause}" if cause else "it could not be started"
        case DeploymentState.STOPPED:
            return "scaled to 0"
