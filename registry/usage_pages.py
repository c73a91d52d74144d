"""The usage report in the browser: `/usage/` for one's own keys, `/admin/usage/` for everybody's.

The whole question stands in the URL. With `format=json`, `ndjson` or `csv` the same question is answered
for programs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Any
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

from asgiref.sync import sync_to_async
from django import forms
from django.contrib.auth.views import redirect_to_login
from django.core.exceptions import PermissionDenied
from django.core.handlers.asgi import ASGIRequest
from django.http import (
    Http404,
    HttpRequest,
    HttpResponseBase,
    JsonResponse,
    StreamingHttpResponse,
)
from django.shortcuts import render

from registry.exports import Export, in_blocks, time_text
from registry.models import ApiKey
from registry.querysets import database_now
from registry.reports import Dimension, Figures, Row, UsageQuery, Width, midnight

DEFAULT_DAYS = 30
MAX_DAYS = {Width.DAY: 400, Width.HOUR: 31}
TOP = 20
"""Keys and models that the page lists; the rest is one line."""
CONTENT_TYPES = {
    "csv": "text/csv; charset=utf-8",
    "json": "application/json",
    "ndjson": "application/x-ndjson",
}


def user_key(user_id: int) -> str:
    """The public id under which a person's chats are accounted."""
    return f"user-{user_id}"


def own_keys(user: Any) -> frozenset[str]:
    """Public ids of the keys that a person made, and of their chats."""
    made = ApiKey.objects.filter(created_by=user.get_username())
    return frozenset([*made.values_list("public_id", flat=True), user_key(user.pk)])


class Filters(forms.Form):
    """What the URL asks. Everything has a default."""

    key = forms.CharField(required=False, max_length=16)
    model = forms.CharField(required=False, max_length=120)
    zone = forms.CharField(required=False, max_length=64)
    width = forms.ChoiceField(required=False, choices=[(width.value, "") for width in MAX_DAYS])
    split = forms.CharField(required=False, max_length=64)
    format = forms.ChoiceField(required=False, choices=[(name, "") for name in CONTENT_TYPES])

    def __init__(self, data: Any, today: datetime) -> None:
        super().__init__(data)
        self._now = today
        # `from` is a word of Python's.
        self.fields["from"] = forms.DateField(required=False)
        self.fields["to"] = forms.DateField(required=False)

    def clean_zone(self) -> tzinfo:
        name = self.cleaned_data["zone"]
        if name in ("", "UTC"):
            return UTC
        try:
            return ZoneInfo(name)
        except (KeyError, ValueError, OSError) as error:
            raise forms.ValidationError("Name a time zone such as UTC or Europe/Vienna.") from error

    def clean_split(self) -> frozenset[Dimension]:
        text = self.cleaned_data["split"] if "split" in self.data else "key,model"
        try:
            return frozenset(Dimension(word) for word in text.split(",") if word)
        except ValueError as error:
            allowed = ", ".join(dimension.value for dimension in Dimension)
            raise forms.ValidationError(f"Split by any of {allowed}.") from error

    def clean(self) -> dict[str, Any]:
        cleaned: dict[str, Any] = self.cleaned_data
        if self.errors:
            return cleaned
        width = cleaned["width"] = Width(cleaned["width"] or "day")
        last = cleaned["to"] = cleaned["to"] or self._now.astimezone(cleaned["zone"]).date()
        default = DEFAULT_DAYS if width is Width.DAY else 2
        try:
            first = cleaned["from"] = cleaned["from"] or last - timedelta(days=default - 1)
            days = (last - first).days + 1
            # Room for the period before and for every time zone.
            first - timedelta(days=days + 1), last + timedelta(days=2)
        except OverflowError:
            raise forms.ValidationError({"from": "That is too far away."}) from None
        if days < 1:
            self.add_error("to", "The last day is before the first.")
        elif days > MAX_DAYS[width]:
            self.add_error(
                "from", f"At most {MAX_DAYS[width]} days can be shown by {width.value}; this is {days}."
            )
        return cleaned


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A valid question, and who may see what of the answer."""

    first: date
    last: date
    """Inclusive."""
    width: Width
    zone: tzinfo
    key: str
    model: str
    split: frozenset[Dimension]
    visible: frozenset[str] | None
    """Keys that may be seen; None: all."""

    @property
    def days(self) -> int:
        return (self.last - self.first).days + 1

    def query(self, *, key: bool = True, model: bool = True, days_back: int = 0) -> UsageQuery:
        """The report's range and filters, without that of key or model if so asked."""
        back = timedelta(days=days_back)
        return UsageQuery(
            start=midnight(self.first - back, self.zone),
            end=midnight(self.last - back + timedelta(days=1), self.zone),
            zone=self.zone,
            keys=frozenset({self.key}) if key and self.key else self.visible,
            models=frozenset({self.model}) if model and self.model else None,
        )

    def url(self, **changes: str) -> str:
        """The query string of this report with some words changed; empty ones are left out."""
        words = {
            "from": self.first.isoformat(),
            "to": self.last.isoformat(),
            "width": self.width.value if self.width is not Width.DAY else "",
            "zone": str(self.zone) if self.zone is not UTC else "",
            "key": self.key,
            "model": self.model,
        }
        return "?" + urlencode({name: value for name, value in (words | changes).items() if value})


def own_usage(request: HttpRequest) -> HttpResponseBase:
    """What the person who is logged in used: with keys that they made, and in the chat."""
    if not request.user.is_authenticated:
        if request.GET.get("format"):
            return JsonResponse({"error": {"message": "Log in first."}}, status=401)
        return redirect_to_login(request.get_full_path())
    return _answer(request, own_keys(request.user), title="Your usage")


def all_usage(request: HttpRequest) -> HttpResponseBase:
    """What everybody used. Behind the admin's own check of staff; wants the right to see usage events."""
    if not request.user.has_perm("registry.view_usageevent"):
        raise PermissionDenied
    return _answer(request, None, title="Usage of all keys")


def _answer(request: HttpRequest, visible: frozenset[str] | None, *, title: str) -> HttpResponseBase:
    now = database_now()
    filters = Filters(request.GET, now)
    wanted = request.GET.get("format", "")
    if not filters.is_valid():
        if wanted:
            sentences = [f"{name}: {text}" for name, texts in filters.errors.items() for text in texts]
            return JsonResponse({"error": {"message": " ".join(sentences)}}, status=400)
        context = {"title": title, "filters": filters, "words": request.GET, "staff": visible is None}
        return _private(render(request, "registry/usage.html", context, status=400))
    asked = filters.cleaned_data
    if visible is not None and asked["key"] and asked["key"] not in visible:
        # Whether somebody else has such a key is not told.
        raise Http404
    report = Report(
        first=asked["from"],
        last=asked["to"],
        width=asked["width"],
        zone=asked["zone"],
        key=asked["key"],
        model=asked["model"],
        split=asked["split"],
        visible=visible,
    )
    if wanted:
        return _export(request, report, wanted, now)
    context = {"title": title, "staff": visible is None, **_page(report, now)}
    return _private(render(request, "registry/usage.html", context))


def _page(report: Report, now: datetime) -> dict[str, Any]:
    query = replace(report.query(), width=report.width)
    buckets = list(query.rows())
    total = Figures()
    for row in buckets:
        total.add(row.figures)
    before = report.query(days_back=report.days).total()
    keys = _top(report.query(key=False).split(Dimension.KEY), report.key)
    models = _top(report.query(model=False).split(Dimension.MODEL), report.model)
    states = _key_states(row.key for row in keys.rows)
    return {
        "report": report,
        "words": {
            "from": report.first.isoformat(),
            "to": report.last.isoformat(),
            "zone": str(report.zone),
            "width": report.width.value,
            "key": report.key,
            "model": report.model,
        },
        "complete_to": now.astimezone(report.zone),
        "tiles": _tiles(total, before),
        "buckets": [(time_text(row.start, query), row.figures) for row in reversed(buckets)],
        "total": total,
        "keys": [
            (row, states.get(row.key, ""), report.url(key="" if row.key == report.key else row.key))
            for row in keys.rows
        ],
        "other_keys": keys.others,
        "models": [
            (row, report.url(model="" if row.model == report.model else row.model)) for row in models.rows
        ],
        "other_models": models.others,
        "missing_key": report.key if all(row.key != report.key for row in keys.rows) else "",
        "missing_model": report.model if all(row.model != report.model for row in models.rows) else "",
        "exports": [(name.upper(), report.url(format=name)) for name in CONTENT_TYPES],
        "chart": report.url(format="json", split=",") if buckets else "",
        "anything": bool(keys.rows or models.rows),
    }


@dataclass(frozen=True, slots=True)
class _Top:
    rows: list[Row]
    others: tuple[int, Figures] | None
    """How many are not listed, and what they add up to."""


def _top(rows: list[Row], chosen: str) -> _Top:
    """The first rows, the chosen one among them, and the rest as one."""
    listed = [
        row for place, row in enumerate(rows) if place < TOP or (chosen in (row.key, row.model) and chosen)
    ]
    rest = [row for row in rows if row not in listed]
    if not rest:
        return _Top(listed, None)
    others = Figures()
    for row in rest:
        others.add(row.figures)
    return _Top(listed, (len(rest), others))


def _key_states(public_ids: Iterator[str]) -> dict[str, str]:
    """What to say of keys that cannot be used any more."""
    wanted = set(public_ids)
    known = dict(ApiKey.objects.filter(public_id__in=wanted).values_list("public_id", "revoked_at"))
    return {
        public_id: "revoked" if known.get(public_id) else "deleted"
        for public_id in wanted
        if not public_id.startswith("user-") and (public_id not in known or known[public_id])
    }


def _tiles(total: Figures, before: Figures) -> list[tuple[str, int, str]]:
    return [
        (label, getattr(total, name), _change(getattr(total, name), getattr(before, name)))
        for label, name in (
            ("Requests", "requests"),
            ("Errors", "errors"),
            ("Tokens in", "input_tokens"),
            ("Tokens out", "output_tokens"),
        )
    ]


def _change(now: int, before: int) -> str:
    """In words, against the period before."""
    if before == 0:
        return "none before" if now else "as before"
    percent = round((now - before) * 100 / before)
    if percent == 0:
        return "as before"
    return f"{'+' if percent > 0 else '−'}{abs(percent):,} % against the period before"


def _export(request: HttpRequest, report: Report, name: str, now: datetime) -> HttpResponseBase:
    query = replace(report.query(), width=report.width, by=report.split)
    export = Export(query=query, complete_to=now)
    pieces = {"csv": export.csv, "json": export.json, "ndjson": export.ndjson}[name]()
    blocks = in_blocks(pieces)
    body = _off_the_loop(blocks) if isinstance(request, ASGIRequest) else blocks
    response = StreamingHttpResponse(body, content_type=CONTENT_TYPES[name])
    if name != "json":
        filename = f"usage-{report.first}-to-{report.last}.{name}"
        response["Content-Disposition"] = f'attachment; filename="{filename}"'
    return _private(response)


async def _off_the_loop(blocks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Read block by block in the request's own thread: Django would read a plain iterator whole first."""

    def take() -> bytes | None:
        return next(blocks, None)

    while (block := await sync_to_async(take)()) is not None:
        yield block


def _private(response: HttpResponseBase) -> HttpResponseBase:
    response["Cache-Control"] = "private, no-store"
    return response
