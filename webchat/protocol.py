"""What page and server say to each other: frames of the socket, bodies of the JSON API.

A field that is not named here is refused, as is a frame of another type.
"""

from __future__ import annotations

import re
import uuid
from typing import Annotated, Any, TypeVar

import msgspec

from webchat import bounds
from webchat.errors import BadInput
from webchat.models import TITLE_LENGTH, Conversation, Message

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=120)]
_Content = Annotated[str, msgspec.Meta(max_length=bounds.CONTENT_CHARACTERS)]


class Settings(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """How a conversation is answered. Null means: the model's own default."""

    system: Annotated[str, msgspec.Meta(max_length=bounds.SYSTEM_CHARACTERS)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=bounds.TEMPERATURE_MAX)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=bounds.MAX_TOKENS)] | None = None


class NewConversation(msgspec.Struct, forbid_unknown_fields=True):
    model: _Name | None = None


class Change(msgspec.Struct, forbid_unknown_fields=True):
    title: Annotated[str, msgspec.Meta(max_length=TITLE_LENGTH)] | msgspec.UnsetType = msgspec.UNSET
    model: _Name | msgspec.UnsetType = msgspec.UNSET
    settings: Settings | msgspec.UnsetType = msgspec.UNSET
    leaf: uuid.UUID | msgspec.UnsetType = msgspec.UNSET


class _Frame(msgspec.Struct, tag_field="type", forbid_unknown_fields=True):
    pass


class Send(_Frame, tag="send"):
    """Say something. Without `parent`: after the branch in view; with null: as a new first message."""

    conversation: uuid.UUID
    content: _Content
    parent: uuid.UUID | msgspec.UnsetType | None = msgspec.UNSET
    model: _Name | None = None


class Regenerate(_Frame, tag="regenerate"):
    message: uuid.UUID
    model: _Name | None = None


class Stop(_Frame, tag="stop"):
    message: uuid.UUID


class Attach(_Frame, tag="attach"):
    """Follow an answer from behind the text up to `after`, a `seq` seen before; "0": from its start."""

    message: uuid.UUID
    after: Annotated[str, msgspec.Meta(max_length=40)] = "0"


class Detach(_Frame, tag="detach"):
    message: uuid.UUID


Frame = Send | Regenerate | Stop | Attach | Detach

T = TypeVar("T")

read_frame = msgspec.json.Decoder(Frame).decode
_FIELD = re.compile(r"^(?P<said>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)


def explain(error: msgspec.DecodeError | UnicodeDecodeError) -> str:
    """What is wrong with JSON that a page sent, as a sentence."""
    if not isinstance(error, msgspec.ValidationError):
        return "This is not valid JSON."
    found = _FIELD.match(str(error))
    said, path = (found["said"], found["path"]) if found else (str(error), None)
    return f"{path}: {said[:200]}." if path else f"{said[:200]}."


def read_body(body: bytes, kind: type[T]) -> T:
    """A JSON body as one of the structs. Raises BadInput naming the field."""
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadInput(explain(error)) from None
    except RecursionError:
        raise BadInput("The JSON is nested too deep.") from None


# -- Positions in an answer. A `seq` is how much of it there is so far, written so that text order is order.


def seq_of(position: int) -> str:
    return f"{position:012d}-0"


def position_of(seq: str) -> int:
    """Raises BadInput for what no server of ours has said."""
    number, _, rest = seq.partition("-")
    if not number.isascii() or not number.isdecimal() or (rest and rest not in ("0", "1")):
        raise BadInput("after: this is no seq of an answer.")
    return int(number)


# -- What the server says


def show_listed(conversation: Conversation) -> dict[str, Any]:
    """A conversation in the list."""
    return {
        "id": str(conversation.pk),
        "title": conversation.title,
        "model": conversation.model,
        "updated_at": conversation.updated_at.isoformat(),
    }


def show_conversation(conversation: Conversation) -> dict[str, Any]:
    """A conversation with its whole tree."""
    messages = conversation.messages.order_by("created_at", "position")
    return show_listed(conversation) | {
        "created_at": conversation.created_at.isoformat(),
        "settings": conversation.settings,
        "leaf": str(conversation.leaf_id) if conversation.leaf_id else None,
        "messages": [show_message(message) for message in messages],
    }


def show_message(message: Message) -> dict[str, Any]:
    return {
        "id": str(message.pk),
        "parent": str(message.parent_id) if message.parent_id else None,
        "role": message.role,
        "content": message.content,
        "state": message.state,
        "error": message.error or None,
        "model": message.model,
        "prompt_tokens": message.prompt_tokens,
        "completion_tokens": message.completion_tokens,
        "ttft_ms": message.ttft_ms,
        "duration_ms": message.duration_ms,
        "created_at": message.created_at.isoformat(),
    }


def show_end(message: Message, *, title: str) -> dict[str, Any]:
    """How an answer ended: the `end` frame without its type, message and seq."""
    end: dict[str, Any] = {
        "state": message.state,
        "prompt_tokens": message.prompt_tokens,
        "completion_tokens": message.completion_tokens,
        "ttft_ms": message.ttft_ms,
        "duration_ms": message.duration_ms,
    }
    if message.error:
        end["error"] = message.error
    if title:
        end["title"] = title
    return end
