"""What people may do with keys by themselves, on their pages and through `/api/v1/`.

A role never reaches beyond its project, and what a project does not allow none of its keys may do, whoever
issued it. A member's key is that person's: nobody else gets a secret of it. Roles are not given here.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from django.db import transaction
from django.utils import timezone

from registry.actions.api_keys import (
    OVERLAP,
    change_api_key,
    issue_api_key,
    revoke_api_key,
    rotate_api_key,
)
from registry.errors import InvalidInput, InvalidTransition, NotAllowed
from registry.models import ApiKey, Membership, Project
from registry.rights import PRIORITY_ORDER, Priority, Role, matches_route

RIGHTS = ("expires_at", "routes", "scopes", "cidrs", "priority")
"""What decides what a key may do. A key's name and metadata decide nothing."""


def role_in(user: Any, project_id: int) -> str | None:
    """The person's role in the project; None: not a member."""
    return (
        Membership.objects.filter(user_id=user.pk, project_id=project_id)
        .values_list("role", flat=True)
        .first()
    )


def may_issue(role: str | None) -> bool:
    return role in (Role.OWNER, Role.MEMBER)


def may_rotate(user: Any, api_key: ApiKey, role: str | None) -> bool:
    """One's own keys; an owner those of programs too, unless they may do more than the owner could give."""
    if api_key.owner_id is not None:
        return api_key.owner_id == user.pk and may_issue(role)
    return role == Role.OWNER and not _above(api_key.priority, api_key.project.priority)


def may_change(user: Any, api_key: ApiKey, role: str | None) -> bool:
    """As for rotating: who could have its secret."""
    return may_rotate(user, api_key, role)


def may_revoke(user: Any, api_key: ApiKey, role: str | None) -> bool:
    """One's own keys; an owner all of the project."""
    return role == Role.OWNER or (may_issue(role) and api_key.owner_id == user.pk)


@transaction.atomic
def issue_own_key(
    *,
    user: Any,
    project: Project,
    name: str,
    expires_at: datetime | None = None,
    routes: list[str] | None = None,
    scopes: list[str] | None = None,
    cidrs: list[str] | None = None,
    priority: str | None = None,
    metadata: dict[str, str] | None = None,
) -> tuple[ApiKey, str]:
    """Make a key that belongs to `user`. What is not said is as the project has it. Raises NotAllowed and
    InvalidInput."""
    project = _locked(project)
    if not may_issue(role_in(user, project.pk)):
        raise NotAllowed(f"Only owners and members of {project} may issue its keys.")
    rights = _within(
        project,
        since=timezone.now(),
        expires_at=expires_at,
        routes=routes,
        scopes=scopes,
        cidrs=cidrs,
        priority=priority,
    )
    return issue_api_key(
        name=name, project=project, owner=user, by=user.get_username(), metadata=metadata, **rights
    )


@transaction.atomic
def change_own_key(*, user: Any, api_key: ApiKey, changes: Mapping[str, Any]) -> ApiKey:
    """Change a key's name, metadata or any of `RIGHTS`; None means as in a new key. Returns it as it is then.

    With the change it must be a key as this person could have issued it, all of its rights together: what
    an administrator gave beyond that is not spread to other routes or times. Raises NotAllowed,
    InvalidInput and InvalidTransition.
    """
    project = _locked(api_key.project)
    key = ApiKey.objects.select_for_update(of=("self",)).select_related("owner").get(pk=api_key.pk)
    if not may_change(user, key, role_in(user, project.pk)):
        raise NotAllowed("This key belongs to somebody else: only they may change it.")
    if not key.usable(timezone.now()):
        raise InvalidTransition("A key that was revoked or has expired cannot be changed; issue a new one.")
    facts = dict(changes)
    if any(name in changes for name in RIGHTS):
        asked = {name: facts.get(name, getattr(key, name)) for name in RIGHTS}
        facts |= _within(project, since=key.created_at, **asked)
    for name, value in facts.items():
        setattr(key, name, value)
    if facts:
        change_api_key(api_key=key, by=user.get_username())
    return key


@transaction.atomic
def rotate_own_key(*, user: Any, api_key: ApiKey, overlap: timedelta = OVERLAP) -> str:
    """See `rotate_api_key`. Raises NotAllowed too."""
    _locked(api_key.project)
    if not may_rotate(user, api_key, role_in(user, api_key.project_id)):
        raise NotAllowed("This key belongs to somebody else: only they may rotate it.")
    return rotate_api_key(api_key=api_key, by=user.get_username(), overlap=overlap)


@transaction.atomic
def revoke_own_key(*, user: Any, api_key: ApiKey, reason: str = "") -> None:
    """See `revoke_api_key`. Raises NotAllowed."""
    _locked(api_key.project)
    if not may_revoke(user, api_key, role_in(user, api_key.project_id)):
        raise NotAllowed("Only the key's owner, or an owner of its project, may revoke it.")
    revoke_api_key(api_key=api_key, by=user.get_username(), reason=reason)


def _within(
    project: Project,
    *,
    since: datetime,
    expires_at: datetime | None,
    routes: list[str] | None,
    scopes: list[str] | None,
    cidrs: list[str] | None,
    priority: str | None,
) -> dict[str, Any]:
    """The rights of a member's key issued at `since`, with what was not said. Raises InvalidInput."""
    now = timezone.now()
    if expires_at is not None and expires_at <= now:
        raise InvalidInput("expires_at", "That is over already.")
    if project.key_days is not None:
        latest = since + timedelta(days=project.key_days)
        if expires_at is None and latest > now:
            expires_at = latest
        elif expires_at is None or expires_at > latest:
            raise InvalidInput("expires_at", f"Keys of {project} end after {project.key_days} days at most.")
    if priority is None:
        priority = Priority.BATCH if project.priority == Priority.BATCH else Priority.DEFAULT
    elif priority not in Priority.values or _above(priority, project.priority):
        allowed = [one for one in Priority.values if not _above(one, project.priority)]
        raise InvalidInput("priority", f"Keys of {project} may have {', '.join(allowed)}.")
    for scope in scopes or []:
        if project.scopes and scope not in project.scopes:
            raise InvalidInput("scopes", f"Keys of {project} may have {', '.join(project.scopes)}.")
    for route in routes or []:
        if "*" not in route and not matches_route(project.routes, route):
            raise InvalidInput("routes", f"Keys of {project} may use {', '.join(project.routes)}.")
    return {
        "expires_at": expires_at,
        "routes": sorted(set(routes or [])),
        "scopes": sorted(set(scopes or [])),
        "cidrs": cidrs or [],
        "priority": priority,
    }


def _locked(project: Project) -> Project:
    # A role that is taken in this moment is taken before or after, not in between.
    return Project.objects.select_for_update().get(pk=project.pk)


def _above(priority: str, most: str) -> bool:
    return PRIORITY_ORDER[Priority(priority)] < PRIORITY_ORDER[Priority(most)]
