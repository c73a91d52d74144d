"""Named questions. Time comes in as `now`, read once from the database's clock (`database_now`)."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from django.db import connection, models
from django.utils import timezone

from registry.rights import Role
from registry.states import WORKER_BEATING, WORKER_LIVE, NodeState, WorkerState

if TYPE_CHECKING:
    from django.contrib.auth.base_user import AbstractBaseUser

    from registry.models import ApiKey, Limit, Node, Project, Worker  # noqa: F401 (type arguments below)


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

    def ended(self, now: datetime) -> ApiKeyQuerySet:
        """The others."""
        return self.filter(models.Q(revoked_at__isnull=False) | models.Q(expires_at__lte=now))

    def seen_by(self, user: AbstractBaseUser) -> ApiKeyQuerySet:
        """Those that a person may see on their own pages: of the projects in which they have a role."""
        return self.filter(project__memberships__user_id=user.pk)


def owner_may_use(api_key: ApiKey) -> bool:
    """A program's key has no owner; a person's lives as long as they may issue keys in its project."""
    return api_key.owner is None or may_own_keys(api_key.owner, api_key.project)


def may_own_keys(user: AbstractBaseUser, project: Project) -> bool:
    """Is this person active, and more than a viewer of the project?"""
    roles = (Role.OWNER, Role.MEMBER)
    return user.is_active and project.memberships.filter(user_id=user.pk, role__in=roles).exists()


class LimitQuerySet(models.QuerySet["Limit"]):
    def concerning(self, *, api_key_id: int | None, project_id: int, user_id: int | None) -> LimitQuerySet:
        """Those that this key's requests may meet, whatever their route; a chat has no key."""

        def either(field: str, pk: int | None) -> models.Q:
            nobody = models.Q(**{f"{field}__isnull": True})
            return nobody if pk is None else nobody | models.Q(**{field: pk})

        return self.filter(
            either("api_key", api_key_id), either("project", project_id), either("user", user_id)
        )


def heard_until(now: datetime, *, for_seconds: float, fresh_seconds: float = 3.0) -> datetime | None:
    """Up to when gateways heard beats, if one did so without a break for `for_seconds` and was there until a
    moment ago; else None.

    Silence counts only up to then: nobody is blamed for what no gateway could hear, and after a gateway
    or database return nobody is declared lost for a while.
    """
    from registry.models import Gateway

    return (
        Gateway.objects.filter(
            listening_since__lte=now - timedelta(seconds=for_seconds),
            seen_at__gte=now - timedelta(seconds=fresh_seconds),
        )
        .aggregate(last=models.Max("seen_at"))
        .get("last")
    )
