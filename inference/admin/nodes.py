"""Nodes and the model copies on them."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import Count, Q, QuerySet
from django.http import HttpRequest
from django.template.defaultfilters import filesizeformat

from registry.actions.nodes import change_node, delete_node
from registry.admin.common import DeletesByAction, ReadOnlyAdmin, by, timeline
from registry.models import ModelCopy, Node
from registry.states import WORKER_LIVE


@admin.register(Node)
class NodeAdmin(DeletesByAction):
    """A node joins by itself; here it gets labels, or a cordon."""

    list_display = [
        "name",
        "state",
        "cordoned",
        "address",
        "live_workers",
        "memory",
        "last_seen_at",
        "version",
    ]
    list_filter = ["state", "cordoned"]
    search_fields = ["name", "address"]
    facts = [
        *("name", "state", "state_reason", "address", "live_workers", "memory", "cores"),
        *("last_seen_at", "version", "agent_pid", "created_at", "events"),
    ]
    fields = ["cordoned", "labels", *facts]
    readonly_fields = facts

    def get_queryset(self, request: HttpRequest) -> QuerySet[Node]:
        live = Count("workers", filter=Q(workers__state__in=WORKER_LIVE))
        return super().get_queryset(request).annotate(live=live)  # type: ignore[no-any-return]

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    @admin.display(description="live workers", ordering="live")
    def live_workers(self, obj: Any) -> int:
        return int(obj.live)

    @admin.display(description="free memory")
    def memory(self, obj: Node) -> str:
        return f"{filesizeformat(obj.memory_free_bytes)} of {filesizeformat(obj.memory_bytes)}"

    @admin.display(description="timeline")
    def events(self, obj: Node) -> str:
        return timeline(obj)

    def save_model(self, request: HttpRequest, obj: Node, form: Any, change: bool) -> None:
        change_node(node=obj, by=by(request))

    def delete_by_action(self, obj: Node, who: str) -> None:
        delete_node(node=obj, by=who)


@admin.register(ModelCopy)
class ModelCopyAdmin(ReadOnlyAdmin):
    list_display = ["language_model", "node", "state", "progress", "size", "updated_at", "detail"]
    list_select_related = ["language_model", "node"]
    list_filter = ["state", "node"]
    search_fields = ["language_model__name", "node__name"]

    @admin.display(description="progress")
    def progress(self, obj: ModelCopy) -> str:
        share = f" {100 * obj.done // obj.total} %" if obj.total else ""
        return f"{obj.step}{share}".strip() or "-"

    @admin.display(description="size")
    def size(self, obj: ModelCopy) -> str:
        return filesizeformat(obj.size_bytes)
