"""Named questions. Time comes in as `now`, read once from the database's clock (`database_now`)."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from django.db import connection, models
from django.utils import timezone

from registry.states import WORKER_BEATING, WORKER_LIVE, NodeState, WorkerState

if TYPE_CHECKING:
    from registry.models import ApiKey, Node, Worker  # noqa: F401 (type arguments below)


def database_now() -> datetime:
    """The database's own clock: liveness is judged by no other. SQLite's is this machine's."""
    if connection.vendor == "sqlite":
        return timezone.now()
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        return cursor.fetchone()[0]  # type: ignore[no-any-return]


class WorkerQuerySet(models.QuerySet["Worker"]):
    def live(self) -> WorkerQuerySet:
        """Those that hold a replica's place. Uses index worker_live_idx."""
        return self.filter(state__in=WORKER_LIVE)

    def ready(self) -> WorkerQuerySet:
        """Those that may get new requests."""
        return self.filter(state=WorkerState.READY)

    def silent_since(self, instant: datetime) -> WorkerQuerySet:
        """Those that should beat and did not after `instant`."""
        return self.filter(state__in=WORKER_BEATING | {WorkerState.SUSPECT}).filter(
            models.Q(heartbeat_at__lt=instant)
            | models.Q(heartbeat_at__isnull=True, state_changed_at__lt=instant)
        )


class NodeQuerySet(models.QuerySet["Node"]):
    def accepting(self) -> NodeQuerySet:
        """Those that may get a new worker."""
        return self.filter(state=NodeState.ONLINE, cordoned=False)

    def silent_since(self, instant: datetime) -> NodeQuerySet:
        return self.filter(state__in=[NodeState.ONLINE, NodeState.SUSPECT], last_seen_at__lt=instant)


class ApiKeyQuerySet(models.QuerySet["ApiKey"]):
    def usable(self, now: datetime) -> ApiKeyQuerySet:
        """Those neither revoked nor expired."""
        return self.filter(revoked_at__isnull=True).filter(
            models.Q(expires_at__isnull=True) | models.Q(expires_at__gt=now)
        )


def heard_without_break(now: datetime, *, for_seconds: float, fresh_seconds: float = 3.0) -> bool:
    """Was a gateway there to hear beats during the last `for_seconds`, and is it still?

    Silence counts only then: after a gateway or database return nobody is declared lost for a while.
    """
    from registry.models import Gateway

    return Gateway.objects.filter(
        listening_since__lte=now - timedelta(seconds=for_seconds),
        seen_at__gte=now - timedelta(seconds=fresh_seconds),
    ).exists()
