"""The ledger's one way in."""

from __future__ import annotations

from collections.abc import Sequence

from django.db import transaction

from registry.models import UsageEvent


@transaction.atomic
def record_usage(events: Sequence[UsageEvent]) -> None:
    """Append events. An event whose request id is in the ledger already is left as it stands there:
    a batch may be brought twice (the sender died after the commit), and counts once."""
    UsageEvent.objects.bulk_create(
        events,
        batch_size=200,
        # Not `ignore_conflicts`: SQLite would then also swallow an event that breaks a check.
        update_conflicts=True,
        unique_fields=["request_id"],
        update_fields=["request_id"],
    )
