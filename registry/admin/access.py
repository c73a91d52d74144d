"""Projects and API keys."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html

from registry.actions.api_keys import change_api_key, issue_api_key, revoke_api_key
from registry.actions.events import record_event
from registry.admin.common import by, timeline
from registry.models import ApiKey, Project, Route


@admin.register(Project)
class ProjectAdmin(admin.ModelAdmin):
    list_display = ["name", "created_at"]
    search_fields = ["name"]
    fields = ["name", "created_at", "events"]
    readonly_fields = ["created_at", "events"]

    @admin.display(description="timeline")
    def events(self, obj: Project) -> str:
        return timeline(obj)

    def save_model(self, request: HttpRequest, obj: Project, form: Any, change: bool) -> None:
        obj.save()
        record_event(obj, "changed" if change else "created", by=by(request))

    def delete_model(self, request: HttpRequest, obj: Project) -> None:
        record_event(obj, "deleted", by=by(request))
        obj.delete()

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Project]) -> None:
        for obj in queryset:
            self.delete_model(request, obj)


class ApiKeyForm(forms.ModelForm):
    routes = forms.MultipleChoiceField(
        required=False,
        widget=forms.CheckboxSelectMultiple,
        help_text="Models that it may use. None chosen: every model.",
    )

    class Meta:
        model = ApiKey
        fields = ["name", "project", "routes", "expires_at"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "routes" in self.fields:
            # A route that was deleted stays choosable where it is chosen.
            names = {*Route.objects.values_list("name", flat=True), *(self.instance.routes or [])}
            self.fields["routes"].choices = [(name, name) for name in sorted(names)]  # type: ignore[attr-defined]


class Usable(admin.SimpleListFilter):
    title = "state"
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("usable", "Usable"), ("ended", "Revoked or expired")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[ApiKey]) -> QuerySet[ApiKey]:
        usable = ApiKey.objects.usable(timezone.now())
        if self.value() == "usable":
            return queryset.filter(pk__in=usable)
        if self.value() == "ended":
            return queryset.exclude(pk__in=usable)
        return queryset


@admin.register(ApiKey)
class ApiKeyAdmin(admin.ModelAdmin):
    """A key is issued, perhaps changed, and revoked; never deleted, for the ledger names it."""

    form = ApiKeyForm
    list_display = ["name", "project", "shown", "state", "expires_at", "last_used_at", "created_at"]
    list_select_related = ["project"]
    list_filter = [Usable, "project"]
    search_fields = ["name", "public_id", "last4", "project__name"]
    actions = ["revoke"]
    facts = ["shown", "state", "last_used_at", "created_at", "created_by", "revoked_at", "events"]

    def get_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> Any:
        fields = ["name", "project", "routes", "expires_at"]
        return fields if obj is None else [*fields, *self.facts]

    def get_readonly_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> list[str]:
        if obj is None:
            return []
        if obj.revoked_at is not None:
            return ["name", "project", "routes", "expires_at", *self.facts]
        return ["project", *self.facts]

    def has_delete_permission(self, request: HttpRequest, obj: ApiKey | None = None) -> bool:
        return False

    @admin.display(description="key")
    def shown(self, obj: ApiKey) -> str:
        return f"sk-{obj.public_id}-…{obj.last4}"

    @admin.display(description="state")
    def state(self, obj: ApiKey) -> str:
        if obj.revoked_at is not None:
            return "revoked"
        return "usable" if obj.usable(timezone.now()) else "expired"

    @admin.display(description="timeline")
    def events(self, obj: ApiKey) -> str:
        return timeline(obj)

    def save_model(self, request: HttpRequest, obj: ApiKey, form: Any, change: bool) -> None:
        if change:
            change_api_key(api_key=obj, by=by(request))
            return
        issued, text = issue_api_key(
            name=obj.name,
            project=obj.project,
            routes=obj.routes,
            expires_at=obj.expires_at,
            by=by(request),
        )
        obj.pk = issued.pk
        obj.refresh_from_db()
        messages.success(
            request,
            format_html(
                "The key of {} is <code>{}</code>. Copy it now: it is not kept, and cannot be shown again.",
                obj.name,
                text,
            ),
        )

    def response_add(
        self, request: HttpRequest, obj: ApiKey, post_url_continue: str | None = None
    ) -> HttpResponse:
        return HttpResponseRedirect(reverse("admin:registry_apikey_changelist"))

    @admin.action(description="Revoke selected keys", permissions=["change"])
    def revoke(self, request: HttpRequest, queryset: QuerySet[ApiKey]) -> HttpResponse | None:
        """Asks first: it cannot be undone."""
        usable = queryset.filter(revoked_at__isnull=True).select_related("project")
        if request.POST.get("confirmed"):
            count = 0
            for api_key in usable:
                revoke_api_key(api_key=api_key, by=by(request))
                count += 1
            messages.success(request, f"{count} key(s) revoked; they are refused within a second.")
            return None
        context = {
            **self.admin_site.each_context(request),
            "title": "Revoke keys",
            "opts": self.opts,
            "keys": usable,
            "action_checkbox_name": ACTION_CHECKBOX_NAME,
        }
        return TemplateResponse(request, "admin/registry/revoke_keys.html", context)
