"""The block at the top of the admin's first page: what there is, and what needs attention.

It shows a person only what they may view elsewhere, and says nothing of what is well.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.db.models import Count, Q, Sum
from django.db.models.functions import Coalesce
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils.safestring import SafeString

from inference.admin.badges import badge
from inference.admin.live import staff_only
from inference.status import DeploymentState, read_statuses
from registry.models import Deployment, Node, UsageEvent, Worker
from registry.querysets import database_now
from registry.states import NodeState, Outcome, WorkerState

RECENT = timedelta(minutes=5)
ATTENTION_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    badge: SafeString
    url: str
    name: str
    why: str
    what_to_do: str = ""


def read_dashboard(user: Any) -> dict[str, Any]:
    """The context of `console/dashboard.html`, in a handful of queries."""
    context: dict[str, Any] = {
        "sees_fleet": user.has_perms(
            ["registry.view_node", "registry.view_deployment", "registry.view_worker"]
        ),
        "sees_usage": user.has_perm("registry.view_usageevent"),
    }
    if context["sees_fleet"]:
        context |= _fleet()
    if context["sees_usage"]:
        context["usage"] = _usage()
    return context


def _fleet() -> dict[str, Any]:
    nodes = list(Node.objects.all())
    deployments = list(Deployment.objects.all())
    statuses = read_statuses(deployments)
    counted = Counter(status.state for status in statuses.values())
    load = Worker.objects.live().aggregate(
        ready=Count("id", filter=Q(state=WorkerState.READY)),
        running=Coalesce(Sum("running"), 0),
        waiting=Coalesce(Sum("waiting"), 0),
    )
    attention = [
        Attention(
            badge=badge(node.state),
            url=reverse("admin:registry_node_change", args=[node.pk]),
            name=node.name,
            why=node.state_reason or "its agent is silent.",
        )
        for node in nodes
        if node.state in (NodeState.SUSPECT, NodeState.OFFLINE) and not node.cordoned
    ]
    for deployment in deployments:
        status = statuses.get(deployment.pk)
        if status is None:
            continue
        needs = status.state in (DeploymentState.FAILED, DeploymentState.DEGRADED) or status.next_action
        if needs:
            attention.append(
                Attention(
                    badge=badge(status.state),
                    url=reverse("admin:registry_deployment_change", args=[deployment.pk]),
                    name=deployment.name,
                    why=status.reason,
                    what_to_do=status.next_action,
                )
            )
    return {
        "nodes": len(nodes),
        "online": sum(node.state == NodeState.ONLINE for node in nodes),
        "cordoned": sum(node.cordoned for node in nodes),
        "deployments": len(deployments),
        "by_status": [
            badge(state, f"{counted[state]} {state}") for state in DeploymentState if counted[state]
        ],
        "attention": attention[:ATTENTION_SHOWN],
        **load,
    }


def _usage() -> dict[str, int]:
    """Uses index usage_by_time_idx."""
    return UsageEvent.objects.filter(started_at__gte=database_now() - RECENT).aggregate(
        requests=Count("id"),
        failed=Count("id", filter=Q(outcome__in=[Outcome.FAILED, Outcome.INTERRUPTED])),
        tokens_in=Coalesce(Sum("prompt_tokens"), 0),
        tokens_out=Coalesce(Sum("completion_tokens"), 0),
    )


@staff_only
def dashboard_view(request: HttpRequest) -> HttpResponse:
    """The same block, fetched anew."""
    return TemplateResponse(request, "console/dashboard.html", read_dashboard(request.user))
