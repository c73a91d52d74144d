"""Keys: issue, change, rotate and revoke."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.db import models, transaction
from django.utils import timezone

from registry.actions.events import publish_change, record_event
from registry.errors import InvalidInput, InvalidTransition
from registry.keys import NewKey, digest_key, generate_key
from registry.models import ApiKey, Change, KeySecret, Project
from registry.querysets import owner_may_use
from registry.rights import Priority

MAX_SECRETS = 5
"""How many secrets of a key may be valid at once: each costs a wrong key one more digest."""
MAX_OVERLAP = timedelta(days=90)
OVERLAP = timedelta(hours=24)
"""How long the old secret lives on unless told otherwise."""
CHANGES_AT_ONCE = 500
"""Of more keys than these, the gateways are told to forget all."""
PERSON = "user-"
"""Public ids of people's chats begin with it; those of keys hold no dash."""


@transaction.atomic
def issue_api_key(
    *,
    name: str,
    project: Project,
    by: str,
    expires_at: datetime | None = None,
    routes: list[str] | None = None,
    scopes: list[str] | None = None,
    cidrs: list[str] | None = None,
    priority: str = Priority.DEFAULT,
    metadata: dict[str, str] | None = None,
    owner: Any = None,
) -> tuple[ApiKey, str]:
    """Make a key; returns the row and the key's text, which cannot be had again. Raises InvalidInput."""
    new = generate_key()
    api_key = ApiKey(
        name=name,
        project=project,
        owner=owner,
        public_id=new.public_id,
        last4=new.last4,
        expires_at=expires_at,
        routes=routes or [],
        scopes=scopes or [],
        cidrs=cidrs or [],
        priority=priority,
        metadata=metadata or {},
        created_by=by,
    )
    _check(api_key)
    # Two who issue the last one at once come one after the other.
    Project.objects.select_for_update().get(pk=project.pk)
    if full := no_room_in(project):
        raise InvalidInput("project", full)
    api_key.save(force_insert=True)
    _add_secret(api_key, new)
    record_event(api_key, "issued", by=by)
    # A gateway may hold "no such key" for this id from a moment ago.
    publish_change("api_key", api_key.public_id)
    return api_key, new.text


@transaction.atomic
def rotate_api_key(*, api_key: ApiKey, by: str, overlap: timedelta = OVERLAP) -> str:
    """Give the key a new secret; returns its text, which cannot be had again. Those of before work until
    `overlap` is over, or as long as they would have if that is less. Raises InvalidInput and
    InvalidTransition."""
    if not timedelta(0) <= overlap <= MAX_OVERLAP:
        raise InvalidInput("overlap", f"From nothing to {MAX_OVERLAP.days} days.")
    locked = ApiKey.objects.select_for_update().get(pk=api_key.pk)
    now = timezone.now()
    if not locked.usable(now):
        raise InvalidTransition("A key that was revoked or has expired cannot be rotated; issue a new one.")
    until = now + overlap
    valid = models.Q(expires_at__isnull=True) | models.Q(expires_at__gt=now)
    if overlap and locked.secrets.filter(valid).count() >= MAX_SECRETS:
        raise InvalidTransition(
            f"The key has {MAX_SECRETS} secrets that still work; wait until one has ended, or rotate with "
            "no overlap."
        )
    later = models.Q(expires_at__isnull=True) | models.Q(expires_at__gt=until)
    locked.secrets.filter(later).update(expires_at=until)
    new = generate_key(locked.public_id)
    _add_secret(locked, new)
    ApiKey.objects.filter(pk=locked.pk).update(last4=new.last4)
    api_key.last4 = new.last4
    record_event(
        api_key, "rotated", reason=f"The secret of before works until {until:%Y-%m-%d %H:%M:%S} UTC.", by=by
    )
    publish_change("api_key", api_key.public_id)
    return new.text


@transaction.atomic
def revoke_api_key(*, api_key: ApiKey, by: str, reason: str = "") -> None:
    """Refuse the key everywhere within a second, for good, and end its open answers. Revoking twice is no
    error."""
    changed = ApiKey.objects.filter(pk=api_key.pk, revoked_at__isnull=True).update(revoked_at=timezone.now())
    api_key.refresh_from_db(fields=["revoked_at"])
    if changed:
        record_event(api_key, "revoked", reason=reason, by=by)
        publish_change("api_key", api_key.public_id)


@transaction.atomic
def change_api_key(*, api_key: ApiKey, by: str) -> None:
    """Save edits of a key: all but its project and its secrets. Raises InvalidInput."""
    _check(api_key)
    api_key.save(
        update_fields=[
            "name", "owner", "routes", "scopes", "cidrs", "priority", "metadata", "expires_at",
        ]
    )  # fmt: skip
    record_event(api_key, "changed", by=by)
    publish_change("api_key", api_key.public_id)


@transaction.atomic
def note_key_use(*, secret_id: int, at: datetime) -> None:
    """Remember when a secret was last used. Not news for anybody: no event, no change."""
    # The key first, as a rotation does: the other way round the two could wait for each other.
    ApiKey.objects.filter(secrets=secret_id).update(last_used_at=at)
    KeySecret.objects.filter(pk=secret_id).update(last_used_at=at)


def publish_key_changes(keys: models.QuerySet[ApiKey]) -> None:
    """Something that these keys depend on has changed: the gateways read them again."""
    public_ids = list(keys.values_list("public_id", flat=True)[: CHANGES_AT_ONCE + 1])
    if len(public_ids) > CHANGES_AT_ONCE:
        public_ids = ["*"]
    Change.objects.bulk_create(Change(kind="api_key", key=public_id) for public_id in public_ids)


def still_good(public_ids: frozenset[str]) -> dict[str, datetime | None]:
    """Those among keys, and people's chats, that may go on, with the time at which they end by themselves."""
    keys = ApiKey.objects.usable(timezone.now()).select_related("project", "owner")
    good = {
        key.public_id: key.expires_at
        for key in keys.filter(public_id__in=[one for one in public_ids if not one.startswith(PERSON)])
        if owner_may_use(key)
    }
    people = [one.removeprefix(PERSON) for one in public_ids if one.startswith(PERSON)]
    active = get_user_model()._default_manager.filter(
        pk__in=[one for one in people if one.isdecimal()], is_active=True
    )
    return good | {f"{PERSON}{pk}": None for pk in active.values_list("pk", flat=True)}


def no_room_in(project: Project) -> str:
    """Why the project may have no more keys; empty when it may."""
    most = Project.objects.values_list("max_keys", flat=True).get(pk=project.pk)
    if most is None:
        return ""
    used = ApiKey.objects.usable(timezone.now()).filter(project=project).count()
    return f"{project} has {used} keys in use and may have {most}: revoke one first." if used >= most else ""


def _check(api_key: ApiKey) -> None:
    if not api_key.name.strip() or not api_key.name.isprintable():
        raise InvalidInput("name", "A key's name has 1 to 120 printable characters.")
    try:
        api_key.clean_fields()
    except ValidationError as error:
        field, messages = next(iter(error.message_dict.items()))
        raise InvalidInput(field, " ".join(messages)) from error
    if api_key.owner is not None and not owner_may_use(api_key):
        raise InvalidInput("owner", "Must be an active owner or member of the project.")


def _add_secret(api_key: ApiKey, new: NewKey) -> None:
    number = max(settings.ROUNDHOUSE_KEY_PEPPERS)
    KeySecret.objects.create(
        api_key=api_key,
        digest=digest_key(new.text, settings.ROUNDHOUSE_KEY_PEPPERS[number]),
        pepper=number,
        last4=new.last4,
    )
