"""Keys: issue and revoke."""

from __future__ import annotations

from datetime import datetime

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from registry.actions.events import publish_change, record_event
from registry.keys import digest_key, generate_key
from registry.models import ApiKey, Project


@transaction.atomic
def issue_api_key(
    *,
    name: str,
    project: Project,
    by: str,
    expires_at: datetime | None = None,
    routes: list[str] | None = None,
) -> tuple[ApiKey, str]:
    """Make a key; returns the row and the key's text, which cannot be had again."""
    new = generate_key()
    number = max(settings.ROUNDHOUSE_KEY_PEPPERS)
    api_key = ApiKey.objects.create(
        name=name,
        project=project,
        public_id=new.public_id,
        digest=digest_key(new.text, settings.ROUNDHOUSE_KEY_PEPPERS[number]),
        pepper=number,
        last4=new.last4,
        expires_at=expires_at,
        routes=routes or [],
        created_by=by,
    )
    record_event(api_key, "issued", by=by)
    # A gateway may hold "no such key" for this id from a moment ago.
    publish_change("api_key", api_key.public_id)
    return api_key, new.text


@transaction.atomic
def revoke_api_key(*, api_key: ApiKey, by: str, reason: str = "") -> None:
    """Refuse the key everywhere within a second, for good. Revoking twice is no error."""
    changed = ApiKey.objects.filter(pk=api_key.pk, revoked_at__isnull=True).update(revoked_at=timezone.now())
    api_key.refresh_from_db(fields=["revoked_at"])
    if changed:
        record_event(api_key, "revoked", reason=reason, by=by)
        publish_change("api_key", api_key.public_id)


@transaction.atomic
def change_api_key(*, api_key: ApiKey, by: str) -> None:
    """Save edits of a key's name, routes or expiry."""
    api_key.save(update_fields=["name", "routes", "expires_at"])
    record_event(api_key, "changed", by=by)
    publish_change("api_key", api_key.public_id)


def note_key_use(*, public_id: str, at: datetime) -> None:
    """Remember when a key was last used. Not news for anybody: no event, no change."""
    ApiKey.objects.filter(public_id=public_id).update(last_used_at=at)
