"""The ledger's one way in."""

from __future__ import annotations

from collections.abc import Sequence

from django.db import transaction

from registry.actions.rollups import hour_of, mark_stale
from registry.models import UsageEvent


@transaction.atomic
def record_usage(events: Sequence[UsageEvent]) -> None:
    """Append events. An event whose request id is in the ledger already is left as it stands there:
    a batch may be brought twice (the sender died after the commit), and counts once.

    An event may come long after its hour: it marks that hour stale, so that it is added up again.
    """
    UsageEvent.objects.bulk_create(
        events,
        batch_size=200,
        # Not `ignore_conflicts`: SQLite would then also swallow an event that breaks a check.
        update_conflicts=True,
        unique_fields=["request_id"],
        update_fields=["request_id"],
    )
    mark_stale(hour_of(event.started_at) for event in events)
