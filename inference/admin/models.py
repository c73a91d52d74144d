"""Language models: added on a page of their own, then followed while their files come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied, ValidationError
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.defaultfilters import filesizeformat
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils.html import format_html, format_html_join

from inference.admin.add_model import KINDS, AddModelForm, findings
from inference.admin.badges import badge, bar
from inference.admin.live import LivePages, cell
from inference.status import read_statuses
from inference.words import progress_in_words
from registry import chat_templates
from registry.admin.common import by, timeline
from registry.admin.language_models import LanguageModelAdmin
from registry.models import LanguageModel, ModelCopy
from registry.states import COPY_UNDER_WAY

admin.site.unregister(LanguageModel)


class ChangeModelForm(forms.ModelForm):
    library = forms.ChoiceField(
        required=False,
        label="Template of the library",
        choices=[("", "as written above"), *((name, name) for name in chat_templates.names())],
        help_text="Choose one and save: it takes the place of what is written above.",
    )

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or self.cleaned_data
        if chosen := cleaned.get("library"):
            cleaned["chat_template"] = chat_templates.read(chosen)
        return cleaned


@admin.register(LanguageModel)
class LanguageModelPages(LivePages, LanguageModelAdmin):
    """The registry's pages, made live, and the page "add a model"."""

    form = ChangeModelForm
    list_display = ["name", "files", "source", "context_length", "created_at"]
    live_list = ("files",)
    live_form = ("files", "deployed", "events")
    fields = [
        *("name", "source", "files", "deployed", "chat_template", "known_template", "library"),
        *("context_length", "created_at", "events"),
    ]

    def get_readonly_fields(self, request: HttpRequest, obj: LanguageModel | None = None) -> list[str]:
        return [*super().get_readonly_fields(request, obj), "files", "deployed", "known_template"]

    def get_queryset(self, request: HttpRequest) -> Any:
        return super().get_queryset(request).prefetch_related("copies__node", "deployments")

    @admin.display(description="files")
    def files(self, obj: LanguageModel) -> str:
        rows = format_html_join(
            "",
            "<div>{} {} {}</div>",
            ((copy.node, badge(copy.state), _progress_of(copy)) for copy in obj.copies.all()),
        )
        if not rows:
            return cell(obj, "files", "Fetched by the node that first needs them.")
        return cell(obj, "files", rows)

    @admin.display(description="deployments")
    def deployed(self, obj: LanguageModel) -> str:
        deployments = list(obj.deployments.all())
        statuses = read_statuses(deployments)
        rows = format_html_join(
            "",
            '<div><a href="{}">{}</a> {} {} {}</div>',
            (
                (
                    reverse("admin:registry_deployment_change", args=[deployment.pk]),
                    deployment,
                    badge(statuses[deployment.pk].state),
                    statuses[deployment.pk].reason,
                    statuses[deployment.pk].next_action,
                )
                for deployment in deployments
                if deployment.pk in statuses
            ),
        )
        if not rows:
            url = f"{reverse('admin:registry_deployment_add')}?language_model={obj.pk}&name={obj.name}"
            return cell(obj, "deployed", format_html('None yet. <a href="{}">Deploy it</a>', url))
        return cell(obj, "deployed", rows)

    @admin.display(description="which it is")
    def known_template(self, obj: LanguageModel) -> str:
        return (chat_templates.name_of(obj.chat_template) if obj.chat_template else None) or "-"

    @admin.display(description="timeline")
    def events(self, obj: LanguageModel) -> str:
        return cell(obj, "events", timeline(obj))

    def prepare_live(self, objs: Sequence[Any]) -> None:
        """What the cells need was read with the objects."""

    def add_view(self, request: HttpRequest, form_url: str = "", extra_context: Any = None) -> HttpResponse:
        """The page "add a model": "check" tells what is known of it, "add" adds it."""
        if not self.has_add_permission(request):
            raise PermissionDenied
        given = request.POST if request.method == "POST" else request.GET
        kind = given.get("kind", "source" if "source" in given else "hub")
        if kind not in KINDS:
            kind = "hub"
        may_deploy = request.user.has_perms(
            ["registry.add_deployment", "registry.add_route", "registry.view_deployment"]
        )
        form = AddModelForm(kind, request.POST or None, may_deploy=may_deploy)
        found: list[tuple[str, str]] = []
        if request.method == "POST" and form.is_valid():
            if "_check" not in request.POST:
                try:
                    return self._added(request, form.save(by(request)))
                except ValidationError as error:
                    form.add_error(None, " ".join(error.messages))
            else:
                found = findings(form)
        context = {
            **self.admin_site.each_context(request),
            "title": "Add a model",
            "opts": self.opts,
            "form": form,
            "kind": kind,
            "kinds": KINDS,
            "found": found,
            **(extra_context or {}),
        }
        return TemplateResponse(request, "console/add_model.html", context)

    def _added(self, request: HttpRequest, model: LanguageModel) -> HttpResponse:
        self.log_addition(request, model, [{"added": {}}])
        # The name not at its start: the admin begins each message with a capital letter.
        if model.deployments.exists():
            said = f"Added {model} and deployed it. This page follows its files as they come."
        else:
            said = f"Added {model}. Its files come with its first deployment."
        messages.success(request, said)
        if not self.has_view_or_change_permission(request):
            return HttpResponseRedirect(reverse("admin:index"))
        return HttpResponseRedirect(reverse("admin:registry_languagemodel_change", args=[model.pk]))


def _progress_of(copy: ModelCopy) -> str:
    """A bar with files, bytes, percent and time left; when done the size, when failed the cause."""
    if copy.state in COPY_UNDER_WAY:
        return bar(copy.done, copy.total, progress_in_words(**copy.progress()))
    if copy.detail:
        return copy.detail
    return filesizeformat(copy.size_bytes) if copy.size_bytes else ""
