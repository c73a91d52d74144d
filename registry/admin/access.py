"""Projects and API keys."""

from __future__ import annotations

import re
from typing import Any, cast

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.core.exceptions import PermissionDenied
from django.core.paginator import Paginator
from django.db.models import Count, Q, QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import get_object_or_404
from django.template.response import TemplateResponse
from django.urls import path, reverse
from django.utils import timezone
from django.utils.functional import cached_property
from django.utils.html import format_html

from registry.actions.api_keys import (
    change_api_key,
    issue_api_key,
    no_room_in,
    revoke_api_key,
    rotate_api_key,
)
from registry.actions.projects import delete_project, remove_member, save_project, set_role
from registry.adapters import model_names
from registry.admin.common import DeletesByAction, by, timeline
from registry.errors import InvalidInput, InvalidTransition
from registry.key_pages import RotateForm, private, secrets_rows, secrets_table, shown_once
from registry.models import ApiKey, Membership, Project
from registry.querysets import ApiKeyQuerySet, may_own_keys
from registry.rights import Scope, validate_cidrs, validate_routes

FIELDS = [
    "name", "project", "owner", "routes", "scopes", "cidrs", "priority", "metadata", "expires_at",
]  # fmt: skip
PROJECTS_LISTED = 50
KEYS_PAGED = 10_000
"""The list shows so many; the others are found by searching."""
SHOWN_KEY = re.compile(r"sk-([0-9A-Za-z]{1,12})(?:-|\Z)")
PUBLIC_ID = re.compile(r"[0-9A-Za-z]{1,12}")


class MembershipInline(admin.TabularInline):
    model = Membership
    extra = 1
    fields = ["user", "role"]
    raw_id_fields = ["user"]


class ChosenForm(forms.ModelForm):
    """Routes and scopes are ticked; patterns of routes are written."""

    routes = forms.MultipleChoiceField(required=False, widget=forms.CheckboxSelectMultiple)
    patterns = forms.CharField(
        required=False,
        max_length=2000,
        label="Further routes",
        help_text="Those that match, also ones that come later: smol*, org/*. Separated by commas.",
    )
    scopes = forms.MultipleChoiceField(
        required=False, choices=Scope.choices, widget=forms.CheckboxSelectMultiple
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("routes", "scopes", "cidrs"):
            if name in self.fields:
                self.fields[name].help_text = self._meta.model._meta.get_field(name).help_text
        if "routes" in self.fields:
            chosen = self.instance.routes or []
            # A route that was deleted stays choosable where it is chosen.
            names = {
                *model_names(),
                *(name for name in chosen if "*" not in name),
            }
            self.fields["routes"].choices = [(name, name) for name in sorted(names)]  # type: ignore[attr-defined]
            self.initial["patterns"] = ", ".join(name for name in chosen if "*" in name)

    def clean_patterns(self) -> list[str]:
        patterns = [part.strip() for part in self.cleaned_data["patterns"].split(",") if part.strip()]
        validate_routes(patterns)
        for pattern in patterns:
            if "*" not in pattern:
                raise forms.ValidationError(f"{pattern} has no *: tick it above, if there is such a route.")
        return patterns

    def clean(self) -> dict[str, Any]:
        cleaned: dict[str, Any] = super().clean() or self.cleaned_data
        if "routes" in cleaned and "patterns" in cleaned:
            cleaned["routes"] = sorted({*cleaned["routes"], *cleaned["patterns"]})
        if "scopes" in cleaned:
            cleaned["scopes"] = sorted(cleaned["scopes"])
        return cleaned


class ProjectForm(ChosenForm):
    class Meta:
        model = Project
        fields = ["name", "time_zone", "routes", "scopes", "priority", "key_days", "max_keys"]


@admin.register(Project)
class ProjectAdmin(DeletesByAction):
    """What a project does not allow, none of its keys may do."""

    form = ProjectForm
    list_display = ["name", "keys", "people", "time_zone", "created_at"]
    search_fields = ["name"]
    fieldsets = [
        (None, {"fields": ["name", "time_zone"]}),
        ("What its keys may do", {"fields": ["routes", "patterns", "scopes"]}),
        ("What its members may give to keys", {"fields": ["priority", "key_days", "max_keys"]}),
        (None, {"fields": ["created_at", "events"]}),
    ]
    readonly_fields = ["created_at", "events"]
    inlines = [MembershipInline]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Project]:
        return Project.objects.annotate(people=Count("memberships"))

    @admin.display(description="keys")
    def keys(self, obj: Project) -> str:
        # Not how many: a project may have a million.
        url = reverse("admin:registry_apikey_changelist")
        return format_html('<a href="{}?project={}">show</a>', url, obj.pk)

    @admin.display(description="members")
    def people(self, obj: Any) -> int:
        count: int = obj.people
        return count

    @admin.display(description="timeline")
    def events(self, obj: Project) -> str:
        return timeline(obj)

    def save_model(self, request: HttpRequest, obj: Project, form: Any, change: bool) -> None:
        save_project(project=obj, by=by(request))

    def save_formset(self, request: HttpRequest, form: Any, formset: Any, change: bool) -> None:
        formset.save(commit=False)
        project, who = form.instance, by(request)
        for gone in formset.deleted_objects:
            remove_member(project=project, user=gone.user, by=who)
        for membership, _ in formset.changed_objects:
            before = Membership.objects.filter(pk=membership.pk).select_related("user").first()
            if before is not None and before.user_id != membership.user_id:
                remove_member(project=project, user=before.user, by=who)
            set_role(project=project, user=membership.user, role=membership.role, by=who)
        for membership in formset.new_objects:
            set_role(project=project, user=membership.user, role=membership.role, by=who)

    def delete_by_action(self, obj: Project, who: str) -> None:
        delete_project(project=obj, by=who)


class ApiKeyForm(ChosenForm):
    cidrs = forms.CharField(required=False, label="Addresses", widget=forms.TextInput(attrs={"size": 80}))

    class Meta:
        model = ApiKey
        fields = FIELDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "cidrs" in self.fields:
            self.fields["cidrs"].help_text += " Separated by commas."
            self.initial["cidrs"] = ", ".join(self.instance.cidrs or [])
        if "priority" in self.fields:
            self.fields["priority"].required = False

    def clean_priority(self) -> str:
        # What is not said stays as it is.
        given: str = self.cleaned_data["priority"]
        return given or self.instance.priority

    def clean_metadata(self) -> dict[str, str]:
        return self.cleaned_data["metadata"] or {}

    def clean_cidrs(self) -> list[str]:
        cidrs = [part.strip() for part in self.cleaned_data["cidrs"].split(",") if part.strip()]
        validate_cidrs(cidrs)
        return cidrs

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean()
        if self.errors:
            return cleaned
        project = cleaned.get("project") or self.instance.project
        owner = cleaned.get("owner")
        if owner is not None and not may_own_keys(owner, project):
            self.add_error("owner", f"Must be an active owner or member of {project}.")
        if self.instance.pk is None and (full := no_room_in(project)):
            self.add_error("project", full)
        return cleaned


class Usable(admin.SimpleListFilter):
    title = "state"
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("usable", "Usable"), ("ended", "Revoked or expired")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[ApiKey]) -> QuerySet[ApiKey]:
        keys = cast(ApiKeyQuerySet, queryset)
        if self.value() == "usable":
            return keys.usable(timezone.now())
        if self.value() == "ended":
            return keys.ended(timezone.now())
        return queryset


class OfProject(admin.SimpleListFilter):
    """Of many projects only the chosen one: their list would cost more than the keys."""

    title = "project"
    parameter_name = "project"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        projects = Project.objects.all()[: PROJECTS_LISTED + 1]
        if len(projects) > PROJECTS_LISTED:
            projects = Project.objects.filter(pk=self._chosen())
        return [(str(project.pk), project.name) for project in projects]

    def queryset(self, request: HttpRequest, queryset: QuerySet[ApiKey]) -> QuerySet[ApiKey]:
        return queryset.filter(project_id=self._chosen()) if self.value() else queryset

    def _chosen(self) -> int:
        text = self.value() or ""
        # No project has the number 0.
        return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


class FirstKeys(Paginator):
    """Counts no further than anybody turns pages: counting a million keys takes longer than finding one."""

    @cached_property
    def count(self) -> int:
        keys = cast(QuerySet[ApiKey], self.object_list)
        return keys.order_by()[:KEYS_PAGED].count()


@admin.register(ApiKey)
class ApiKeyAdmin(admin.ModelAdmin):
    """A key is issued, perhaps changed or rotated, and revoked; never deleted, for the ledger names it."""

    form = ApiKeyForm
    list_display = ["name", "project", "shown", "state", "expires_at", "last_used_at", "created_at"]
    list_select_related = ["project"]
    list_filter = [Usable, OfProject]
    list_per_page = 50
    paginator = FirstKeys
    search_fields = ["name"]
    search_help_text = (
        "The beginning of a name, or of a key as far as it is shown, or its last four characters, "
        "or a project's whole name."
    )
    show_full_result_count = False
    raw_id_fields = ["owner"]
    actions = ["revoke"]
    facts = ["shown", "state", "secrets", "created_at", "created_by", "revoked_at", "events"]
    change_form_template = "admin/registry/change_key.html"
    change_list_template = "admin/registry/key_list.html"

    class Media:
        js = ["registry/secrets.js"]

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> Any:
        return super().changelist_view(request, {**(extra_context or {}), "most": KEYS_PAGED})

    def get_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> Any:
        if obj is not None and obj.revoked_at is not None:
            return [*FIELDS, *self.facts]
        at = FIELDS.index("routes") + 1
        return [*FIELDS[:at], "patterns", *FIELDS[at:], *(self.facts if obj is not None else [])]

    def get_readonly_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> list[str]:
        if obj is None:
            return []
        if obj.revoked_at is not None:
            return [*FIELDS, *self.facts]
        return ["project", *self.facts]

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        # Beginnings only: each of these has an index, and there may be a million keys.
        text = search_term.strip()
        if not text:
            return queryset, False
        if match := SHOWN_KEY.match(text):
            return queryset.filter(public_id__startswith=match[1]), False
        asked = Q(name__istartswith=text)
        if projects := list(Project.objects.filter(name=text).values_list("pk", flat=True)):
            asked |= Q(project__in=projects)
        if PUBLIC_ID.fullmatch(text):
            asked |= Q(public_id__startswith=text)
            if len(text) == 4:
                asked |= Q(last4=text)
        return queryset.filter(asked), False

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

    @admin.display(description="secrets")
    def secrets(self, obj: ApiKey) -> str:
        return secrets_table(obj, reverse("admin:registry_apikey_secrets", args=[obj.pk]))

    @admin.display(description="timeline")
    def events(self, obj: ApiKey) -> str:
        return timeline(obj)

    def get_urls(self) -> Any:
        view = self.admin_site.admin_view
        return [
            path("<int:pk>/secrets/", view(self.secrets_view), name="registry_apikey_secrets"),
            path("<int:pk>/rotate/", view(self.rotate_view), name="registry_apikey_rotate"),
            *super().get_urls(),
        ]

    def secrets_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        """The table of secrets as it is now, for the page that shows it."""
        api_key = get_object_or_404(ApiKey, pk=pk)
        if not self.has_view_permission(request, api_key):
            raise PermissionDenied
        return private(HttpResponse(secrets_rows(api_key)))

    def rotate_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        """Asks for the overlap, then shows the new secret once."""
        api_key = get_object_or_404(ApiKey, pk=pk)
        if not self.has_change_permission(request, api_key):
            raise PermissionDenied
        form = RotateForm(request.POST if request.method == "POST" else None)
        back = reverse("admin:registry_apikey_change", args=[pk])
        if form.is_valid():
            try:
                text = rotate_api_key(api_key=api_key, by=by(request), overlap=form.cleaned_data["overlap"])
            except (InvalidInput, InvalidTransition) as error:
                messages.error(request, str(error))
            else:
                messages.success(request, shown_once(api_key.name, text))
            return HttpResponseRedirect(back)
        context = {
            **self.admin_site.each_context(request),
            "title": f"Rotate {api_key.name}",
            "opts": self.opts,
            "key": api_key,
            "form": form,
            "back": back,
        }
        return TemplateResponse(request, "admin/registry/rotate_key.html", context)

    def save_model(self, request: HttpRequest, obj: ApiKey, form: Any, change: bool) -> None:
        if change:
            change_api_key(api_key=obj, by=by(request))
            return
        issued, text = issue_api_key(
            by=by(request),
            project=obj.project,
            **{name: getattr(obj, name) for name in FIELDS if name != "project"},
        )
        obj.pk = issued.pk
        obj.refresh_from_db()
        messages.success(request, shown_once(obj.name, text))

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
