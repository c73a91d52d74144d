"""The items of a conversation: what clients send, what is kept, and the chat messages they mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec

from openai_api import limits
from openai_api.errors import InvalidRequest
from openai_api.parsing import missing


class InputPart(msgspec.Struct, omit_defaults=True):
    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    detail: str | None = None


Parts = Annotated[list[InputPart], msgspec.Meta(max_length=limits.CONTENT_PARTS)]


class InputItem(msgspec.Struct, omit_defaults=True):
    type: str | None = None
    """None: a message, as many clients leave it out; with an id alone, a reference."""
    id: str | None = None
    status: str | None = None
    role: Literal["developer", "system", "user", "assistant"] | None = None
    content: str | Parts | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Parts | None = None
    summary: list[dict[str, Any]] | None = None
    encrypted_content: str | None = None

    @property
    def kind(self) -> str:
        if self.type is not None:
            return self.type
        return "item_reference" if self.id is not None and self.role is None else "message"

    @property
    def is_reference(self) -> bool:
        return self.kind == "item_reference"

    def check(self, place: str) -> None:
        """Raises InvalidRequest for what cannot be said to a model."""
        match self.kind:
            case "message":
                needed: tuple[str, ...] = ("role", "content")
            case "function_call":
                needed = ("call_id", "name", "arguments")
            case "function_call_output":
                needed = ("call_id", "output")
            case "item_reference":
                needed = ("id",)
            case "reasoning":
                needed = ()
            case other:
                raise _unsupported(f"{place}.type", other)
        for field in needed:
            if getattr(self, field) is None:
                raise missing(f"{place}.{field}")

    def stored(self, item_id: str) -> dict[str, Any]:
        """As a list of input items tells it: with an id, and content always in parts."""
        item: dict[str, Any] = {"id": self.id or item_id, "type": self.kind, "status": "completed"}
        item |= msgspec.to_builtins(self)
        if self.kind == "message" and isinstance(self.content, str):
            kind = "output_text" if self.role == "assistant" else "input_text"
            item["content"] = [{"type": kind, "text": self.content}]
        return item


PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
    "item_reference": "ref",
}


def item_id(kind: str, response_id: str, at: int) -> str:
    """The id of the item at this place of a response's input and output together: it leads back there."""
    return f"{PREFIXES[kind]}_{response_id.removeprefix('resp_')}_{at}"


def place_of(item_id: str) -> tuple[str, int] | None:
    """The response and the place that an id of ours leads to."""
    _, _, rest = item_id.partition("_")
    response, _, at = rest.rpartition("_")
    if not (response.isascii() and response.isalnum() and at.isascii() and at.isdigit() and len(at) < 6):
        return None
    return f"resp_{response}", int(at)


class Messages:
    """Chat messages made of items, and of each which part of the request it came from."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.places: list[str] = []

    def say(self, role: str, text: str, place: str) -> None:
        self._add({"role": role, "content": text}, place)

    def add(self, items: Iterable[InputItem], place: str) -> None:
        """`place` names the list that the items are in."""
        for at, item in enumerate(items):
            self._take(item, f"{place}[{at}]")

    def _take(self, item: InputItem, place: str) -> None:
        item.check(place)
        match item.kind:
            case "message":
                content = _content(item.content, f"{place}.content")
                self._add({"role": item.role, "content": content}, place)
            case "function_call":
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                if self.messages and self.messages[-1]["role"] == "assistant":
                    # What was said and called in one go is one message of a chat.
                    self.messages[-1].setdefault("tool_calls", []).append(call)
                else:
                    self._add({"role": "assistant", "content": None, "tool_calls": [call]}, place)
            case "function_call_output":
                content = _content(item.output, f"{place}.output")
                told = {"role": "tool", "tool_call_id": item.call_id, "content": content}
                self._add(told, f"{place}.output")
            # What a model reasoned on an earlier turn is not told to it again; references are looked up
            # before.

    def _add(self, message: dict[str, Any], place: str) -> None:
        self.messages.append(message)
        self.places.append(place)


def _content(content: str | list[InputPart] | None, place: str) -> Any:
    if content is None or isinstance(content, str):
        return content
    return [_part(part, f"{place}[{at}]") for at, part in enumerate(content)]


def _part(part: InputPart, place: str) -> dict[str, Any]:
    match part.type:
        case "input_text" | "output_text" | "text":
            if part.text is None:
                raise missing(f"{place}.text")
            return {"type": "text", "text": part.text}
        case "refusal":
            return {"type": "text", "text": part.refusal or ""}
        case "input_image":
            if part.image_url is None:
                raise missing(f"{place}.image_url")
            image = {"url": part.image_url}
            if part.detail is not None:
                image["detail"] = part.detail
            return {"type": "image_url", "image_url": image}
        case other:
            raise _unsupported(f"{place}.type", other)


def _unsupported(param: str, value: str) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid value: '{value[:100]}' is not supported here.", param=param, code="unsupported_value"
    )
