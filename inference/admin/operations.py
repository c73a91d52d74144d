"""What an operator does to running things: a page shows the effect first, then it is confirmed.

The page is one URL per operation with the objects' ids in it, so lists and forms lead to the same one.
A GET changes nothing. What is confirmed is a wish in the database: it survives any restart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied, ValidationError
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import path, reverse

from inference.admin.live import ids_in
from registry.admin.common import by
from registry.errors import InvalidTransition, StillInUse

OBJECTS_AT_ONCE = 100
MOST_REPLICAS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One thing to do. `effect` says in sentences what would happen, `perform` makes it happen.

    Both get the object and, of an operation that `asks` for a number, that number (else 0). `perform`
    gets the person's name too, and may raise InvalidTransition, StillInUse or ValidationError.
    """

    name: str
    label: str
    effect: Callable[[Any, int], str]
    perform: Callable[[Any, int, str], None]
    asks: str = ""
    """The question for the number; empty: none is needed."""
    done: str
    """What to say afterwards."""


class Operates(admin.ModelAdmin):
    """Offers `operations` in the list's menu and above the form."""

    operations: Sequence[Operation] = ()

    def has_operate_permission(self, request: HttpRequest) -> bool:
        """Whoever may change the object may also operate it, also where its facts cannot be edited."""
        return bool(request.user.has_perm(f"registry.change_{self.opts.model_name}"))

    def get_urls(self) -> list[Any]:
        name = f"registry_{self.opts.model_name}_operate"
        view = self.admin_site.admin_view(self.operate_view)
        return [path("do/<slug:name>/", view, name=name), *super().get_urls()]

    def operation_url(self, operation: Operation, ids: Sequence[int]) -> str:
        url = reverse(f"admin:registry_{self.opts.model_name}_operate", args=[operation.name])
        return f"{url}?{urlencode([('id', pk) for pk in ids])}"

    def get_actions(self, request: HttpRequest) -> Any:
        actions: Any = super().get_actions(request)
        if self.has_operate_permission(request):
            for operation in self.operations:
                actions[operation.name] = (self._action(operation), operation.name, operation.label)
        return actions

    def _action(self, operation: Operation) -> Callable[..., HttpResponse]:
        def lead_to_page(
            model_admin: admin.ModelAdmin, request: HttpRequest, queryset: QuerySet[Any]
        ) -> HttpResponse:
            ids = list(queryset.values_list("pk", flat=True)[:OBJECTS_AT_ONCE])
            return HttpResponseRedirect(self.operation_url(operation, ids))

        return lead_to_page

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: Any = None,
    ) -> HttpResponse:
        tools = []
        if object_id is not None and object_id.isdecimal() and self.has_operate_permission(request):
            tools = [
                (operation.label, self.operation_url(operation, [int(object_id)]))
                for operation in self.operations
            ]
        return super().changeform_view(
            request, object_id, form_url, {**(extra_context or {}), "operations": tools}
        )

    def operate_view(self, request: HttpRequest, name: str) -> HttpResponse:
        operation = next((one for one in self.operations if one.name == name), None)
        if operation is None:
            raise Http404
        if not self.has_operate_permission(request):
            raise PermissionDenied
        given = request.POST if request.method == "POST" else request.GET
        ids = ids_in(given, OBJECTS_AT_ONCE)
        objs = list(self.get_queryset(request).filter(pk__in=ids))
        if not objs:
            messages.warning(request, f"Nothing to do: none of these {self.opts.verbose_name_plural} exists.")
            return HttpResponseRedirect(reverse(f"admin:registry_{self.opts.model_name}_changelist"))
        number, problem = _number(operation, given.get("number", ""))
        if request.method == "POST" and given.get("confirmed") and number is not None:
            return self._perform(request, operation, objs, number)
        effects = [] if number is None else [(obj, operation.effect(obj, number)) for obj in objs]
        context = {
            **self.admin_site.each_context(request),
            "title": operation.label,
            "opts": self.opts,
            "operation": operation,
            "objs": objs,
            "effects": effects,
            "number": given.get("number", ""),
            "problem": problem,
            "most": MOST_REPLICAS,
            "back": self._back(objs),
        }
        return TemplateResponse(request, "console/operation.html", context)

    def _perform(
        self, request: HttpRequest, operation: Operation, objs: Sequence[Any], number: int
    ) -> HttpResponse:
        done = []
        for obj in objs:
            try:
                operation.perform(obj, number, by(request))
            except (InvalidTransition, StillInUse) as error:
                messages.error(request, str(error))
            except ValidationError as error:
                messages.error(request, f"{obj}: {' '.join(error.messages)}")
            else:
                done.append(str(obj))
        if done:
            messages.success(request, f"{', '.join(done)}: {operation.done}")
        return HttpResponseRedirect(self._back(objs))

    def _back(self, objs: Sequence[Any]) -> str:
        name = f"admin:registry_{self.opts.model_name}"
        if len(objs) == 1:
            return reverse(f"{name}_change", args=[objs[0].pk])
        return reverse(f"{name}_changelist")


def _number(operation: Operation, text: str) -> tuple[int | None, str]:
    """The number that was given, and what is wrong with it. 0 where none is asked for."""
    if not operation.asks:
        return 0, ""
    if not text:
        return None, ""
    if not text.isdecimal() or int(text[:9]) > MOST_REPLICAS:
        return None, f"Give a whole number from 0 to {MOST_REPLICAS}."
    return int(text), ""
