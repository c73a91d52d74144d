"""Nodes and the model copies on them."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import Count, Q, QuerySet
from django.http import HttpRequest
from django.template.defaultfilters import filesizeformat

from inference.admin import effects
from inference.admin.badges import badge, bar
from inference.admin.live import LivePages, cell
from inference.admin.operations import Operates, Operation
from registry.actions.nodes import change_node, cordon_node, delete_node
from registry.admin.common import DeletesByAction, ReadOnlyAdmin, by, timeline
from registry.models import ModelCopy, Node
from registry.states import WORKER_LIVE


@admin.register(Node)
class NodeAdmin(Operates, LivePages, DeletesByAction):
    """A node joins by itself; here it gets labels, or a cordon."""

    list_display = ["name", "now", "may_get_workers", "address", "live_workers", "memory", "seen", "version"]
    operations = (
        Operation(
            name="cordon",
            label="Cordon",
            effect=effects.cordon_effect,
            perform=lambda node, _, who: cordon_node(node=node, cordoned=True, by=who),
            done="no new worker goes there.",
        ),
        Operation(
            name="uncordon",
            label="Uncordon",
            effect=effects.uncordon_effect,
            perform=lambda node, _, who: cordon_node(node=node, cordoned=False, by=who),
            done="new workers may go there.",
        ),
    )
    live_list = ("now", "may_get_workers", "live_workers", "memory", "seen")
    live_form = ("now", "live_workers", "memory", "seen", "events")
    list_filter = ["state", "cordoned"]
    search_fields = ["name", "address"]
    facts = [
        *("name", "now", "state_reason", "address", "live_workers", "memory", "cores"),
        *("seen", "version", "agent_pid", "created_at", "events"),
    ]
    fields = ["cordoned", "labels", *facts]
    readonly_fields = facts

    def get_queryset(self, request: HttpRequest) -> QuerySet[Node]:
        live = Count("workers", filter=Q(workers__state__in=WORKER_LIVE))
        return super().get_queryset(request).annotate(live=live)  # type: ignore[no-any-return]

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    @admin.display(description="state", ordering="state")
    def now(self, obj: Node) -> str:
        return cell(obj, "now", badge(obj.state))

    @admin.display(description="new workers", ordering="cordoned")
    def may_get_workers(self, obj: Node) -> str:
        return cell(obj, "may_get_workers", badge("stopped", "cordoned") if obj.cordoned else "welcome")

    @admin.display(description="live workers", ordering="live")
    def live_workers(self, obj: Any) -> str:
        return cell(obj, "live_workers", obj.live)

    @admin.display(description="free memory")
    def memory(self, obj: Node) -> str:
        free, whole = filesizeformat(obj.memory_free_bytes), filesizeformat(obj.memory_bytes)
        return cell(obj, "memory", f"{free} of {whole}")

    @admin.display(description="last seen", ordering="last_seen_at")
    def seen(self, obj: Node) -> str:
        return cell(obj, "seen", f"{obj.last_seen_at:%Y-%m-%d %H:%M}" if obj.last_seen_at else "never")

    @admin.display(description="timeline")
    def events(self, obj: Node) -> str:
        return cell(obj, "events", timeline(obj))

    def save_model(self, request: HttpRequest, obj: Node, form: Any, change: bool) -> None:
        change_node(node=obj, by=by(request))

    def delete_by_action(self, obj: Node, who: str) -> None:
        delete_node(node=obj, by=who)


@admin.register(ModelCopy)
class ModelCopyAdmin(LivePages, ReadOnlyAdmin):
    list_display = ["language_model", "node", "now", "progress", "size", "updated_at", "detail"]
    live_list = ("now", "progress", "size")
    list_select_related = ["language_model", "node"]
    list_filter = ["state", "node"]
    search_fields = ["language_model__name", "node__name"]

    @admin.display(description="state", ordering="state")
    def now(self, obj: ModelCopy) -> str:
        return cell(obj, "now", badge(obj.state))

    @admin.display(description="progress")
    def progress(self, obj: ModelCopy) -> str:
        share = f"{obj.step} {100 * obj.done // obj.total} %" if obj.total else obj.step
        return cell(obj, "progress", bar(obj.done, obj.total, share.strip() or "-"))

    @admin.display(description="size")
    def size(self, obj: ModelCopy) -> str:
        return cell(obj, "size", filesizeformat(obj.size_bytes))
