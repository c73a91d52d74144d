"""Retention: the one way by which usage events leave the ledger. Their hourly sums stay for good."""

from __future__ import annotations

from datetime import datetime

from django.db import transaction

from registry.actions.rollups import HOUR, hour_of, seal_hours
from registry.models import LedgerDoor, UsageEvent, UsageHour

BATCH = 1000
BATCHES_AT_ONCE = 50
"""Of one call: what is left comes with the next."""


def forget_usage(*, before: datetime) -> int:
    """Delete events of whole hours that ended before `before`, in batches, at most `BATCHES_AT_ONCE`;
    returns how many.

    Only of hours that are rolled up and sealed: their sums are then never computed from events again. What
    comes late for such an hour is added to its sums, and deleted with the next call.
    """
    while seal_hours(until=before):
        pass
    forgotten = batches = 0
    since: datetime | None = None
    while batches < BATCHES_AT_ONCE:
        hour = _oldest_hour(since, before)
        if hour is None:
            break
        deleted = _forget_batch(hour)
        batches += 1
        forgotten += deleted
        if deleted < BATCH:
            since = hour + HOUR
    return forgotten


def _oldest_hour(since: datetime | None, before: datetime) -> datetime | None:
    """The first hour from `since` on that has events and ended by `before`."""
    # Uses index usage_by_time_idx.
    events = UsageEvent.objects.filter(started_at__lt=hour_of(before))
    if since is not None:
        events = events.filter(started_at__gte=since)
    first = events.order_by("started_at").values_list("started_at", flat=True).first()
    return hour_of(first) if first is not None else None


@transaction.atomic
def _forget_batch(start: datetime) -> int:
    sealed = UsageHour.objects.filter(start=start).values_list("sealed_at_event", flat=True).first()
    if sealed is None:
        # Not rolled up yet: its turn comes.
        return 0
    events = UsageEvent.objects.filter(started_at__gte=start, started_at__lt=start + HOUR, id__lte=sealed)
    # Neither database knows a LIMIT in a DELETE.
    batch = list(events.order_by("started_at").values_list("pk", flat=True)[:BATCH])
    if not batch:
        return 0
    door = LedgerDoor.objects.create(why="retention")
    deleted, _ = UsageEvent.objects.filter(pk__in=batch).delete()
    # Closed before the commit: no other transaction ever finds it open.
    door.delete()
    return deleted
