"""Projects and who may do what in them. Roles are given and taken by administrators alone."""

from __future__ import annotations

from typing import Any

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import ProtectedError

from registry.actions.api_keys import PERSON, publish_key_changes, revoke_api_key
from registry.actions.events import publish_change, record_event
from registry.errors import InvalidInput, StillInUse
from registry.models import ApiKey, Membership, Project
from registry.rights import Role


@transaction.atomic
def save_project(*, project: Project, by: str) -> Project:
    """Create or change a project. Its keys follow within a second. Raises InvalidInput."""
    try:
        project.full_clean()
    except ValidationError as error:
        field, messages = next(iter(error.message_dict.items()))
        raise InvalidInput(field, " ".join(messages)) from error
    new = project.pk is None
    project.save()
    record_event(project, "created" if new else "changed", by=by)
    if not new:
        publish_key_changes(project.api_keys.filter(revoked_at__isnull=True))
    return project


@transaction.atomic
def delete_project(*, project: Project, by: str) -> None:
    """Delete a project that never had a key. Raises StillInUse."""
    record_event(project, "deleted", by=by)
    try:
        project.delete()
    except ProtectedError as error:
        raise StillInUse(f"{project} has keys, which the ledger names; revoke them instead.") from error


@transaction.atomic
def set_role(*, project: Project, user: Any, role: str, by: str) -> Membership:
    """Give a person a role in a project, instead of the one that they have. Raises InvalidInput."""
    if role not in Role.values:
        raise InvalidInput("role", f"One of {', '.join(Role.values)}.")
    membership, made = Membership.objects.select_for_update().get_or_create(
        project=project, user=user, defaults={"role": role}
    )
    if not made and membership.role == role:
        return membership
    before = "nothing" if made else membership.role
    membership.role = role
    membership.save(update_fields=["role"])
    _note(project, user, f"{before} → {role}", by)
    return membership


@transaction.atomic
def remove_member(*, project: Project, user: Any, by: str) -> None:
    """Take a person's role. Keys of theirs in the project are refused from then on."""
    membership = Membership.objects.select_for_update().filter(project=project, user=user).first()
    if membership is None:
        return
    before = membership.role
    membership.delete()
    _note(project, user, f"{before} → nothing", by)


def note_person_changed(*, user_id: int) -> None:
    """A person was perhaps disabled: the gateways look at their keys and chats again."""
    publish_key_changes(ApiKey.objects.filter(owner_id=user_id, revoked_at__isnull=True))
    publish_change("api_key", f"{PERSON}{user_id}")


def note_people_changed(disabled: frozenset[int]) -> frozenset[int]:
    """Who is disabled now. Of those who were not when it was `disabled`, or are no more, the gateways look at
    keys and chats again: an update of many people at once tells no signal of it."""
    now = frozenset(get_user_model().objects.filter(is_active=False).values_list("pk", flat=True))
    for user_id in sorted(now ^ disabled):
        note_person_changed(user_id=user_id)
    return now


@transaction.atomic
def end_keys_of(*, user: Any, by: str) -> None:
    """Revoke a person's keys: they are about to be deleted, and nobody's key would be anybody's."""
    for api_key in ApiKey.objects.filter(owner=user, revoked_at__isnull=True):
        revoke_api_key(api_key=api_key, by=by, reason=f"{user.get_username()} was deleted.")
    publish_change("api_key", f"{PERSON}{user.pk}")


def _note(project: Project, user: Any, change: str, by: str) -> None:
    record_event(project, "role", reason=f"{user.get_username()}: {change}", by=by)
    publish_key_changes(project.api_keys.filter(owner=user, revoked_at__isnull=True))
