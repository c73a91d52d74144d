"""The usage report in the browser: `/usage/` for one's own keys, `/admin/usage/` for everybody's.

The whole question stands in the URL. With `format=json`, `ndjson` or `csv` the same question is answered
for programs; with `view=requests` it is answered request by request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.contrib.auth.views import redirect_to_login
from django.core.exceptions import PermissionDenied
from django.core.handlers.asgi import ASGIRequest
from django.db.models import Q
from django.http import (
    Http404,
    HttpRequest,
    HttpResponseBase,
    JsonResponse,
    StreamingHttpResponse,
)
from django.shortcuts import render

from registry.exports import Export, RequestsExport, in_blocks, latencies_of, time_text
from registry.models import ApiKey, Project, UsageAudit
from registry.querysets import database_now
from registry.reports import STATUS_WORDS, Dimension, Figures, Row, marks_between
from registry.templatetags.figures import grouped, money
from registry.usage_filters import CONTENT_TYPES, NARROWING, Filters, Report

TOP = 20
"""Keys, models, projects and endpoints that the page lists; the rest is one line."""
PAGE = 50
"""Single requests on one page."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
LATENCIES = {
    "ttft_ms": "First token, ms",
    "e2e_ms": "Whole answer, ms",
    "tokens_per_second": "Tokens per second",
    "queue_ms": "Wait for a worker, ms",
}


def user_key(user_id: int) -> str:
    """The public id under which a person's chats are accounted."""
    return f"user-{user_id}"


def own_keys(user: Any) -> frozenset[str]:
    """Public ids of the keys that a person made or owns, and of their chats."""
    made = ApiKey.objects.filter(Q(created_by=user.get_username()) | Q(owner_id=user.pk))
    return frozenset([*made.values_list("public_id", flat=True), user_key(user.pk)])


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
    filters = Filters(request.GET, now, everybody=visible is None)
    wanted = request.GET.get("format", "")
    if not filters.is_valid():
        if wanted:
            sentences = [f"{name}: {text}" for name, texts in filters.errors.items() for text in texts]
            return JsonResponse({"error": {"message": " ".join(sentences)}}, status=400)
        context = {"title": title, "filters": filters, "words": request.GET, "staff": visible is None}
        return _private(render(request, "registry/usage.html", context, status=400))
    asked = filters.cleaned_data
    report = Report(
        first=asked["from"],
        last=asked["to"],
        visible=_visible(request, visible, asked),
        **{name: asked[name] for name in (*NARROWING, "width", "zone", "user", "key", "status", "split")},
    )
    if wanted:
        return _export(request, report, wanted, now, single=bool(asked["view"]))
    context = {
        "title": title,
        "staff": visible is None,
        "report": report,
        "words": report.words(),
        "statuses": STATUS_WORDS,
        "complete_to": now.astimezone(report.zone),
    }
    if asked["view"]:
        context |= _requests(report, asked["after"])
        return _private(render(request, "registry/usage_requests.html", context))
    return _private(render(request, "registry/usage.html", context | _page(report)))


def _visible(
    request: HttpRequest, visible: frozenset[str] | None, asked: Mapping[str, Any]
) -> frozenset[str] | None:
    """The keys that the answer may be about. Whether somebody else has such a key is not told."""
    name, key = asked["user"], asked["key"]
    if visible is None:
        if not name:
            return None
        visible = own_keys(get_user_model().objects.get(username=name))
    elif name not in ("", request.user.get_username()):
        raise Http404
    if key and key not in visible:
        raise Http404
    return visible


def _page(report: Report) -> dict[str, Any]:
    query, before = report.query(), report.query(days_back=report.days)
    marks = marks_between(before.start, query.end)
    query, before = replace(query, marks=marks), replace(before, marks=marks)
    timeline = replace(query, width=report.width)
    buckets = list(timeline.rows())
    total = _sum(buckets)
    # One question for each menu and table: filters of the menus are applied to its answer.
    everything = replace(
        report.query(*NARROWING),
        marks=marks,
        by=frozenset({Dimension.PROJECT, Dimension.MODEL, Dimension.ENDPOINT}),
    )
    rows = list(everything.rows())
    tables = {name: _table(name, rows, report) for name in NARROWING}
    by_key = replace(query, keys=report.visible, by=frozenset({Dimension.KEY}))
    keys = _top(by_key.rows(), lambda row: row.key, report.key)
    states = _key_states(row.key for row in keys.rows)
    histograms = query.histograms()
    return {
        "audit": UsageAudit.objects.first(),
        "tiles": _tiles(total, before.total()),
        "buckets": [
            (time_text(row.start, timeline), row.figures, _requests_url(report, row.start))
            for row in reversed(buckets)
        ],
        "total": total,
        "keys": [
            (row, states.get(row.key, ""), report.url(key="" if row.key == report.key else row.key))
            for row in keys.rows
        ],
        "other_keys": keys.others,
        "tables": [tables[name] for name in ("model", "project", "endpoint")],
        "menus": {name: table.choices() for name, table in tables.items()},
        "missing_key": report.key if all(row.key != report.key for row in keys.rows) else "",
        "latencies": [
            (LATENCIES[name], figures)
            for name, figures in latencies_of(histograms.values()).items()
            if figures["requests"]
        ],
        "exports": [(name.upper(), report.url(format=name)) for name in CONTENT_TYPES],
        "requests_url": report.url(view="requests"),
        "chart": report.url(format="json", split="model") if buckets else "",
        "anything": bool(keys.rows or rows),
    }


def _requests(report: Report, after: str) -> dict[str, Any]:
    """One page of single requests, the newest first, from the place that `after` tells."""
    # Uses index usage_by_key_idx, or usage_by_time_idx.
    events = report.query().events().order_by("-started_at", "-id")
    if after:
        microseconds, number = map(int, after.split("_"))
        instant = EPOCH + microseconds * MICROSECOND
        events = events.filter(
            Q(started_at__lt=instant) | Q(started_at=instant, id__lt=number), started_at__lte=instant
        )
    found = list(events[: PAGE + 1])
    shown = found[:PAGE]
    older = ""
    if len(found) > PAGE:
        place = f"{(shown[-1].started_at - EPOCH) // MICROSECOND}_{shown[-1].pk}"
        older = report.url(view="requests", after=place)
    return {
        "requests": [(event, event.started_at.astimezone(report.zone)) for event in shown],
        "older": older,
        "newest": report.url(view="requests") if after else "",
        "report_url": report.url(),
        "menus": {},
        "exports": [(name.upper(), report.url(view="requests", format=name)) for name in CONTENT_TYPES],
    }


def _requests_url(report: Report, start: datetime) -> str:
    """Where the requests of a bucket's day are listed."""
    day = start.astimezone(report.zone).date().isoformat()
    return report.url(view="requests", **{"from": day, "to": day})


def _name(of: str, row: Row) -> str:
    """What a row is called in the filter of this name."""
    match of:
        case "project":
            return str(row.project_id)
        case "model":
            return row.model
        case _:
            return row.endpoint


def _passing(rows: Iterable[Row], report: Report, *, without: str = "") -> list[Row]:
    """Those that the filters of the menus let through."""
    words = report.words()
    wanted = [(name, words[name]) for name in NARROWING if words[name] and name != without]
    return [row for row in rows if all(_name(name, row) == value for name, value in wanted)]


def _sum(rows: Iterable[Row]) -> Figures:
    total = Figures()
    for row in rows:
        total.add(row.figures)
    return total


@dataclass(frozen=True, slots=True)
class _Top:
    rows: list[Row]
    others: tuple[int, Figures] | None
    """How many are not listed, and what they add up to."""


def _top(rows: Iterable[Row], name: Callable[[Row], str], chosen: str) -> _Top:
    """Those with most tokens, the chosen one among them, and the rest as one."""
    sums: dict[str, Row] = {}
    for row in rows:
        known = sums.setdefault(name(row), replace(row, figures=Figures()))
        known.figures.add(row.figures)
    in_order = sorted(sums.values(), key=lambda row: -(row.figures.input_tokens + row.figures.output_tokens))
    listed = [row for place, row in enumerate(in_order) if place < TOP or (chosen and name(row) == chosen)]
    names = {name(row) for row in listed}
    rest = [row for row in in_order if name(row) not in names]
    return _Top(listed, (len(rest), _sum(rest)) if rest else None)


@dataclass(frozen=True, slots=True)
class _Table:
    """What was used by each model, endpoint or project, whichever of them is chosen."""

    name: str
    top: _Top
    report: Report
    gone: frozenset[str]
    """Those that exist no more."""

    @property
    def chosen(self) -> str:
        return self.report.words()[self.name]

    def label(self, row: Row) -> str:
        return row.project_name if self.name == "project" else _name(self.name, row)

    def lines(self) -> list[tuple[Row, str, str, str, bool]]:
        """Row, label, what to say of it, its link, and whether it is the chosen one."""
        lines = []
        for row in self.top.rows:
            value = _name(self.name, row)
            is_chosen = value == self.chosen
            link = self.report.url(**{self.name: "" if is_chosen else value})
            lines.append((row, self.label(row), "deleted" if value in self.gone else "", link, is_chosen))
        return lines

    def choices(self) -> list[tuple[str, str]]:
        """Value and label of each menu entry; the chosen one is there even if nothing was used with it."""
        choices = [(_name(self.name, row), self.label(row)) for row in self.top.rows]
        if self.chosen and self.chosen not in dict(choices):
            choices.append((self.chosen, self.chosen))
        return choices


def _table(name: str, rows: Iterable[Row], report: Report) -> _Table:
    top = _top(_passing(rows, report, without=name), lambda row: _name(name, row), report.words()[name])
    gone: frozenset[str] = frozenset()
    if name == "project":
        used = {row.project_id for row in top.rows if row.project_id is not None}
        there = Project.objects.filter(pk__in=used).values_list("pk", flat=True)
        gone = frozenset(str(number) for number in used.difference(there))
    return _Table(name, top, report, gone)


def _key_states(public_ids: Iterable[str]) -> dict[str, str]:
    """What to say of keys that cannot be used any more."""
    wanted = set(public_ids)
    known = dict(ApiKey.objects.filter(public_id__in=wanted).values_list("public_id", "revoked_at"))
    return {
        public_id: "revoked" if known.get(public_id) else "deleted"
        for public_id in wanted
        if not public_id.startswith("user-") and (public_id not in known or known[public_id])
    }


def _tiles(total: Figures, before: Figures) -> list[tuple[str, str, str]]:
    tiles = [
        ("Requests", "requests"),
        ("Errors", "errors"),
        ("Tokens in", "input_tokens"),
        ("Tokens in, cached", "cached_tokens"),
        ("Tokens out", "output_tokens"),
    ]
    shown = [
        (label, grouped(getattr(total, name)), _change(getattr(total, name), getattr(before, name)))
        for label, name in tiles
    ]
    if total.cost_micros or before.cost_micros:
        shown.append(("Cost", money(total.cost_micros), _change(total.cost_micros, before.cost_micros)))
    return shown


def _change(now: int, before: int) -> str:
    """In words, against the period before."""
    if before == 0:
        return "none before" if now else "as before"
    percent = round((now - before) * 100 / before)
    if percent == 0:
        return "as before"
    return f"{'+' if percent > 0 else '−'}{abs(percent):,} % against the period before"


def _export(
    request: HttpRequest, report: Report, name: str, now: datetime, *, single: bool
) -> HttpResponseBase:
    export: Export | RequestsExport
    if single:
        export = RequestsExport(query=report.query())
    else:
        query = replace(report.query(), width=report.width, by=report.split)
        export = Export(query=query, complete_to=now)
    pieces = {"csv": export.csv, "json": export.json, "ndjson": export.ndjson}[name]()
    blocks = in_blocks(pieces)
    body = _off_the_loop(blocks) if isinstance(request, ASGIRequest) else blocks
    response = StreamingHttpResponse(body, content_type=CONTENT_TYPES[name])
    if name != "json":
        what = "requests" if single else "usage"
        filename = f"{what}-{report.first}-to-{report.last}.{name}"
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
