"""What the admin pages share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.contrib import admin, messages
from django.db import models
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from registry.errors import StillInUse
from registry.models import Event

TIMELINE_LENGTH = 30


def by(request: HttpRequest) -> str:
    """Who does it, for the timeline."""
    return request.user.get_username()


def timeline(obj: models.Model) -> SafeString | str:
    """The last events of an object, newest first."""
    events = Event.objects.filter(kind=obj._meta.model_name, object_id=obj.pk)[:TIMELINE_LENGTH]
    rows = format_html_join(
        "",
        "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
        ((f"{event.at:%Y-%m-%d %H:%M:%S}", event.what, event.reason, event.by) for event in events),
    )
    if not rows:
        return "-"
    return format_html(
        "<table><thead><tr><th>When</th><th>What</th><th>Why</th><th>By whom</th></tr></thead>"
        "<tbody>{}</tbody></table>",
        rows,
    )


class ReadOnlyAdmin(admin.ModelAdmin):
    """Shows facts; changes none."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class DeletesByAction(admin.ModelAdmin):
    """Deletes through an action that may refuse, and then says why instead of failing."""

    def delete_by_action(self, obj: Any, who: str) -> None:
        """Raises StillInUse with the sentence to show."""
        raise TypeError("A subclass says which action deletes.")

    def get_deleted_objects(
        self, objs: Iterable[Any] | QuerySet[Any], request: HttpRequest
    ) -> tuple[list[Any], dict[str, int], set[str], list[Any]]:
        # The action alone decides: what hangs on the object goes with it, whoever may delete that by itself.
        deleted, count, _, _ = super().get_deleted_objects(objs, request)  # type: ignore[arg-type]
        return deleted, dict(count), set(), []

    def delete_view(self, request: HttpRequest, object_id: str, extra_context: Any = None) -> HttpResponse:
        try:
            return super().delete_view(request, object_id, extra_context)
        except StillInUse as error:
            messages.error(request, str(error))
            name = f"admin:{self.opts.app_label}_{self.opts.model_name}_change"
            return HttpResponseRedirect(reverse(name, args=[object_id]))

    def delete_model(self, request: HttpRequest, obj: Any) -> None:
        self.delete_by_action(obj, by(request))

    def get_actions(self, request: HttpRequest) -> Any:
        # One at a time: a refusal among many would be told beside "successfully deleted".
        actions = super().get_actions(request)
        actions.pop("delete_selected", None)
        return actions
