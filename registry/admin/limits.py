"""Limits."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django.http import HttpRequest

from registry.actions.limits import remove_limit, save_limit
from registry.adapters import model_names
from registry.admin.common import by, timeline
from registry.models import Limit
from registry.rights import matches_route


class LimitForm(forms.ModelForm):
    class Meta:
        model = Limit
        fields = [
            *("api_key", "project", "user", "route", "each", "each_route"),
            *("metric", "amount", "per", "burst", "when_redis_is_away"),
        ]

    def clean_route(self) -> str:
        route: str = self.cleaned_data["route"]
        # One whose model was deleted meanwhile may stay: it holds again when the model is back.
        if route and route != self.instance.route:
            names = model_names()
            if not any(matches_route([route], name) for name in names):
                raise ValidationError(f"There is no such model; known: {', '.join(names) or 'none'}.")
        return route


@admin.register(Limit)
class LimitAdmin(admin.ModelAdmin):
    form = LimitForm
    list_display = ["concerns", "allows", "when_redis_is_away"]
    list_display_links = ["concerns"]
    list_filter = ["metric", "per", "each", "when_redis_is_away"]
    list_select_related = ["api_key", "project", "user"]
    search_fields = ["route", "api_key__name", "=api_key__public_id", "project__name", "user__username"]
    search_help_text = "Key, project, person or model."
    raw_id_fields = ["api_key", "project", "user"]
    fieldsets = [
        ("Whose requests", {"fields": [("api_key", "project", "user"), "each", ("route", "each_route")]}),
        ("What they may use", {"fields": [("metric", "amount", "per"), "burst", "when_redis_is_away"]}),
        ("What it does", {"fields": ["effect", "events"]}),
    ]
    readonly_fields = ["effect", "events"]

    def get_fieldsets(self, request: HttpRequest, obj: Limit | None = None) -> Any:
        return self.fieldsets if obj is not None else self.fieldsets[:2]

    @admin.display(description="whose requests")
    def concerns(self, obj: Limit) -> str:
        return obj.concerns

    @admin.display(description="at most")
    def allows(self, obj: Limit) -> str:
        return obj.allows

    @admin.display(description="effect")
    def effect(self, obj: Limit) -> str:
        return obj.effect

    @admin.display(description="timeline")
    def events(self, obj: Limit) -> str:
        return timeline(obj)

    def save_model(self, request: HttpRequest, obj: Limit, form: Any, change: bool) -> None:
        save_limit(limit=obj, by=by(request))
        messages.info(request, f"{obj.effect} Every gateway goes by it within a second.")

    def delete_model(self, request: HttpRequest, obj: Limit) -> None:
        remove_limit(limit=obj, by=by(request))

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Limit]) -> None:
        for obj in queryset:
            remove_limit(limit=obj, by=by(request))
