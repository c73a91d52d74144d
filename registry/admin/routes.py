"""Routes: the public model names, with the deployments that answer them."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest

from registry.actions.routes import note_route_change
from registry.admin.common import by, timeline
from registry.models import Route, RouteTarget


class TargetInline(admin.TabularInline):
    model = RouteTarget
    extra = 1
    fields = ["deployment", "rank", "weight"]


@admin.register(Route)
class RouteAdmin(admin.ModelAdmin):
    list_display = ["name", "enabled", "answered_by"]
    list_filter = ["enabled"]
    search_fields = ["name"]
    fieldsets = [
        (None, {"fields": ["name", "enabled", "continues"]}),
        (
            "Times",
            {
                "fields": [
                    *("connect_seconds", "queue_seconds", "first_token_seconds"),
                    *("idle_seconds", "total_seconds"),
                ],
                "description": "In seconds.",
            },
        ),
        ("What happened", {"fields": ["events"]}),
    ]
    readonly_fields = ["events"]
    inlines = [TargetInline]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Route]:
        return super().get_queryset(request).prefetch_related("targets__deployment")

    @admin.display(description="answered by")
    def answered_by(self, obj: Route) -> str:
        targets = [
            f"{target.deployment} ({'fallback ' * (target.rank > 0)}weight {target.weight})"
            for target in obj.targets.all()
        ]
        return ", ".join(targets) or "nothing yet"

    @admin.display(description="timeline")
    def events(self, obj: Route) -> str:
        return timeline(obj)

    def save_related(self, request: HttpRequest, form: Any, formsets: Any, change: bool) -> None:
        super().save_related(request, form, formsets, change)
        note_route_change(route=form.instance, what="changed" if change else "created", by=by(request))

    def delete_model(self, request: HttpRequest, obj: Route) -> None:
        note_route_change(route=obj, what="deleted", by=by(request))
        obj.delete()

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Route]) -> None:
        for obj in queryset:
            self.delete_model(request, obj)
