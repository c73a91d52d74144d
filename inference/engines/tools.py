"""Tools: what a chat request says of them, and the calls in an engine's text.

A call is written as the Hermes models write it, `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from inference.engines.base import BadRequest, Tools

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Function(msgspec.Struct, omit_defaults=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    type: Literal["function"]
    function: Function


class _Allowed(msgspec.Struct):
    mode: Literal["auto", "required"]
    tools: list[dict[str, Any]]


def tools_of(
    tools: list[Tool] | None, choice: str | dict[str, Any] | None, parallel: bool | None
) -> Tools | None:
    """What the three fields of a request ask for; None: no call is wanted. Raises BadRequest."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise _wrong_choice("'tool_choice' is only allowed when 'tools' are specified.")
        return None
    if choice == "none":
        return None
    named, required = None, choice == "required"
    if isinstance(choice, dict):
        if choice.get("type") == "allowed_tools":
            tools, required = _allowed(tools, choice)
        else:
            named = _named(tools, choice)
    elif choice not in (None, "auto", "required"):
        raise _wrong_choice("'tool_choice' must be 'none', 'auto', 'required' or a function.")
    return Tools(
        functions=[msgspec.to_builtins(tool) for tool in tools],
        required=required,
        named=named,
        parallel=parallel is not False,
    )


def _named(tools: list[Tool], choice: dict[str, Any]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise _wrong_choice(
            '\'tool_choice\' names a function as {"type": "function", "function": {"name": …}}.'
        )
    if all(tool.function.name != name for tool in tools):
        raise _wrong_choice("The function that 'tool_choice' names is not among 'tools'.")
    return name


def _allowed(tools: list[Tool], choice: dict[str, Any]) -> tuple[list[Tool], bool]:
    try:
        allowed = msgspec.convert(choice.get("allowed_tools"), _Allowed)
    except msgspec.ValidationError:
        raise _wrong_choice("'tool_choice.allowed_tools' must have a 'mode' and 'tools'.") from None
    names = {_named(tools, one) for one in allowed.tools}
    return [tool for tool in tools if tool.function.name in names], allowed.mode == "required"


def _wrong_choice(message: str) -> BadRequest:
    return BadRequest(message, param="tool_choice", code="invalid_value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    id: str
    name: str
    arguments: str
    """JSON."""


class _Written(msgspec.Struct):
    name: str
    arguments: dict[str, Any] = {}


_decode_written = msgspec.json.Decoder(_Written).decode


class CallParser:
    """Feed it text as it comes; it gives back what is text for the reader, and the calls.

    What looks like a call and is none (no JSON, no such function) stays text.
    """

    def __init__(self, tools: Tools) -> None:
        self._names = {tool["function"]["name"] for tool in tools.functions}
        self._most = None if tools.parallel else 1
        self._held = ""
        self._inside = False
        self.calls = 0

    def feed(self, text: str) -> tuple[str, list[Call]]:
        # What was searched before is not searched again: arguments may be long.
        start = max(0, len(self._held) - len(CLOSE))
        self._held += text
        shown: list[str] = []
        calls: list[Call] = []
        while True:
            sought = CLOSE if self._inside else OPEN
            at = self._held.find(sought, start)
            if at < 0:
                break
            before, self._held, start = self._held[:at], self._held[at + len(sought) :], 0
            if not self._inside:
                shown.append(before)
            elif (call := self._read(before)) is None:
                shown.append(OPEN + before + CLOSE)
            else:
                self._keep(call, calls)
            self._inside = not self._inside
        if not self._inside:
            cut = len(self._held) - self._beginning()
            shown.append(self._held[:cut])
            self._held = self._held[cut:]
        return self._without_gaps(shown), calls

    def flush(self) -> tuple[str, list[Call]]:
        """What was held when the text ended. A last call may lack its closing mark: models forget it."""
        held, self._held = self._held, ""
        if not self._inside:
            return held, []
        calls: list[Call] = []
        call = self._read(held)
        if call is None:
            return OPEN + held, []
        self._keep(call, calls)
        return "", calls

    def _read(self, written: str) -> Call | None:
        try:
            found = _decode_written(written.encode())
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return None
        if found.name not in self._names:
            return None
        return Call(
            id=f"call_{uuid.uuid4().hex[:24]}",
            name=found.name,
            arguments=msgspec.json.encode(found.arguments).decode(),
        )

    def _keep(self, call: Call, calls: list[Call]) -> None:
        if self._most is None or self.calls < self._most:
            self.calls += 1
            calls.append(call)

    def _without_gaps(self, shown: list[str]) -> str:
        text = "".join(shown)
        return "" if self.calls and text.isspace() else text

    def _beginning(self) -> int:
        """Length of the longest end of the held text that begins a mark."""
        for length in range(min(len(OPEN) - 1, len(self._held)), 0, -1):
            if self._held.endswith(OPEN[:length]):
                return length
        return 0
