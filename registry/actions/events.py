"""The timeline and the change feed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.db import models

from registry.models import Change, Event
from registry.querysets import database_now

CHANGES_KEPT = timedelta(minutes=10)


def record_event(
    obj: models.Model, what: str, *, reason: str = "", by: str, data: dict[str, Any] | None = None
) -> Event:
    """Append to an object's timeline."""
    return Event.objects.create(
        kind=obj._meta.model_name or "",
        object_id=obj.pk,
        object_name=str(obj)[:120],
        what=what,
        reason=reason[:1000],
        by=by[:150],
        data=data or {},
    )


def publish_change(kind: str, key: str) -> None:
    """Tell every gateway to forget what it cached of this object. Call inside the change's transaction."""
    Change.objects.create(kind=kind, key=key)


def forget_old_changes() -> int:
    """Delete feed rows that every gateway has long read; returns how many."""
    deleted, _ = Change.objects.filter(at__lt=database_now() - CHANGES_KEPT).delete()
    return deleted
