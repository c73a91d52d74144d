"""Gateways' presence: without one there to hear them, a worker's silence says nothing."""

from __future__ import annotations

from datetime import timedelta

from django.db import transaction

from registry.models import Gateway
from registry.querysets import database_now

SILENT_GATEWAYS_KEPT = timedelta(hours=1)
SILENT_AFTER = timedelta(seconds=5)
"""Who has not been heard for so long counts as gone."""


@transaction.atomic
def note_gateway(*, name: str, unbroken: bool) -> None:
    """Say that gateway `name` is listening.

    `unbroken` False starts its presence anew: it, or the database, was away.
    """
    now = database_now()
    if unbroken and Gateway.objects.filter(name=name).update(seen_at=now):
        return
    Gateway.objects.update_or_create(name=name, defaults={"listening_since": now, "seen_at": now})


def forget_gateway(*, name: str) -> None:
    """The gateway ends in good order."""
    Gateway.objects.filter(name=name).delete()


def forget_silent_gateways() -> int:
    """Delete gateways that ended without a word long ago; returns how many."""
    deleted, _ = Gateway.objects.filter(seen_at__lt=database_now() - SILENT_GATEWAYS_KEPT).delete()
    return deleted


def count_gateways() -> int:
    """How many gateways are there now."""
    return Gateway.objects.filter(seen_at__gte=database_now() - SILENT_AFTER).count()
