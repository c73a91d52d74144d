"""Errors in Anthropic's shape."""

from __future__ import annotations

import re
from typing import Any

from inference.http import Header, request_id_now
from openai_api.errors import answer_to

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""By status; any other is `api_error`."""

OURS = {
    "stop": "stop_sequences",
    "reasoning_effort": "thinking",
    "response_format": "output_config.format",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "tool_choice.function.name": "tool_choice.name",
}
"""Fields of a chat request by the name that Anthropic's clients gave them."""

_OF_TOOLS = ((".function.parameters", ".input_schema"), (".function", ""))
_PREFILLED = ("continue_final_message", "add_generation_prompt")
CANNOT_CONTINUE = "This model cannot continue an assistant's message: the last message must be the user's."


def told(message: str, kind: str) -> dict[str, Any]:
    """An error as a payload."""
    return {
        "type": "error",
        "error": {"type": kind, "message": message},
        "request_id": request_id_now.get() or None,
    }


def as_anthropic(error: Exception) -> tuple[int, dict[str, Any], list[Header]]:
    """Status, payload and headers that tell a client of `error`."""
    status, payload, headers = answer_to(error)
    said = payload["error"]
    return status, told(_in_their_words(said["message"], said["param"]), _type_of(status)), headers


def of_a_stream(said: dict[str, Any]) -> dict[str, Any]:
    """The payload for an error that came in mid-answer, in OpenAI's shape."""
    overloaded = said.get("code") == "server_is_overloaded"
    kind = "overloaded_error" if overloaded else "api_error"
    if said.get("type") == "invalid_request_error":
        kind = "invalid_request_error"
    return told(_in_their_words(str(said.get("message")), said.get("param")), kind)


def _type_of(status: int) -> str:
    return TYPES.get(status, "api_error")


def _in_their_words(message: str, param: str | None) -> str:
    if param is None:
        return message
    if param in _PREFILLED:
        return CANNOT_CONTINUE
    theirs = OURS.get(param, param)
    if re.match(r"tools\[\d+\]\.function", param):
        for chat, name in _OF_TOOLS:
            theirs = theirs.replace(chat, name)
    return message.replace(f"'{param}'", f"'{theirs}'")
