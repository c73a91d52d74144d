"""The messages of a conversation: roles, and the parts that their content may have."""

from __future__ import annotations

import re
from operator import attrgetter
from typing import Annotated, Any, Literal

import msgspec

from openai_api import limits
from openai_api.errors import InvalidRequest
from openai_api.parsing import convert, invalid, missing


class ContentPart(msgspec.Struct, omit_defaults=True):
    type: str
    text: str | None = None
    refusal: str | None = None
    # What is no text, under the names that OpenAI, vLLM and Anthropic have for it.
    image_url: Any = None
    audio_url: Any = None
    video_url: Any = None
    input_audio: Any = None
    file: Any = None
    file_url: Any = None
    image: Any = None
    audio: Any = None
    video: Any = None
    source: Any = None


_MEDIA = (
    "image_url",
    "audio_url",
    "video_url",
    "input_audio",
    "file",
    "file_url",
    "image",
    "audio",
    "video",
    "source",
)
_media_of = attrgetter(*_MEDIA)
_NO_MEDIA = (None,) * len(_MEDIA)


class ChatMessage(msgspec.Struct, omit_defaults=True):
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], msgspec.Meta(max_length=limits.CONTENT_PARTS)] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=limits.TOOLS)] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None


class _CalledFunction(msgspec.Struct):
    name: str
    arguments: str


class _ToolCall(msgspec.Struct):
    """What a model called, as the client says it back."""

    id: str
    type: Literal["function"]
    function: _CalledFunction


def check_messages(messages: list[ChatMessage]) -> None:
    """Raises InvalidRequest naming what cannot be used."""
    for at, message in enumerate(messages):
        content = message.content
        if content is None:
            _check_silent(message, at)
        elif not isinstance(content, str):
            _check_parts(message.role, content, f"messages[{at}].content")
        role = message.role
        if role == "tool" and message.tool_call_id is None:
            raise missing(f"messages[{at}].tool_call_id")
        if message.tool_calls:
            convert(message.tool_calls, list[_ToolCall], f"messages[{at}].tool_calls")
        if message.function_call is not None or message.audio is not None:
            field = "audio" if message.function_call is None else "function_call"
            raise InvalidRequest(
                f"'messages[{at}].{field}' is not supported.",
                param=f"messages[{at}].{field}",
                code="unsupported_value",
            )


def forwarded_messages(messages: list[ChatMessage]) -> list[ChatMessage]:
    """As engines know them: what an assistant refused with is the text that it said."""
    if all(message.refusal is None and type(message.content) is not list for message in messages):
        return messages
    return [_without_refusals(message) for message in messages]


def _without_refusals(message: ChatMessage) -> ChatMessage:
    content = message.content
    if isinstance(content, list):
        content = [
            ContentPart("text", part.refusal) if part.type == "refusal" else ContentPart("text", part.text)
            for part in content
        ]
    elif content is None:
        content = message.refusal
    return msgspec.structs.replace(message, content=content, refusal=None)


def _check_silent(message: ChatMessage, at: int) -> None:
    said = message.tool_calls or message.function_call or message.refusal is not None
    if message.role != "assistant" or not said:
        raise missing(f"messages[{at}].content")


def _check_parts(role: str, parts: list[ContentPart], path: str) -> None:
    if not parts:
        raise invalid(path, "empty array. Expected at least one part.", "empty_array")
    for at, part in enumerate(parts):
        media = _media_of(part)
        if media != _NO_MEDIA:
            raise _no_media(part, f"{path}[{at}]")
        if part.type == "text":
            if part.text is None:
                raise missing(f"{path}[{at}].text")
        elif part.type == "refusal" and role == "assistant":
            if part.refusal is None:
                raise missing(f"{path}[{at}].refusal")
        else:
            raise _text_only(part.type, f"{path}[{at}].type")


def _no_media(part: ContentPart, path: str) -> InvalidRequest:
    for field in _MEDIA:
        if remote := _remote(getattr(part, field), f"{path}.{field}"):
            return InvalidRequest(
                "This server does not fetch media from other addresses: send it as a 'data:' URL.",
                param=remote,
                code="remote_media_disabled",
            )
    return _text_only(part.type, f"{path}.type")


def _text_only(kind: str, path: str) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid value: '{kind[:100]}'. This model reads text only: use content parts of type 'text'.",
        param=path,
        code="unsupported_value",
    )


def _remote(value: Any, path: str) -> str | None:
    """Where in `value` an address is that somebody would have to fetch."""
    if isinstance(value, str):
        return path if _ADDRESS.match(value) else None
    if isinstance(value, dict):
        inside = ((item, f"{path}.{key[:100]}") for key, item in value.items())
    elif isinstance(value, list):
        inside = ((item, f"{path}[{at}]") for at, item in enumerate(value))
    else:
        return None
    return next((found for item, at in inside if (found := _remote(item, at))), None)


_ADDRESS = re.compile(r"[\s\x00-\x20]*+(?!data:)(?:[a-z][a-z0-9+.-]{0,30}:|[/\\]{2})", re.IGNORECASE)
"""Any scheme but `data:`, and what has the scheme of the page that it is on. Spaces and control characters
before it are passed over, as URL parsers do."""
