"""Limits: set, change, remove. Every gateway goes by them within a second."""

from __future__ import annotations

from django.db import transaction

from registry.actions.events import publish_change, record_event
from registry.models import Limit


@transaction.atomic
def save_limit(*, limit: Limit, by: str) -> Limit:
    """Save a new limit or an edited one. Raises ValidationError, which names the fields.

    What was used before counts on after a change of the amount, the burst, or what a limit is for while
    Redis is away; counted per another time, or by another measure, it begins with nothing used.
    """
    limit.full_clean()
    new = limit.pk is None
    before = None if new else Limit.objects.select_for_update().filter(pk=limit.pk).first()
    limit.save()
    record_event(limit, "set" if new else "changed", reason=limit.effect, by=by)
    for one in filter(None, (before, limit)):
        _publish(one)
    return limit


@transaction.atomic
def remove_limit(*, limit: Limit, by: str) -> None:
    """Let go what it held back."""
    record_event(limit, "removed", by=by)
    _publish(limit)
    limit.delete()


def _publish(limit: Limit) -> None:
    # A key's own limit concerns that key; any other may concern keys that only the gateways could name.
    publish_change("api_key", limit.api_key.public_id if limit.api_key is not None else "*")
