"""Responses that are kept: what a client may go on from, read again and delete."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from django.conf import settings
from django.db import Error as DatabaseError
from django.db import transaction
from django.utils import timezone

from openai_api.auth import Key
from openai_api.errors import InvalidRequest, StorageAway
from openai_api.models import StoredResponse
from openai_api.responses.items import InputItem, place_of
from openai_api.responses.request import ResponsesRequest
from registry.threads import in_database

TURNS = 1000
"""How many responses, each built on the one before, one conversation has at most."""
DELETED_AT_ONCE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A response with what is needed to go on from it."""

    response: dict[str, Any]
    items: list[dict[str, Any]]
    earlier: list[str]
    """Ids of the responses that it is built on."""
    project_id: int


def save(turn: Turn) -> None:
    """Keep a response, and those that it is built on for as long."""
    kept_until = timezone.now() + timedelta(days=settings.ROUNDHOUSE_RESPONSE_DAYS)
    with transaction.atomic():
        StoredResponse.objects.create(
            id=turn.response["id"],
            project_id=turn.project_id,
            previous_id=turn.response["previous_response_id"] or "",
            created_at=datetime.fromtimestamp(turn.response["created_at"], UTC),
            expires_at=kept_until,
            items=msgspec.json.encode(turn.items).decode(),
            answer=msgspec.json.encode(turn.response).decode(),
        )
        StoredResponse.objects.for_project(turn.project_id).filter(id__in=turn.earlier).update(
            expires_at=kept_until
        )


def find(project_id: int, response_id: str) -> StoredResponse | None:
    """The project's own, and not expired."""
    return StoredResponse.objects.for_project(project_id).filter(id=response_id).first()


def delete(project_id: int, response_id: str) -> bool:
    """Returns whether there was one."""
    deleted, _ = StoredResponse.objects.for_project(project_id).filter(id=response_id).delete()
    return deleted > 0


def forget_expired() -> int:
    """Delete some of what is no longer kept; returns how many. To be called until it returns 0."""
    old = StoredResponse.objects.filter(expires_at__lt=timezone.now()).values_list("id", flat=True)
    deleted, _ = StoredResponse.objects.filter(id__in=list(old[:DELETED_AT_ONCE])).delete()
    return deleted


async def prepare(call: ResponsesRequest, key: Key) -> None:
    """Look up what the call refers to: the response that it goes on from, and single items. Raises
    InvalidRequest for what is not there, or another project's."""
    if call.previous_response_id is None and not any(item.is_reference for item in call.items):
        return
    try:
        earlier, ids, items = await in_database(_look_up, call, key.project_id)
    except DatabaseError as error:
        raise StorageAway from error
    call.earlier, call.resolved = ids, items
    call.resolve(earlier, items)


def _look_up(call: ResponsesRequest, project_id: int) -> tuple[list[InputItem], list[str], list[InputItem]]:
    turns = _conversation(call.previous_response_id, project_id) if call.previous_response_id else []
    items = [
        _referred(item, at, project_id) if item.is_reference else item for at, item in enumerate(call.items)
    ]
    return [item for turn in turns for item in _items_of(turn)], [turn.id for turn in turns], items


def _conversation(response_id: str, project_id: int) -> list[StoredResponse]:
    """The response and all that it is built on, the oldest first."""
    turns: list[StoredResponse] = []
    wanted = response_id
    while wanted:
        turn = find(project_id, wanted)
        if turn is None:
            raise InvalidRequest(
                f"Previous response with id '{wanted}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        turns.append(turn)
        if len(turns) > TURNS:
            raise InvalidRequest(
                f"The conversation has more than {TURNS} responses. Begin a new one.",
                param="previous_response_id",
                code="array_above_max_length",
            )
        wanted = turn.previous_id
    turns.reverse()
    return turns


def _referred(item: InputItem, at: int, project_id: int) -> InputItem:
    place = place_of(item.id or "")
    turn = find(project_id, place[0]) if place is not None else None
    items = _items_of(turn) if turn is not None else []
    if place is None or place[1] >= len(items):
        raise InvalidRequest(
            f"Item with id '{(item.id or '')[:100]}' not found.", param=f"input[{at}].id", code="not_found"
        )
    return items[place[1]]


def _items_of(turn: StoredResponse) -> list[InputItem]:
    answered = _decode_output(turn.answer).output
    return _decode_items(turn.items) + answered


class _Answer(msgspec.Struct):
    output: list[InputItem]


_decode_items = msgspec.json.Decoder(list[InputItem]).decode
_decode_output = msgspec.json.Decoder(_Answer).decode
