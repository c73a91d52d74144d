"""Chat completions' names of fields, as /v1/responses calls them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from inference.http import Header
from openai_api.errors import InvalidRequest, answer_to

_NAMES = (
    (re.compile(r"^messages\b.*"), "input"),
    (re.compile(r"^max_(completion_)?tokens$"), "max_output_tokens"),
    (re.compile(r"^reasoning_effort$"), "reasoning.effort"),
    (re.compile(r"^verbosity$"), "text.verbosity"),
    (re.compile(r"^logprobs$"), "include"),
    (re.compile(r"^response_format(\.json_schema)?"), "text.format"),
    (re.compile(r"^tool_choice\.allowed_tools"), "tool_choice"),
    (re.compile(r"^(tools\[\d+\]|tool_choice)\.function"), r"\1"),
)
_PARTS = (("'image_url'", "'input_image'"), ("'text'", "'input_text'"))
_MESSAGE = re.compile(r"^messages\[(\d+)\](.*)")


def renamed(param: str, places: Sequence[str] = ()) -> str:
    """A field of a chat request, as the field of /v1/responses that it was made of. `places` tells of each
    message where it came from."""
    of_message = _MESSAGE.match(param)
    if of_message is not None and int(of_message[1]) < len(places):
        place, rest = places[int(of_message[1])], of_message[2]
        if place.endswith(".output"):
            return place + rest.removeprefix(".content")
        return place + rest if place.endswith("]") else place
    for pattern, name in _NAMES:
        param, found = pattern.subn(name, param, count=1)
        if found:
            break
    return param


def reworded(error: InvalidRequest, places: Sequence[str]) -> InvalidRequest:
    """What is wrong with a chat request, said of the request that it was made of."""
    if error.param is None:
        return error
    param = renamed(error.param, places)
    message = str(error).replace(f"'{error.param}'", f"'{param}'")
    for chat, ours in _PARTS:
        message = message.replace(chat, ours)
    return InvalidRequest(message, param=param, code=error.code)


def in_these_words(payload: dict[str, Any]) -> dict[str, Any]:
    """An error's payload with its `param` renamed."""
    error = payload["error"]
    if error["param"] is None:
        return payload
    param = renamed(error["param"])
    message = error["message"].replace(f"'{error['param']}'", f"'{param}'")
    return {"error": error | {"message": message, "param": param}}


def errors(error: Exception) -> tuple[int, dict[str, Any], list[Header]]:
    """How an error is told before the first byte."""
    status, payload, headers = answer_to(error)
    return status, in_these_words(payload), headers
