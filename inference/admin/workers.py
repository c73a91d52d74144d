"""Workers, as they are: nobody edits a fact."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.html import format_html

from registry.admin.common import ReadOnlyAdmin, timeline
from registry.models import Worker
from registry.states import WORKER_LIVE


class Live(admin.SimpleListFilter):
    title = "life"
    parameter_name = "life"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("live", "Live"), ("ended", "Ended")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Worker]) -> QuerySet[Worker]:
        if self.value() == "live":
            return queryset.filter(state__in=WORKER_LIVE)
        if self.value() == "ended":
            return queryset.exclude(state__in=WORKER_LIVE)
        return queryset


@admin.register(Worker)
class WorkerAdmin(ReadOnlyAdmin):
    list_display = [
        *("__str__", "state", "node", "deployment", "load", "kv_cache", "speed", "heartbeat_at"),
        *("cause", "state_reason"),
    ]
    list_select_related = ["node", "deployment"]
    list_filter = [Live, "state", "deployment", "node"]
    search_fields = ["name", "state_reason"]
    fieldsets = [
        (None, {"fields": ["name", "epoch", "deployment", "revision", "node", "created_at"]}),
        (
            "State",
            {"fields": ["state", "state_changed_at", "state_reason", "cause", "exit_code", "ready_at"]},
        ),
        ("Load", {"fields": ["load", "kv_cache", "speed", "steps", "tokens", "heartbeat_at", "progress"]}),
        ("Process", {"fields": ["url", "pid", "engine_pid", "capabilities"]}),
        ("Log", {"fields": ["log"]}),
        ("Timeline", {"fields": ["events"]}),
    ]

    @admin.display(description="load")
    def load(self, obj: Worker) -> str:
        return f"{obj.running} running, {obj.waiting} waiting"

    @admin.display(description="KV cache")
    def kv_cache(self, obj: Worker) -> str:
        return f"{obj.kv_use:.0%}"

    @admin.display(description="tokens/s")
    def speed(self, obj: Worker) -> str:
        return f"{obj.tokens_per_second:.1f}" if obj.tokens_per_second else "-"

    @admin.display(description="progress")
    def progress(self, obj: Worker) -> str:
        if not obj.progress_step:
            return "-"
        of = f" of {obj.progress_total}" if obj.progress_total else ""
        return f"{obj.progress_step}: {obj.progress_done}{of} {obj.progress_unit}"

    @admin.display(description="last lines")
    def log(self, obj: Worker) -> str:
        return format_html("<pre>{}</pre>", obj.log_tail) if obj.log_tail else "-"

    @admin.display(description="timeline")
    def events(self, obj: Worker) -> str:
        return timeline(obj)
