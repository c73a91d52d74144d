"""Who used what: one query behind the usage page, its exports, the API and the command.

Fresh hours come from the rollups, stale ones and those that a boundary of the report cuts come from
the events: the figures are exact up to the moment of asking, whenever the last roll-up was. All
grouping by day is done here, not in SQL, so that both databases agree about time zones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from enum import Enum
from functools import reduce
from heapq import merge
from itertools import groupby
from operator import or_
from typing import Any, Literal

from django.db.models import Count, F, Max, Q, QuerySet, Sum, Value
from django.db.models.functions import Coalesce, TruncHour, TruncMinute

from registry.actions.rollups import HOUR, hour_of
from registry.models import UsageEvent, UsageHour, UsageRollup
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


COLUMNS = {
    Dimension.PROJECT: "project_id",
    Dimension.KEY: "key_public_id",
    Dimension.MODEL: "route",
    Dimension.ENDPOINT: "endpoint",
}
NAMES = {Dimension.PROJECT: "project_name", Dimension.KEY: "key_name"}
ERRORS = (Outcome.FAILED, Outcome.INTERRUPTED)
"""Requests that ended so got no whole answer through no choice of the client's."""


@dataclass(slots=True, kw_only=True)
class Figures:
    """Sums over requests."""

    requests: int = 0
    errors: int = 0
    aborted: int = 0
    """The client left before the end."""
    input_tokens: int = 0
    cached_tokens: int = 0
    """Part of the input tokens."""
    output_tokens: int = 0
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
    figures: Figures = field(default_factory=Figures)


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

    def rows(self) -> Iterator[Row]:
        """Rows in order of time, then of name; only buckets with requests. Read as they are asked for:
        memory holds one bucket, however long the report is."""
        if self.start >= self.end:
            return
        live = self._live_spans()
        rolled = _complement(live, self.start, self.end)
        sources = [
            self._read(UsageRollup.objects.filter(_within("hour", rolled)), "rollup") if rolled else iter(()),
            self._read(UsageEvent.objects.filter(_within("started_at", live)), "event") if live else iter(()),
        ]
        in_order = merge(*sources, key=lambda row: row.start)
        for _, rows in groupby(in_order, key=lambda row: row.start):
            sums: dict[tuple[Any, ...], Row] = {}
            for row in rows:
                identity = (row.project_id, row.key, row.model, row.endpoint)
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
                key=lambda row: (row.project_name, row.key_name, row.model, row.key, row.endpoint),
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

    def _read(self, rows: QuerySet[Any], kind: Literal["rollup", "event"]) -> Iterator[Row]:
        """Grouped rows of one table, in order of time."""
        for column, wanted in (
            ("key_public_id", self.keys),
            ("project_id", self.projects),
            ("route", self.models),
            ("endpoint", self.endpoints),
        ):
            if wanted is not None:
                rows = rows.filter(**{f"{column}__in": sorted(wanted)})
        columns = [COLUMNS[dimension] for dimension in Dimension if dimension in self.by]
        if self.width is not None:
            rows = rows.annotate(instant=self._instant(kind))
            columns.append("instant")
        names = {f"its_{name}": Max(name) for dimension, name in NAMES.items() if dimension in self.by}
        grouped = rows.order_by().values(*columns).annotate(**names, **_SUMS[kind])
        if not columns:
            # Without a column to group by there is one row, also for nothing.
            found = rows.aggregate(**_SUMS[kind])
            if found["n_requests"]:
                yield self._row(found)
            return
        if self.width is not None:
            grouped = grouped.order_by("instant")
        for row in grouped.iterator(chunk_size=2000):
            yield self._row(row)

    def _instant(self, kind: Literal["rollup", "event"]) -> Any:
        if kind == "rollup":
            return F("hour")
        if self.width is Width.HOUR:
            return TruncHour("started_at", tzinfo=UTC)
        # Minutes are fine enough for the midnights of every time zone.
        return TruncMinute("started_at", tzinfo=UTC)

    def _row(self, found: dict[str, Any]) -> Row:
        instant = found.get("instant")
        return Row(
            start=self.bucket_of(instant) if instant is not None else self.start,
            project_id=found.get("project_id"),
            project_name=found.get("its_project_name", ""),
            key=found.get("key_public_id", ""),
            key_name=found.get("its_key_name", ""),
            model=found.get("route", ""),
            endpoint=found.get("endpoint", ""),
            figures=Figures(
                **{name.removeprefix("n_"): value for name, value in found.items() if name[:2] == "n_"}
            ),
        )

    def _live_spans(self) -> list[Span]:
        """What must be read from the events: stale hours, and hours that do not lie within one bucket."""
        if self.width is Width.MINUTE:
            return [(self.start, self.end)]
        # Uses index usage_hour_stale_idx.
        stale = UsageHour.objects.filter(stale=True, start__gt=self.start - HOUR, start__lt=self.end)
        hours = set(stale.values_list("start", flat=True))
        hours.update(hour_of(edge) for edge in self._edges() if edge != hour_of(edge))
        return _clipped(_joined(hours), self.start, self.end)

    def _edges(self) -> Iterator[datetime]:
        yield self.start
        yield self.end
        if self.width is Width.DAY:
            day = self.start.astimezone(self.zone).date()
            while (day := day + timedelta(days=1)) and (edge := midnight(day, self.zone)) < self.end:
                yield edge


def _sums(kind: Literal["rollup", "event"]) -> dict[str, Any]:
    def total(column: str) -> Any:
        return Coalesce(Sum(column), Value(0))

    def count(column: str, only: Q | None = None) -> Any:
        if kind == "event":
            return Count(column, filter=only)
        return Coalesce(Sum({"id": "requests"}.get(column, column), filter=only), Value(0))

    counted = ("duration_ms", "ttft_ms") if kind == "event" else ("duration_count", "ttft_count")
    # Prefixed: an aggregate may not have the name of a column.
    return {
        "n_requests": count("id"),
        "n_errors": count("id", Q(outcome__in=ERRORS)),
        "n_aborted": count("id", Q(outcome=Outcome.ABORTED)),
        "n_input_tokens": total("prompt_tokens"),
        "n_cached_tokens": total("cached_tokens"),
        "n_output_tokens": total("completion_tokens"),
        "n_duration_ms": total("duration_ms"),
        "n_duration_count": count(counted[0]),
        "n_ttft_ms": total("ttft_ms"),
        "n_ttft_count": count(counted[1]),
    }


_SUMS = {"rollup": _sums("rollup"), "event": _sums("event")}


def midnight(day: date, zone: tzinfo) -> datetime:
    """When a day begins."""
    return datetime.combine(day, time.min, tzinfo=zone).astimezone(UTC).astimezone(zone)


def _joined(hours: set[datetime]) -> list[Span]:
    """Hours as intervals; neighbours become one."""
    spans: list[Span] = []
    for hour in sorted(hours):
        if spans and spans[-1][1] == hour:
            spans[-1] = (spans[-1][0], hour + HOUR)
        else:
            spans.append((hour, hour + HOUR))
    if len(spans) > MAX_SPANS:
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
    return between(spans[0][0], spans[-1][1]) & reduce(or_, (between(a, b) for a, b in spans))
