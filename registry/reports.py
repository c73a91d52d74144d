"""Who used what: one query behind the usage page, its exports, the API and the command.

Whole days of UTC come from the sums by day, other fresh hours from those by hour, stale hours and those
that a boundary of the report cuts from the events: the figures are exact up to the moment of asking,
whenever the last roll-up was. (An hour whose events retention has deleted counts where it begins.) What
is not asked for by key is read without keys. All grouping by day is done here, not in SQL, so that both
databases agree about time zones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from enum import Enum
from functools import reduce
from heapq import merge
from itertools import groupby
from operator import or_
from typing import Any, NamedTuple

from django.db.models import Count, F, Max, Q, QuerySet, Sum, Value
from django.db.models.functions import Coalesce, TruncHour, TruncMinute

from registry.actions.rollups import A_REQUEST, DAY, HOUR, count_buckets, day_of, hour_of
from registry.histograms import Histogram, add_to
from registry.models import Grain, UsageDay, UsageEvent, UsageHour, UsageRollup, UsageSummary
from registry.states import Outcome

Span = tuple[datetime, datetime]
"""From, inclusive, to, exclusive."""

MAX_SPANS = 100
"""More intervals than this are not named one by one in a query: the events between them are read too."""


class Width(Enum):
    """How long one bucket of a report is."""

    MINUTE = "minute"
    HOUR = "hour"
    """Of UTC, in every time zone."""
    DAY = "day"
    """From midnight to midnight in the report's time zone."""


class Dimension(Enum):
    """What a report can be split by."""

    PROJECT = "project"
    KEY = "key"
    MODEL = "model"
    ENDPOINT = "endpoint"
    STATUS = "status"


COLUMNS = {
    Dimension.PROJECT: "project_id",
    Dimension.KEY: "key_public_id",
    Dimension.MODEL: "route",
    Dimension.ENDPOINT: "endpoint",
    Dimension.STATUS: "status",
}
NAMES = {Dimension.PROJECT: "project_name", Dimension.KEY: "key_name"}
_FIELDS = {
    "project_id": "project_id",
    "key_public_id": "key",
    "route": "model",
    "endpoint": "endpoint",
    "status": "status",
    "instant": "instant",
    "its_project_name": "project_name",
    "its_key_name": "key_name",
}
"""What a column of a query is called in a `Row`."""
ERRORS = (Outcome.FAILED, Outcome.INTERRUPTED)
"""Requests that ended so got no whole answer through no choice of the client's."""
STATUS_WORDS = ("errors", "2xx", "4xx", "5xx")
"""What a report can be narrowed to, beside single statuses."""
CAUSES: dict[str, Q] = {
    "client_errors": Q(outcome=Outcome.FAILED, status__gte=400, status__lt=500) & ~Q(status=429),
    "limit_errors": Q(outcome=Outcome.FAILED, status=429),
    "capacity_errors": Q(outcome=Outcome.FAILED, status=503),
    "engine_errors": Q(outcome=Outcome.INTERRUPTED)
    | Q(outcome=Outcome.FAILED) & (Q(status__lt=400) | Q(status__gte=500) & ~Q(status=503)),
}
"""Whose fault an error is. Each error has one cause."""


@dataclass(slots=True)
class Figures:
    """Sums over requests, in the order of `_sums`."""

    requests: int = 0
    errors: int = 0
    aborted: int = 0
    """The client left before the end."""
    input_tokens: int = 0
    cached_tokens: int = 0
    """Part of the input tokens."""
    output_tokens: int = 0
    cost_micros: int = 0
    """Millionths of the currency."""
    client_errors: int = 0
    """The request could not be used."""
    limit_errors: int = 0
    """A limit or budget refused it."""
    capacity_errors: int = 0
    """No worker could take it."""
    engine_errors: int = 0
    """The worker failed, or ended in mid-answer."""
    duration_ms: int = 0
    duration_count: int = 0
    ttft_ms: int = 0
    ttft_count: int = 0

    def add(self, other: Figures) -> None:
        self.requests += other.requests
        self.errors += other.errors
        self.aborted += other.aborted
        self.input_tokens += other.input_tokens
        self.cached_tokens += other.cached_tokens
        self.output_tokens += other.output_tokens
        self.cost_micros += other.cost_micros
        self.client_errors += other.client_errors
        self.limit_errors += other.limit_errors
        self.capacity_errors += other.capacity_errors
        self.engine_errors += other.engine_errors
        self.duration_ms += other.duration_ms
        self.duration_count += other.duration_count
        self.ttft_ms += other.ttft_ms
        self.ttft_count += other.ttft_count

    @property
    def mean_ttft_ms(self) -> int | None:
        return round(self.ttft_ms / self.ttft_count) if self.ttft_count else None

    @property
    def mean_duration_ms(self) -> int | None:
        return round(self.duration_ms / self.duration_count) if self.duration_count else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The sums of one bucket and one of each dimension that the report is split by; what it is not
    split by is empty."""

    start: datetime
    project_id: int | None = None
    project_name: str = ""
    key: str = ""
    """The key's public id."""
    key_name: str = ""
    model: str = ""
    endpoint: str = ""
    status: int | None = None
    figures: Figures = field(default_factory=Figures)


class Marks(NamedTuple):
    """What sums of a range are not the whole truth."""

    hours: frozenset[datetime]
    days: frozenset[datetime]
    """Without a row a day has no sums, and no hour that has some."""


def marks_between(start: datetime, end: datetime) -> Marks:
    """For a report over this range, or several within it."""
    # Uses indexes usage_hour_stale_idx and usage_day_stale_idx.
    hours = UsageHour.objects.filter(stale=True, sealed_at_event=None, start__gt=start - HOUR, start__lt=end)
    days = UsageDay.objects.filter(stale=True, start__gt=start - DAY, start__lt=end)
    return Marks(*(frozenset(rows.order_by().values_list("start", flat=True)) for rows in (hours, days)))


class _Part(NamedTuple):
    """Rows of one table that are part of the answer."""

    rows: QuerySet[Any]
    when: str
    """The column of time."""

    @property
    def single(self) -> bool:
        """Are these the events themselves?"""
        return self.when == "started_at"


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageQuery:
    """A question to the ledger. Requests count in the moment in which they began."""

    start: datetime
    end: datetime
    """Exclusive."""
    width: Width | None = None
    """None: the whole range is one bucket."""
    by: frozenset[Dimension] = frozenset()
    zone: tzinfo = UTC
    keys: frozenset[str] | None = None
    """Public ids; None: all. An empty set finds nothing."""
    projects: frozenset[int] | None = None
    models: frozenset[str] | None = None
    endpoints: frozenset[str] | None = None
    statuses: frozenset[str] | None = None
    """Any of `STATUS_WORDS`, or statuses such as 429."""
    marks: Marks | None = None
    """Those of the range, where they are known. None: each question asks for them."""

    def rows(self) -> Iterator[Row]:
        """Rows in order of time, then of name; only buckets with requests. Read as they are asked for:
        memory holds one bucket, however long the report is."""
        if self.start >= self.end:
            return
        sources = [self._read(part) for part in self._parts()]
        in_order = merge(*sources, key=lambda row: row.start)
        for _, rows in groupby(in_order, key=lambda row: row.start):
            sums: dict[tuple[Any, ...], Row] = {}
            for row in rows:
                identity = (row.project_id, row.key, row.model, row.endpoint, row.status)
                known = sums.get(identity)
                if known is None:
                    sums[identity] = row
                    continue
                known.figures.add(row.figures)
                # A thing renamed within the range has several names: the same one whoever asks.
                sums[identity] = replace(
                    known,
                    project_name=max(known.project_name, row.project_name),
                    key_name=max(known.key_name, row.key_name),
                )
            yield from sorted(
                sums.values(),
                key=lambda row: (
                    row.project_name,
                    row.key_name,
                    row.model,
                    row.key,
                    row.endpoint,
                    row.status or 0,
                ),
            )

    def total(self) -> Figures:
        """The sums over the whole range."""
        total = Figures()
        for row in replace(self, width=None, by=frozenset()).rows():
            total.add(row.figures)
        return total

    def split(self, by: Dimension) -> list[Row]:
        """The sums over the whole range for each of `by`, the one with most tokens first."""
        rows = replace(self, width=None, by=frozenset({by})).rows()
        return sorted(rows, key=lambda row: -(row.figures.input_tokens + row.figures.output_tokens))

    def histograms(self) -> dict[str, dict[str, Histogram]]:
        """For each model: the histograms of `registry.actions.rollups.MEASURES` over the whole range, of
        requests that were answered whole, or of those with the statuses asked for."""
        found: dict[str, dict[str, Histogram]] = {}
        if self.start >= self.end:
            return found
        for part in replace(self, width=None, by=frozenset())._parts():
            rows = part.rows if self.statuses is not None else part.rows.filter(outcome=Outcome.OK)
            if part.single:
                for row in count_buckets(rows, "route"):
                    histogram = found.setdefault(row["route"], {}).setdefault(row["measure"], {})
                    add_to(histogram, {str(row["bucket"]): row["number"]})
                continue
            for route, histograms in rows.order_by().values_list("route", "histograms").iterator():
                known = found.setdefault(route, {})
                for measure, histogram in histograms.items():
                    add_to(known.setdefault(measure, {}), histogram)
        return found

    def events(self) -> QuerySet[UsageEvent]:
        """The single requests behind the report, and corrections, the newest first. What retention has
        deleted is not among them."""
        return self._narrowed(UsageEvent.objects.filter(started_at__gte=self.start, started_at__lt=self.end))

    def bucket_of(self, instant: datetime) -> datetime:
        """The start of its bucket; the first bucket begins where the report does."""
        match self.width:
            case None:
                return self.start
            case Width.MINUTE:
                start = instant.astimezone(UTC).replace(second=0, microsecond=0)
            case Width.HOUR:
                start = hour_of(instant)
            case Width.DAY:
                start = midnight(instant.astimezone(self.zone).date(), self.zone)
        return max(start, self.start)

    def _parts(self) -> list[_Part]:
        """The tables that have the answer, each for its part of the range."""
        marks = self.marks or marks_between(self.start, self.end)
        live = self._live_spans(marks)
        rolled = _complement(live, self.start, self.end)
        days = self._day_spans(rolled, marks)
        hours = [gap for a, b in rolled for gap in _complement(_clipped(days, a, b), a, b)]
        keyless = self.keys is None and Dimension.KEY not in self.by
        parts = []
        if days:
            grain = Grain.PROJECT_DAY if keyless else Grain.DAY
            parts.append(_Part(UsageSummary.objects.filter(_within("start", days), grain=grain), "start"))
        if hours and keyless:
            by_hour = UsageSummary.objects.filter(_within("start", hours), grain=Grain.PROJECT_HOUR)
            parts.append(_Part(by_hour, "start"))
        elif hours:
            parts.append(_Part(UsageRollup.objects.filter(_within("hour", hours)), "hour"))
        if live:
            parts.append(_Part(UsageEvent.objects.filter(_within("started_at", live)), "started_at"))
        return [part._replace(rows=self._narrowed(part.rows)) for part in parts]

    def _narrowed(self, rows: QuerySet[Any]) -> QuerySet[Any]:
        for column, wanted in (
            ("key_public_id", self.keys),
            ("project_id", self.projects),
            ("route", self.models),
            ("endpoint", self.endpoints),
        ):
            if wanted is not None:
                rows = rows.filter(**{f"{column}__in": sorted(wanted)})
        if self.statuses is not None:
            rows = rows.filter(_any(_status(word) for word in self.statuses))
        return rows

    def _read(self, part: _Part) -> Iterator[Row]:
        """Grouped rows of one table, in order of time."""
        rows, sums = part.rows, _SUMS["event" if part.single else "stored"]
        columns = [COLUMNS[dimension] for dimension in Dimension if dimension in self.by]
        if self.width is not None:
            rows = rows.annotate(instant=self._instant(part))
            columns.append("instant")
        if not columns:
            # Without a column to group by there is one row, also for nothing.
            found = rows.aggregate(**sums)
            if any(found.values()):
                yield Row(start=self.start, figures=Figures(*(found[name] for name in sums)))
            return
        names = {f"its_{name}": Max(name) for dimension, name in NAMES.items() if dimension in self.by}
        grouped = rows.order_by().values(*columns).annotate(**names, **sums)
        if self.width is not None:
            grouped = grouped.order_by("instant")
        # Row by row this is most of a long report's time: tuples, and a bucket is looked for once.
        told = [_FIELDS[column] for column in (*columns, *names)]
        width = len(told)
        starts: dict[datetime, datetime] = {}
        for values in grouped.values_list(*columns, *names, *sums).iterator(chunk_size=2000):
            facts = dict(zip(told, values[:width], strict=True))
            instant = facts.pop("instant", None)
            start = starts.get(instant) if instant is not None else self.start
            if start is None:
                start = starts[instant] = self.bucket_of(instant)
            yield Row(start=start, figures=Figures(*values[width:]), **facts)

    def _instant(self, part: _Part) -> Any:
        if not part.single:
            return F(part.when)
        if self.width is Width.HOUR:
            return TruncHour("started_at", tzinfo=UTC)
        # Minutes are fine enough for the midnights of every time zone.
        return TruncMinute("started_at", tzinfo=UTC)

    def _live_spans(self, marks: Marks) -> list[Span]:
        """What must be read from the events: stale hours, and hours that do not lie within one bucket."""
        if self.width is Width.MINUTE:
            return [(self.start, self.end)]
        hours = {hour for hour in marks.hours if self.start - HOUR < hour < self.end}
        if cut := {hour_of(edge) for edge in self._edges() if edge != hour_of(edge)}:
            # Their events may be gone.
            sealed = UsageHour.objects.filter(start__in=cut, sealed_at_event__isnull=False)
            hours |= cut.difference(sealed.values_list("start", flat=True))
        return _clipped(_joined(hours, HOUR), self.start, self.end)

    def _day_spans(self, rolled: list[Span], marks: Marks) -> list[Span]:
        """What of these spans the sums by day have: whole days of UTC that are not stale and lie within one
        bucket."""
        days = {day for a, b in rolled for day in _whole_days(a, b) if self._is_one_bucket(day)}
        spans = _joined(days - marks.days, DAY, most=None)
        # Rather more rows than a question of many intervals.
        return spans if len(spans) <= MAX_SPANS else []

    def _is_one_bucket(self, day: datetime) -> bool:
        if self.width is None:
            return True
        return self.width is Width.DAY and self.bucket_of(day) == self.bucket_of(day + DAY - HOUR / 60)

    def _edges(self) -> Iterator[datetime]:
        yield self.start
        yield self.end
        if self.width is Width.DAY:
            day = self.start.astimezone(self.zone).date()
            while (day := day + timedelta(days=1)) and (edge := midnight(day, self.zone)) < self.end:
                yield edge


def _sums(*, of_events: bool) -> dict[str, Any]:
    def total(column: str) -> Any:
        return Coalesce(Sum(column), Value(0))

    def requests(only: Q | None = None) -> Any:
        if of_events:
            return Count("id", filter=A_REQUEST & only if only else A_REQUEST)
        return Coalesce(Sum("requests", filter=only), Value(0))

    def those_with(column: str) -> Any:
        return Count(f"{column}_ms") if of_events else total(f"{column}_count")

    # Prefixed: an aggregate may not have the name of a column.
    return {
        "n_requests": requests(),
        "n_errors": requests(Q(outcome__in=ERRORS)),
        "n_aborted": requests(Q(outcome=Outcome.ABORTED)),
        "n_input_tokens": total("prompt_tokens"),
        "n_cached_tokens": total("cached_tokens"),
        "n_output_tokens": total("completion_tokens"),
        "n_cost_micros": total("cost_micros"),
        **{f"n_{name}": requests(cause) for name, cause in CAUSES.items()},
        "n_duration_ms": total("duration_ms"),
        "n_duration_count": those_with("duration"),
        "n_ttft_ms": total("ttft_ms"),
        "n_ttft_count": those_with("ttft"),
    }


_SUMS = {"stored": _sums(of_events=False), "event": _sums(of_events=True)}


def _status(word: str) -> Q:
    if word == "errors":
        return Q(outcome__in=ERRORS)
    if word.endswith("xx"):
        first = int(word[0]) * 100
        return Q(status__gte=first, status__lt=first + 100)
    return Q(status=int(word))


def midnight(day: date, zone: tzinfo) -> datetime:
    """When a day begins."""
    return datetime.combine(day, time.min, tzinfo=zone).astimezone(UTC).astimezone(zone)


def _whole_days(start: datetime, end: datetime) -> Iterator[datetime]:
    """The days of UTC that lie within."""
    day = day_of(start + DAY - timedelta(microseconds=1))
    while day + DAY <= end:
        yield day
        day += DAY


def _joined(starts: set[datetime], length: timedelta, most: int | None = MAX_SPANS) -> list[Span]:
    """Hours or days as intervals; neighbours become one, and all do if they are more than `most`."""
    spans: list[Span] = []
    for start in sorted(starts):
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], start + length)
        else:
            spans.append((start, start + length))
    if most is not None and len(spans) > most:
        return [(spans[0][0], spans[-1][1])]
    return spans


def _clipped(spans: list[Span], start: datetime, end: datetime) -> list[Span]:
    return [(max(a, start), min(b, end)) for a, b in spans if a < end and b > start]


def _complement(spans: list[Span], start: datetime, end: datetime) -> list[Span]:
    """What of the range lies in none of the spans, which are in order."""
    gaps: list[Span] = []
    for a, b in spans:
        if start < a:
            gaps.append((start, a))
        start = b
    if start < end:
        gaps.append((start, end))
    return gaps


def _within(column: str, spans: list[Span]) -> Q:
    def between(a: datetime, b: datetime) -> Q:
        return Q(**{f"{column}__gte": a, f"{column}__lt": b})

    # The outer bounds say nothing new, but let the index be searched instead of read from its start.
    return between(spans[0][0], spans[-1][1]) & _any(between(a, b) for a, b in spans)


def _any(conditions: Iterable[Q]) -> Q:
    """At least one of them; of none, nothing."""
    return reduce(or_, conditions, Q(pk__in=[]))
