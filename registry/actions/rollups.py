"""Hourly sums of the ledger. They only save time: whatever they say, the events say it too.

A report takes fresh hours from the rollups and stale ones from the events, so it is exact at any
moment; rolling up late, twice or never changes its speed and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db import transaction
from django.db.models import Count, Max, Sum, Value
from django.db.models.functions import Coalesce

from registry.models import UsageEvent, UsageHour, UsageRollup
from registry.querysets import database_now

HOUR = timedelta(hours=1)
HOURS_AT_ONCE = 200
"""Of one call of `roll_up`: what is left comes with the next."""
IDENTITY = ("project_id", "key_public_id", "route", "endpoint", "outcome")

_PREFIX = "its_"
"""An aggregate may not have the name of a column that another one reads."""
# Names are snapshots, and may change within an hour: the last in the alphabet stands for all, here as in
# the report, so that both say the same whichever they were read from.
_NAMES = {"its_project_name": Max("project_name"), "its_key_name": Max("key_name")}
_SUMS = {
    "its_requests": Count("id"),
    "its_prompt_tokens": Coalesce(Sum("prompt_tokens"), Value(0)),
    "its_cached_tokens": Coalesce(Sum("cached_tokens"), Value(0)),
    "its_completion_tokens": Coalesce(Sum("completion_tokens"), Value(0)),
    "its_duration_ms": Coalesce(Sum("duration_ms"), Value(0)),
    "its_duration_count": Count("duration_ms"),
    "its_ttft_ms": Coalesce(Sum("ttft_ms"), Value(0)),
    "its_ttft_count": Count("ttft_ms"),
}


def hour_of(instant: datetime) -> datetime:
    """The start of its hour, in UTC."""
    return instant.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def mark_stale(hours: Iterable[datetime]) -> None:
    """These hours get events in this transaction. Each is locked until the transaction ends, so that
    nobody rolls it up without them."""
    # Sorted: two batches that share several hours lock them in the same order.
    UsageHour.objects.bulk_create(
        [UsageHour(start=start, stale=True) for start in sorted(set(hours))],
        update_conflicts=True,
        unique_fields=["start"],
        update_fields=["stale"],
    )


def roll_up(*, since: datetime | None = None, until: datetime | None = None) -> int:
    """Add up again, whole, each stale hour that began at `since` or later and ended by `until` (default:
    now); returns how many.

    Idempotent: an hour's rollups are replaced. A transaction per hour, at most `HOURS_AT_ONCE`, the newest
    first. The running hour is left to its events: it would be stale again at once.
    """
    until = until or database_now()
    # Uses index usage_hour_stale_idx.
    stale = UsageHour.objects.filter(stale=True, start__lte=until - HOUR)
    if since is not None:
        stale = stale.filter(start__gte=since)
    starts = list(stale.order_by("-start").values_list("start", flat=True)[:HOURS_AT_ONCE])
    return sum(_roll_up_hour(start) for start in starts)


@transaction.atomic
def _roll_up_hour(start: datetime) -> bool:
    # Waits for whoever appends an event of this hour just now; SQLite has one writer at a time anyway.
    hour = UsageHour.objects.select_for_update().filter(start=start, stale=True).first()
    if hour is None:
        return False
    sums = (
        # Uses index usage_by_time_idx.
        UsageEvent.objects.filter(started_at__gte=start, started_at__lt=start + HOUR)
        .order_by()
        .values(*IDENTITY)
        .annotate(**_NAMES, **_SUMS)
    )
    rollups = [UsageRollup(hour=start, **_plain(row)) for row in sums]
    UsageRollup.objects.filter(hour=start).delete()
    UsageRollup.objects.bulk_create(rollups, batch_size=200)
    hour.stale = False
    hour.save(update_fields=["stale"])
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """An hour whose rollups did not say what its events say."""

    hour: datetime
    events: Mapping[str, int]
    rollups: Mapping[str, int]


def reconcile_usage(*, since: datetime, until: datetime | None = None) -> list[Difference]:
    """Compare each rolled-up hour from `since` on with its events; returns those that differ, marked stale:
    reports read their events from now on, and the next `roll_up` replaces what was wrong."""
    until = until or database_now()
    starts = UsageHour.objects.filter(stale=False, start__gte=hour_of(since), start__lt=until)
    differences = []
    for start in starts.values_list("start", flat=True):
        difference = _compare(start)
        if difference is not None:
            differences.append(difference)
    return differences


@transaction.atomic
def _compare(start: datetime) -> Difference | None:
    hour = UsageHour.objects.select_for_update().filter(start=start, stale=False).first()
    if hour is None:
        return None
    these = UsageEvent.objects.filter(started_at__gte=start, started_at__lt=start + HOUR)
    totals = {name: Coalesce(Sum(name.removeprefix(_PREFIX)), Value(0)) for name in _SUMS}
    events = _plain(these.aggregate(**_SUMS))
    rollups = _plain(UsageRollup.objects.filter(hour=start).aggregate(**totals))
    if events == rollups:
        return None
    hour.stale = True
    hour.save(update_fields=["stale"])
    return Difference(hour=start, events=events, rollups=rollups)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(_PREFIX): value for name, value in row.items()}
