"""Deployments: the wish, and beside it what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.views.main import ChangeList
from django.db.models import QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html, format_html_join

from inference.admin import effects
from inference.admin.badges import badge
from inference.admin.deployment_form import DeploymentForm
from inference.admin.live import LivePages, cell
from inference.admin.operations import Operates, Operation
from inference.admin.workers import progress_of
from inference.status import DeploymentStatus, read_statuses
from registry.actions.deployments import (
    delete_deployment,
    replicas_before_stop,
    restart_deployment,
    retry_deployment,
    save_deployment,
    scale_deployment,
)
from registry.admin.common import DeletesByAction, by, timeline
from registry.models import Deployment
from registry.upstreams import last4, url_of

WORKERS_SHOWN = 20


class WithStatus(ChangeList):
    """Reads the statuses of a whole page at once."""

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        deployments = list(self.result_list)
        statuses = read_statuses(deployments)
        for deployment in deployments:
            deployment.status = statuses.get(deployment.pk)
        self.result_list = deployments


OPERATIONS = (
    Operation(
        name="start",
        label="Start",
        effect=effects.start_effect,
        perform=lambda deployment, _, who: (
            scale_deployment(deployment=deployment, replicas=replicas_before_stop(deployment), by=who)
            if deployment.replicas == 0
            else None
        ),
        done="workers are started within a second or two.",
    ),
    Operation(
        name="stop",
        label="Stop",
        effect=effects.stop_effect,
        perform=lambda deployment, _, who: scale_deployment(deployment=deployment, replicas=0, by=who),
        done="workers finish their requests and end.",
    ),
    Operation(
        name="scale",
        label="Scale",
        effect=effects.scale_effect,
        perform=lambda deployment, number, who: scale_deployment(
            deployment=deployment, replicas=number, by=who
        ),
        asks="How many replicas?",
        done="the wish is changed.",
    ),
    Operation(
        name="restart",
        label="Restart",
        effect=effects.restart_effect,
        perform=lambda deployment, _, who: restart_deployment(deployment=deployment, by=who),
        done="workers are replaced one by one.",
    ),
)


@admin.register(Deployment)
class DeploymentAdmin(Operates, LivePages, DeletesByAction):
    form = DeploymentForm
    list_display = ["name", "status", "ready", "reason", "next_action", "engine", "language_model"]
    list_select_related = ["language_model"]
    list_filter = ["engine"]
    search_fields = ["name", "language_model__name"]
    actions = ["retry"]
    operations = OPERATIONS
    live_list = ("status", "ready", "reason", "next_action")
    live_form = (*live_list, "workers", "events")
    facts = ["status", "ready", "reason", "next_action", "revision", "workers", "events"]
    wish = [
        (None, {"fields": ["name", "language_model", "replicas", "slots"]}),
        ("Engine", {"fields": ["engine", "arguments", "environment"]}),
        ("Placement", {"fields": ["node_labels"]}),
        ("Dispatch", {"fields": ["policy", "queue_limit", "queue_tokens", "queue_seconds", "drain_seconds"]}),
    ]

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return WithStatus

    def get_fieldsets(self, request: HttpRequest, obj: Deployment | None = None) -> Any:
        if obj is None:
            return [*self.wish, ("Upstream", {"fields": ["new_key"]})]
        key = ["key"]
        if self.has_change_permission(request, obj):
            key += ["new_key", "remove_key"]
        return [("Now", {"fields": self.facts}), *self.wish, ("Upstream", {"fields": key})]

    def get_readonly_fields(self, request: HttpRequest, obj: Deployment | None = None) -> list[str]:
        # Workers and the ledger carry its name.
        return [] if obj is None else ["name", *self.facts, "key"]

    def prepare_live(self, objs: Sequence[Deployment]) -> None:
        statuses = read_statuses(objs)
        for deployment in objs:
            deployment.status = statuses.get(deployment.pk)  # type: ignore[attr-defined]

    def _status(self, obj: Deployment) -> DeploymentStatus | None:
        """The page's, or read for this one object."""
        if not hasattr(obj, "status"):
            obj.status = read_statuses([obj]).get(obj.pk)  # type: ignore[attr-defined]
        return obj.status  # type: ignore[attr-defined, no-any-return]

    @admin.display(description="status")
    def status(self, obj: Deployment) -> str:
        status = self._status(obj)
        return cell(obj, "status", badge(status.state) if status else "-")

    @admin.display(description="ready")
    def ready(self, obj: Deployment) -> str:
        status = self._status(obj)
        return cell(obj, "ready", f"{status.ready} of {status.wished}" if status else "-")

    @admin.display(description="reason")
    def reason(self, obj: Deployment) -> str:
        status = self._status(obj)
        return cell(obj, "reason", status.reason if status else "-")

    @admin.display(description="what to do")
    def next_action(self, obj: Deployment) -> str:
        status = self._status(obj)
        return cell(obj, "next_action", (status.next_action if status else "") or "-")

    @admin.display(description="workers")
    def workers(self, obj: Deployment) -> str:
        """The newest workers, each a link."""
        newest = obj.workers.select_related("node").order_by("-id")[:WORKERS_SHOWN]
        rows = format_html_join(
            "",
            '<tr><td><a href="{}">{}</a></td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>',
            (
                (
                    reverse("admin:registry_worker_change", args=[worker.pk]),
                    worker,
                    badge(worker.state),
                    worker.node,
                    f"{worker.running} running, {worker.waiting} waiting",
                    progress_of(worker) or worker.state_reason,
                )
                for worker in newest
            ),
        )
        table = format_html(
            "<table><thead><tr><th>Worker</th><th>State</th><th>Node</th><th>Load</th><th>Why</th></tr></thead>"
            "<tbody>{}</tbody></table>",
            rows,
        )
        return cell(obj, "workers", table if rows else "-")

    @admin.display(description="key")
    def key(self, obj: Deployment) -> str:
        """Of the server behind it: its last characters, and no more of it."""
        if not obj.upstream_key:
            return "none"
        shown = last4(obj.upstream_key, url_of(obj))
        return f"…{shown}" if shown else "cannot be read with this installation's secret key: give it again"

    @admin.display(description="timeline")
    def events(self, obj: Deployment) -> str:
        return cell(obj, "events", timeline(obj))

    def save_model(self, request: HttpRequest, obj: Deployment, form: Any, change: bool) -> None:
        save_deployment(deployment=obj, by=by(request), upstream_key=form.upstream_key)
        if not change:
            messages.info(
                request,
                format_html(
                    'Clients reach it through a <a href="{}">route</a>.',
                    reverse("admin:registry_route_add"),
                ),
            )

    def delete_by_action(self, obj: Deployment, who: str) -> None:
        delete_deployment(deployment=obj, by=who)

    @admin.action(description="Retry: forget past failures", permissions=["change"])
    def retry(self, request: HttpRequest, queryset: QuerySet[Deployment]) -> None:
        for deployment in queryset:
            retry_deployment(deployment=deployment, by=by(request))
        messages.success(request, "Those that gave up start again within a second.")
