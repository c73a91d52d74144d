"""Sums of the ledger by hour and by day. They only save time: whatever they say, the events say it too.

    events ── roll_up ── UsageRollup (hour, key) ── roll_up ── UsageSummary (hour; day, key; day)

A report takes fresh hours from the sums and stale ones from the events, so it is exact at any moment;
rolling up late, twice or never changes its speed and nothing else. Only of hours whose events were given
to retention (`seal_hours`) the rollups are all that is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any

from django.db import transaction
from django.db.models import (
    BigIntegerField,
    Case,
    Count,
    F,
    FloatField,
    IntegerField,
    Max,
    Q,
    QuerySet,
    Sum,
    Value,
    When,
)
from django.db.models.functions import Cast, Coalesce, Floor, Ln

from registry.histograms import SCALE, add_to
from registry.models import Grain, UsageAudit, UsageDay, UsageEvent, UsageHour, UsageRollup, UsageSummary
from registry.querysets import database_now
from registry.statements import change

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
HOURS_AT_ONCE = 200
"""Of one call of `roll_up`: what is left comes with the next."""
DAYS_AT_ONCE = 40
AUDITS_KEPT = timedelta(days=90)
DIFFERENCES_KEPT = 100
"""Of one audit; more would not be read."""

KEYLESS = ("project_id", "route", "endpoint", "outcome", "status")
IDENTITY = ("project_id", "key_public_id", "route", "endpoint", "outcome", "status")
NAMES = ("project_name", "key_name")
SUMS = (
    "requests",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "cost_micros",
    "duration_ms",
    "duration_count",
    "ttft_ms",
    "ttft_count",
)

A_REQUEST = Q(corrects="")
"""What is no correction: that is a row of its own and changes the cost only."""

_PREFIX = "its_"
"""An aggregate may not have the name of a column that another one reads."""
# Names are snapshots, and may change within an hour: the last in the alphabet stands for all, here as in
# the report, so that both say the same whichever they were read from.
_NAMES = {f"{_PREFIX}{name}": Max(name) for name in NAMES}
_SUMS = {
    "its_requests": Count("id", filter=A_REQUEST),
    "its_prompt_tokens": Coalesce(Sum("prompt_tokens"), Value(0)),
    "its_cached_tokens": Coalesce(Sum("cached_tokens"), Value(0)),
    "its_completion_tokens": Coalesce(Sum("completion_tokens"), Value(0)),
    "its_cost_micros": Coalesce(Sum("cost_micros"), Value(0)),
    "its_duration_ms": Coalesce(Sum("duration_ms"), Value(0)),
    "its_duration_count": Count("duration_ms"),
    "its_ttft_ms": Coalesce(Sum("ttft_ms"), Value(0)),
    "its_ttft_count": Count("ttft_ms"),
}

MEASURES: dict[str, tuple[Q, Any]] = {
    "queue": (Q(queue_ms__isnull=False), F("queue_ms")),
    "ttft": (Q(ttft_ms__isnull=False), F("ttft_ms")),
    "e2e": (Q(duration_ms__isnull=False), F("duration_ms")),
    # Thousandths of tokens per second after the first token, as far as that can be said.
    "speed": (
        Q(completion_tokens__gte=2, duration_ms__gt=F("ttft_ms")),
        (Cast("completion_tokens", BigIntegerField()) - 1)
        * Value(1_000_000, BigIntegerField())
        / (F("duration_ms") - F("ttft_ms")),
    ),
}
"""What histograms are made of: which events have the figure, and what it is."""
_LOGARITHM = Ln(Cast("value", FloatField())) * Value(SCALE, FloatField())
_BUCKET = Case(When(value__lt=1, then=Value(0)), default=Cast(Floor(_LOGARITHM), IntegerField()) + 1)


def hour_of(instant: datetime) -> datetime:
    """The start of its hour, in UTC."""
    return instant.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def day_of(instant: datetime) -> datetime:
    """The start of its day, in UTC."""
    return hour_of(instant).replace(hour=0)


def mark_stale(hours: Iterable[datetime]) -> None:
    """These hours get events in this transaction. Each is locked until the transaction ends, so that
    nobody rolls it up without them."""
    # Sorted: two batches that share several hours lock them in the same order.
    for start in sorted(set(hours)):
        change(_MARK_STALE, start)


_MARK_STALE = (
    "INSERT INTO registry_usagehour (start, stale) VALUES (%s, true) "
    "ON CONFLICT (start) DO UPDATE SET stale = true"
)


def count_buckets(events: QuerySet[UsageEvent], *columns: str) -> Iterator[dict[str, Any]]:
    """How many of the events fall into each bucket of each measure's histogram, for each of the columns'
    values: rows of the columns, `measure`, `bucket` and `number`. As `registry.histograms.bucket_of`, in
    SQL and in one query."""
    each = [
        events.filter(A_REQUEST & has_it)
        .order_by()
        .annotate(measure=Value(measure), value=value, bucket=_BUCKET)
        .values(*columns, "measure", "bucket")
        .annotate(number=Count("id"))
        for measure, (has_it, value) in MEASURES.items()
    ]
    yield from each[0].union(*each[1:], all=True).iterator(chunk_size=2000)


def roll_up(*, since: datetime | None = None, until: datetime | None = None) -> int:
    """Add up again, whole, each stale hour that began at `since` or later and ended by `until` (default:
    now), then the days that thereby have all their hours; returns how many hours.

    Idempotent: an hour's rollups are replaced. A transaction per hour, at most `HOURS_AT_ONCE`, the newest
    first. The running hour is left to its events: it would be stale again at once.
    """
    until = until or database_now()
    # Uses index usage_hour_stale_idx.
    stale = UsageHour.objects.filter(stale=True, start__lte=until - HOUR)
    if since is not None:
        stale = stale.filter(start__gte=since)
    starts = list(stale.order_by("-start").values_list("start", flat=True)[:HOURS_AT_ONCE])
    done = sum(_roll_up_hour(start) for start in starts)
    for day in _ready_days(since, until):
        _roll_up_day(day)
    return done


@transaction.atomic
def _roll_up_hour(start: datetime) -> bool:
    # Waits for whoever appends an event of this hour just now; SQLite has one writer at a time anyway.
    hour = UsageHour.objects.select_for_update().filter(start=start, stale=True).first()
    if hour is None:
        return False
    events = _events_of(start)
    if hour.sealed_at_event is None:
        rows = _add_up(events)
    else:
        # Its other events may be gone: what came since is added to what they added up to.
        late = events.filter(id__gt=hour.sealed_at_event)
        before = UsageRollup.objects.filter(hour=start).values(*IDENTITY, *NAMES, *SUMS, "histograms")
        rows = _folded([*before, *_add_up(late)], IDENTITY)
        hour.sealed_at_event = late.aggregate(last=Max("id"))["last"] or hour.sealed_at_event
    UsageRollup.objects.filter(hour=start).delete()
    UsageRollup.objects.bulk_create([UsageRollup(hour=start, **row) for row in rows], batch_size=200)
    _replace_summaries(Grain.PROJECT_HOUR, start, _folded(rows, KEYLESS))
    UsageDay.objects.bulk_create(
        [UsageDay(start=day_of(start), stale=True)],
        update_conflicts=True,
        unique_fields=["start"],
        update_fields=["stale"],
    )
    hour.stale = False
    hour.save(update_fields=["stale", "sealed_at_event"])
    return True


def _ready_days(since: datetime | None, until: datetime) -> list[datetime]:
    """Stale days that are over and have no stale hour, the newest first."""
    # Uses index usage_day_stale_idx.
    days = UsageDay.objects.filter(stale=True, start__lte=until - DAY)
    if since is not None:
        days = days.filter(start__gte=day_of(since))
    starts = list(days.order_by("-start").values_list("start", flat=True)[:DAYS_AT_ONCE])
    if not starts:
        return []
    stale = UsageHour.objects.filter(stale=True, start__gte=starts[-1], start__lt=starts[0] + DAY)
    waiting = {day_of(hour) for hour in stale.values_list("start", flat=True)}
    return [start for start in starts if start not in waiting]


@transaction.atomic
def _roll_up_day(start: datetime) -> None:
    # Whoever rolls up an hour of this day just now marks the day last, and so waits, or is waited for.
    day = UsageDay.objects.select_for_update().filter(start=start, stale=True).first()
    if day is None:
        return
    rollups = (
        UsageRollup.objects.filter(hour__gte=start, hour__lt=start + DAY)
        .order_by(*IDENTITY)
        .values(*IDENTITY, *NAMES, *SUMS, "histograms")
        .iterator(chunk_size=2000)
    )
    days = [
        _folded(rows, IDENTITY)[0]
        for _, rows in groupby(rollups, key=lambda row: [row[column] for column in IDENTITY])
    ]
    _replace_summaries(Grain.DAY, start, days)
    _replace_summaries(Grain.PROJECT_DAY, start, _folded(days, KEYLESS))
    day.stale = False
    day.save(update_fields=["stale"])


def _replace_summaries(grain: Grain, start: datetime, rows: Sequence[Mapping[str, Any]]) -> None:
    UsageSummary.objects.filter(grain=grain, start=start).delete()
    UsageSummary.objects.bulk_create(
        [UsageSummary(grain=grain, start=start, **row) for row in rows], batch_size=200
    )


def _events_of(start: datetime) -> QuerySet[UsageEvent]:
    # Uses index usage_by_time_idx.
    return UsageEvent.objects.filter(started_at__gte=start, started_at__lt=start + HOUR)


def _add_up(events: QuerySet[UsageEvent]) -> list[dict[str, Any]]:
    """The columns of one rollup for each identity. No event is read into memory."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in events.order_by().values(*IDENTITY).annotate(**_NAMES, **_SUMS):
        rows[tuple(row[column] for column in IDENTITY)] = _plain(row) | {"histograms": {}}
    for row in count_buckets(events, *IDENTITY):
        histograms = rows[tuple(row[column] for column in IDENTITY)]["histograms"]
        histograms.setdefault(row["measure"], {})[str(row["bucket"])] = row["number"]
    return list(rows.values())


def _folded(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each value of the columns. What identifies a row and is not among them is emptied."""
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        identity = tuple(row[column] for column in columns)
        known = sums.get(identity)
        if known is None:
            known = sums[identity] = {**row, "histograms": {}}
            if "key_public_id" not in columns:
                known |= {"key_public_id": "", "key_name": ""}
        else:
            for name in SUMS:
                known[name] += row[name]
            known["project_name"] = max(known["project_name"], row["project_name"])
            if "key_public_id" in columns:
                known["key_name"] = max(known["key_name"], row["key_name"])
        for measure, histogram in row["histograms"].items():
            add_to(known["histograms"].setdefault(measure, {}), histogram)
    return list(sums.values())


def seal_hours(*, until: datetime) -> int:
    """Retention may delete the events of these hours from now on, up to each one's `sealed_at_event`: hours
    that ended by `until` and are rolled up. Their rollups are kept for good, and compared no more; an event
    that comes after this is added to them. Returns how many hours, at most `HOURS_AT_ONCE`."""
    hours = UsageHour.objects.filter(stale=False, sealed_at_event=None, start__lte=until - HOUR)
    starts = list(hours.order_by("start").values_list("start", flat=True)[:HOURS_AT_ONCE])
    return sum(_seal(start) for start in starts)


@transaction.atomic
def _seal(start: datetime) -> bool:
    hour = _fresh_hour(start)
    if hour is None:
        return False
    hour.sealed_at_event = _events_of(start).aggregate(last=Max("id"))["last"] or 0
    hour.save(update_fields=["sealed_at_event"])
    return True


def _fresh_hour(start: datetime) -> UsageHour | None:
    """Locked: rolled up, with all its events still there."""
    return (
        UsageHour.objects.select_for_update().filter(start=start, stale=False, sealed_at_event=None).first()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """An hour, or a day, whose sums did not say what is below them."""

    hour: datetime
    """Its start."""
    length: timedelta = HOUR
    events: Mapping[str, int]
    """For a day: what its hours add up to."""
    rollups: Mapping[str, int]


def reconcile_usage(*, since: datetime, until: datetime | None = None) -> list[Difference]:
    """Compare each rolled-up hour from `since` on with its events, and each day with its hours; returns
    those that differ, marked stale: reports read their events from now on, and the next `roll_up` replaces
    what was wrong. What was found is kept as a `UsageAudit`, for the usage page."""
    now = database_now()
    until = until or now
    since = hour_of(since)
    fresh = UsageHour.objects.filter(stale=False, sealed_at_event=None, start__gte=since, start__lt=until)
    starts = list(fresh.order_by("start").values_list("start", flat=True))
    differences = [found for start in starts if (found := _compare_hour(start))]
    days = UsageDay.objects.filter(stale=False, start__gte=since, start__lt=until)
    for start in list(days.order_by("start").values_list("start", flat=True)):
        if found := _compare_day(start):
            differences.append(found)
    UsageAudit.objects.create(
        checked_at=now,
        since=since,
        until=until,
        hours=len(starts),
        differences=[
            {
                "start": found.hour.isoformat(),
                "hours": found.length // HOUR,
                "events": found.events,
                "rollups": found.rollups,
            }
            for found in differences[:DIFFERENCES_KEPT]
        ],
    )
    UsageAudit.objects.filter(checked_at__lt=now - AUDITS_KEPT).delete()
    return differences


@transaction.atomic
def _compare_hour(start: datetime) -> Difference | None:
    hour = _fresh_hour(start)
    if hour is None:
        return None
    events = [_plain(row) for row in _events_of(start).order_by().values(*IDENTITY).annotate(**_SUMS)]
    rollups = list(UsageRollup.objects.filter(hour=start).values(*IDENTITY, *SUMS))
    summaries = _summaries(Grain.PROJECT_HOUR, start)
    found = _difference(events, rollups, IDENTITY) or _difference(events, summaries, KEYLESS)
    if found is None:
        return None
    hour.stale = True
    hour.save(update_fields=["stale"])
    return Difference(hour=start, events=found[0], rollups=found[1])


@transaction.atomic
def _compare_day(start: datetime) -> Difference | None:
    day = UsageDay.objects.select_for_update().filter(start=start, stale=False).first()
    if day is None:
        return None
    totals = {f"{_PREFIX}{name}": Sum(name) for name in SUMS}
    # Hours without the key: each was just compared with its events.
    hours = UsageSummary.objects.filter(grain=Grain.PROJECT_HOUR, start__gte=start, start__lt=start + DAY)
    below = [_plain(row) for row in hours.order_by().values(*KEYLESS).annotate(**totals)]
    by_key = UsageSummary.objects.filter(grain=Grain.DAY, start=start).order_by()
    of_keys = [_plain(row) for row in by_key.values(*KEYLESS).annotate(**totals)]
    found = _difference(below, _summaries(Grain.PROJECT_DAY, start), KEYLESS) or _difference(
        below, of_keys, KEYLESS
    )
    if found is None:
        return None
    day.stale = True
    day.save(update_fields=["stale"])
    return Difference(hour=start, length=DAY, events=found[0], rollups=found[1])


def _summaries(grain: Grain, start: datetime) -> list[dict[str, Any]]:
    return list(UsageSummary.objects.filter(grain=grain, start=start).values(*KEYLESS, *SUMS))


def _difference(
    below: Iterable[Mapping[str, Any]], above: Iterable[Mapping[str, Any]], columns: Sequence[str]
) -> tuple[dict[str, int], dict[str, int]] | None:
    """The totals of both, if they differ anywhere."""
    sides = []
    for rows in (below, above):
        sums: dict[tuple[Any, ...], list[int]] = {}
        for row in rows:
            known = sums.setdefault(tuple(row[column] for column in columns), [0] * len(SUMS))
            for place, name in enumerate(SUMS):
                known[place] += row[name]
        # Whoever has only zeros is as good as not there.
        sides.append({identity: numbers for identity, numbers in sums.items() if any(numbers)})
    if sides[0] == sides[1]:
        return None
    return _totals(sides[0].values()), _totals(sides[1].values())


def _totals(rows: Iterable[Sequence[int]]) -> dict[str, int]:
    totals = dict.fromkeys(SUMS, 0)
    for row in rows:
        for name, number in zip(SUMS, row, strict=True):
            totals[name] += number
    return totals


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(_PREFIX): value for name, value in row.items()}
