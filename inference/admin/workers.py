"""Workers, as they are: nobody edits a fact."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.db.models.functions import Now
from django.http import HttpRequest
from django.template.defaultfilters import filesizeformat
from django.utils.html import format_html
from django.utils.safestring import SafeString

from inference.admin import effects
from inference.admin.badges import badge, bar
from inference.admin.live import LivePages, cell
from inference.admin.operations import Operates, Operation
from registry.actions.workers import retire_worker
from registry.admin.common import ReadOnlyAdmin, timeline
from registry.models import Worker
from registry.states import WORKER_LIVE, WORKER_STARTING, WORKER_TERMINAL


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


def progress_of(worker: Worker) -> SafeString | str:
    """A bar with its words for a worker that is loading; empty when nothing is under way."""
    if not worker.progress_step or worker.state not in WORKER_STARTING:
        return ""
    done, total = worker.progress_done, worker.progress_total
    if worker.progress_unit == "bytes":
        amount = filesizeformat(done) + (f" of {filesizeformat(total)}" if total else "")
    else:
        amount = f"{done}" + (f" of {total}" if total else "") + f" {worker.progress_unit}"
    percent = f", {100 * done // total} %" if total else ""
    return bar(done, total, f"{worker.progress_step}: {amount}{percent}")


@admin.register(Worker)
class WorkerAdmin(Operates, LivePages, ReadOnlyAdmin):
    list_display = [
        *("__str__", "now", "node", "deployment", "load", "kv_cache", "speed", "heard"),
        *("cause", "why"),
    ]
    list_select_related = ["node", "deployment"]
    list_filter = [Live, "state", "deployment", "node"]
    search_fields = ["name", "state_reason"]
    operations = (
        Operation(
            name="replace",
            label="Drain and replace",
            effect=effects.replace_effect,
            perform=lambda worker, _, who: retire_worker(worker=worker, by=who),
            done="it finishes its requests; another is started when it has ended.",
        ),
    )
    live_list = ("now", "load", "kv_cache", "speed", "heard", "why")
    live_form = (*live_list, "since", "work_done", "progress", "log", "events")
    fieldsets = [
        (None, {"fields": ["name", "epoch", "deployment", "revision", "node", "created_at"]}),
        ("State", {"fields": ["now", "since", "why", "progress", "cause", "exit_code", "ready_at"]}),
        ("Load", {"fields": ["load", "kv_cache", "speed", "work_done", "heard"]}),
        ("Process", {"fields": ["url", "pid", "engine_pid", "capabilities"]}),
        ("Log", {"fields": ["log"]}),
        ("Timeline", {"fields": ["events"]}),
    ]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Worker]:
        # One clock for the list and for the beats in it: the database's.
        return super().get_queryset(request).annotate(read_at=Now())  # type: ignore[no-any-return]

    @admin.display(description="state", ordering="state")
    def now(self, obj: Worker) -> str:
        return cell(obj, "now", badge(obj.state))

    @admin.display(description="since")
    def since(self, obj: Worker) -> str:
        return cell(obj, "since", f"{obj.state_changed_at:%Y-%m-%d %H:%M:%S}")

    @admin.display(description="why", ordering="state_reason")
    def why(self, obj: Worker) -> str:
        return cell(obj, "why", obj.state_reason or "-")

    @admin.display(description="load")
    def load(self, obj: Worker) -> str:
        return cell(obj, "load", f"{obj.running} running, {obj.waiting} waiting")

    @admin.display(description="KV cache")
    def kv_cache(self, obj: Worker) -> str:
        return cell(obj, "kv_cache", f"{obj.kv_use:.0%}")

    @admin.display(description="tokens/s")
    def speed(self, obj: Worker) -> str:
        return cell(obj, "speed", f"{obj.tokens_per_second:.1f}" if obj.tokens_per_second else "-")

    @admin.display(description="so far")
    def work_done(self, obj: Worker) -> str:
        return cell(obj, "work_done", f"{obj.steps} steps, {obj.tokens} tokens")

    @admin.display(description="heard", ordering="heartbeat_at")
    def heard(self, obj: Any) -> str:
        if obj.heartbeat_at is None:
            return cell(obj, "heard", "never")
        if obj.state in WORKER_TERMINAL:
            return cell(obj, "heard", f"{obj.heartbeat_at:%Y-%m-%d %H:%M:%S}")
        seconds = max(0.0, (obj.read_at - obj.heartbeat_at).total_seconds())
        return cell(obj, "heard", f"{seconds:.0f} s ago" if seconds >= 5 else "just now")

    @admin.display(description="progress")
    def progress(self, obj: Worker) -> str:
        return cell(obj, "progress", progress_of(obj) or "-")

    @admin.display(description="last lines")
    def log(self, obj: Worker) -> str:
        if obj.log_tail:
            return cell(obj, "log", format_html('<pre class="rh-log">{}</pre>', obj.log_tail))
        if obj.state in WORKER_TERMINAL:
            return cell(obj, "log", "It printed nothing.")
        return cell(obj, "log", "Nothing printed yet.")

    @admin.display(description="timeline")
    def events(self, obj: Worker) -> str:
        return cell(obj, "events", timeline(obj))
