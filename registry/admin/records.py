"""What is written once and only read: the ledger and the timeline."""

from __future__ import annotations

from django.contrib import admin

from registry.admin.common import ReadOnlyAdmin
from registry.models import Event


class UsageEventAdmin(ReadOnlyAdmin):
    """Registered by `inference`, which can also tell why a request went where it went."""

    list_display = [
        *("started_at", "project_name", "key_name", "route", "status", "outcome"),
        *("prompt_tokens", "completion_tokens", "ttft_ms", "duration_ms"),
    ]
    list_filter = ["outcome", "stream", "started_at"]
    search_fields = ["request_id", "key_name", "=key_public_id", "project_name", "route"]
    search_help_text = "Request id, key, project or model."
    date_hierarchy = "started_at"
    # Counting a long ledger on every page would take longer than the page.
    show_full_result_count = False


@admin.register(Event)
class EventAdmin(ReadOnlyAdmin):
    list_display = ["at", "kind", "object_name", "what", "reason", "by"]
    list_filter = ["kind", "at"]
    search_fields = ["object_name", "what", "reason", "by"]
    show_full_result_count = False
