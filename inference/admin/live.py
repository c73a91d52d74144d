"""Pages that keep themselves fresh: every two seconds they ask for the cells that changed.

A live cell is an element with an id, found again by htmx (`hx-swap-oob`). The poller carries a digest of
each cell that the page shows, so that an unchanged page costs an empty answer, and nothing that is being
read or selected is replaced without need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlencode
from zlib import crc32

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db import models
from django.http import Http404, HttpRequest, HttpResponse, QueryDict
from django.template.response import TemplateResponse
from django.urls import path, reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.views.decorators.cache import never_cache

OBJECTS_AT_ONCE = 200


def cell(obj: models.Model, name: str, content: object) -> SafeString:
    """What a display method named in `live_list` or `live_form` returns."""
    return format_html(
        '<div class="rh-cell" id="live-{}-{}-{}" hx-swap-oob="true">{}</div>',
        obj._meta.model_name,
        obj.pk,
        name,
        content,
    )


def ids_in(given: QueryDict, most: int) -> list[int]:
    """The ids that were sent as `id`; what cannot be one is left out."""
    # 18 digits: more may not fit the database's integers.
    return [int(text) for text in given.getlist("id")[:most] if text.isdecimal() and len(text) <= 18]


def staff_only(view: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
    """For fragments: 403 instead of a login page, which would be put into the middle of another page."""

    @never_cache
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        if not admin.site.has_permission(request):
            raise PermissionDenied
        return view(request, *args, **kwargs)

    return guarded


class LivePages(admin.ModelAdmin):
    """Lists and forms whose live cells follow the facts. For people who may view the objects."""

    change_list_template = "console/change_list.html"
    change_form_template = "console/change_form.html"
    list_per_page = 50
    live_list: Sequence[str] = ()
    live_form: Sequence[str] = ()

    def prepare_live(self, objs: Sequence[Any]) -> None:
        """Read what the cells of all these objects need, at once."""

    def get_urls(self) -> list[Any]:
        name = f"registry_{self.opts.model_name}_live"
        view = staff_only(self.live_view)
        return [path("live/<slug:page>/", view, name=name), *super().get_urls()]

    def live_view(self, request: HttpRequest, page: str) -> HttpResponse:
        """The cells that differ from those that the page shows; 204 when none does."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        names = {"list": self.live_list, "form": self.live_form}.get(page)
        ids = ids_in(request.GET, OBJECTS_AT_ONCE)
        if names is None or not ids:
            raise Http404
        objs = list(self.get_queryset(request).filter(pk__in=ids).order_by("pk"))
        self.prepare_live(objs)
        cells = [str(getattr(self, name)(obj)) for obj in objs for name in names]
        digests = [f"{crc32(text.encode()):08x}" for text in cells]
        shown = request.GET.get("was", "").split(".")
        if shown == digests:
            return HttpResponse(status=204)
        if len(shown) == len(digests):
            cells = [text for text, old, new in zip(cells, shown, digests, strict=True) if old != new]
        poller = self.poller(page, [obj.pk for obj in objs], digests)
        return HttpResponse("\n".join([*cells, poller]))

    def poller(self, page: str, ids: Iterable[int], digests: Iterable[str] = ()) -> SafeString:
        """The element that asks. Without digests it is told everything."""
        url = reverse(f"admin:registry_{self.opts.model_name}_live", args=[page])
        query = urlencode([*(("id", pk) for pk in ids), ("was", ".".join(digests))])
        return format_html(
            '<div id="live-poll" hx-get="{}?{}" hx-trigger="every 2s" hx-swap="none" '
            'hx-swap-oob="true"></div>',
            url,
            query,
        )

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        response = super().changelist_view(request, extra_context)
        if isinstance(response, TemplateResponse) and response.context_data:
            shown = response.context_data.get("cl")
            ids = [obj.pk for obj in shown.result_list][:OBJECTS_AT_ONCE] if shown is not None else []
            if ids:
                response.context_data["live"] = self.poller("list", sorted(ids))
        return response

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: Any = None,
    ) -> HttpResponse:
        response = super().changeform_view(request, object_id, form_url, extra_context)
        if isinstance(response, TemplateResponse) and response.context_data:
            original = response.context_data.get("original")
            if original is not None and self.live_form:
                response.context_data["live"] = self.poller("form", [original.pk])
        return response
