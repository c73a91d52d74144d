"""Tools: what a chat request says of them, and the calls in an engine's text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from inference.engines.base import BadRequest, Tools
from inference.engines.tool_forms import HERMES, Form


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
class CallPiece:
    """More of a call. The first piece of each has its id and its name."""

    index: int
    """Which call of the answer."""
    arguments: str
    """The next part of its JSON."""
    id: str = ""
    name: str = ""


class _Written(msgspec.Struct):
    name: str
    arguments: dict[str, Any] | None = None
    parameters: dict[str, Any] | None = None


_decode_written = msgspec.json.Decoder(_Written).decode

_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL
)
_BARE_HEAD = re.compile(r"\s*([^\s\[{]+)(?:\[CALL_ID\]\w*)?\[ARGS\]\s*(?=\{)")
_LONGEST_HEAD = 4096
"""So much is looked at for a name: what has none by then is read when it is whole."""


class CallParser:
    """Feed it text as it comes; it gives back what is text for the reader, and the calls, piece by piece.

    What looks like a call and is none (no JSON, no such function) stays text. Once its name and the first
    brace of its arguments are read it is a call, and stays one if the text ends within it.
    """

    def __init__(self, tools: Tools, form: Form = HERMES) -> None:
        self._names = {tool["function"]["name"] for tool in tools.functions}
        self._most = None if tools.parallel else 1
        self._form = form
        self._held = ""
        self._read: Callable[[], bool] = self._text
        """What reads next: it takes from what is held, and says whether the next one can go on."""
        self._begun = False
        """Something was shown since the last call: spaces before that are not."""
        self._skipped = ""
        """What was taken for the beginning of calls: given back if it was none."""
        self._value = _Value()
        self._scanned = 0
        """How much of what is held the value has seen."""
        self._keep = False
        self._id = ""
        self._name = ""
        self._shown: list[str] = []
        self._pieces: list[CallPiece] = []
        self.calls = 0

    def feed(self, text: str) -> tuple[str, list[CallPiece]]:
        self._held += text
        while self._read():
            pass
        return self._taken()

    def flush(self) -> tuple[str, list[CallPiece]]:
        """What was held when the text ended. A last call may lack its closing mark: models forget it."""
        if self._read in (self._text, self._object):
            self._show(self._skipped + self._held, last=True)
        self._held = self._skipped = ""
        return self._taken()

    def _taken(self) -> tuple[str, list[CallPiece]]:
        text, pieces = "".join(self._shown), self._pieces
        self._shown, self._pieces = [], []
        return text, pieces

    def _show(self, text: str, *, last: bool = False) -> None:
        if text.isspace() and not self._begun and not (last and not self.calls):
            return
        self._begun = self._begun or bool(text)
        self._shown.append(text)

    # -- each of these reads one part

    def _text(self) -> bool:
        form = self._form
        if not form.opening:
            return self._whole_text()
        at = self._held.find(form.opening)
        if at < 0:
            cut = len(self._held) - _beginning(self._held, form.opening)
            if not self._begun and self._held[:cut].isspace():
                cut = 0
            self._show(self._held[:cut])
            self._held = self._held[cut:]
            return False
        self._show(self._held[:at])
        self._skipped, self._held = form.opening, self._held[at + len(form.opening) :]
        self._await_object()
        return True

    def _whole_text(self) -> bool:
        """Only what is a call from the beginning is one."""
        mark = self._form.mark
        text = self._held.lstrip()
        if self._begun or self.calls or not (text.startswith("{") or mark.startswith(text[: len(mark)])):
            self._show(self._held)
            self._held = ""
            return False
        if text.startswith(mark):
            self._skipped, self._held = mark, text[len(mark) :]
        elif not text.startswith("{"):  # nothing yet, or a part of the mark
            return False
        self._await_object()
        return True

    def _await_object(self) -> None:
        self._value, self._scanned = _Value(), 0
        self._read = self._object

    def _object(self) -> bool:
        """One call, from its beginning to its arguments; or a whole one that is written in another order."""
        spaces = _leading(self._held, " \t\r\n[,")
        held = self._held[spaces:] if self._form.quoted else self._held
        head = (_HEAD if self._form.quoted else _BARE_HEAD).match(held[:_LONGEST_HEAD])
        if head is not None:
            name = msgspec.json.decode(head[1]) if self._form.quoted else head[1]
            if name in self._names:
                self._held = held[head.end() :]
                self._begin(name)
                return True
        if not self._form.quoted:
            if head is None and len(held) < _LONGEST_HEAD and "{" not in held:
                return False
            return self._refuse()
        if not held:
            return False
        if not held.startswith("{"):
            return self._refuse()
        end = self._value.end(held[self._scanned :])
        if end is None:
            self._scanned = len(held)
            return False
        end += self._scanned
        call = self._decoded(held[:end])
        if call is None:
            return self._refuse()
        self._held = held[end:]
        self._begin(call.name)
        given = call.arguments if call.arguments is not None else call.parameters
        self._piece(msgspec.json.encode(given or {}).decode())
        self._read = self._after
        return True

    def _refuse(self) -> bool:
        """It is no call: all that was held is text after all."""
        self._show(self._skipped)
        self._skipped = ""
        if not self._form.opening:
            self._begun = True
        self._read = self._text
        return True

    def _begin(self, name: str) -> None:
        self._keep = self._most is None or self.calls < self._most
        self._skipped = ""
        if self._keep:
            self.calls += 1
            self._id, self._name = self._form.new_id(), name
        self._value = _Value()
        self._read = self._arguments

    def _piece(self, arguments: str) -> None:
        if self._keep and arguments:
            self._pieces.append(
                CallPiece(index=self.calls - 1, arguments=arguments, id=self._id, name=self._name)
            )
            self._id = self._name = ""

    def _arguments(self) -> bool:
        end = self._value.end(self._held)
        if end is None:
            self._piece(self._held)
            self._held = ""
            return False
        self._piece(self._held[:end])
        self._held = self._held[end:]
        self._value = _Value(depth=1)
        self._read = self._rest_of_object if self._form.quoted else self._after
        return True

    def _rest_of_object(self) -> bool:
        """What else the object has: nobody asked for it."""
        end = self._value.end(self._held)
        self._held = "" if end is None else self._held[end:]
        if end is not None:
            self._read = self._after
        return end is not None

    def _after(self) -> bool:
        """Between two calls, or behind the last one."""
        form = self._form
        held = self._held[_leading(self._held, " \t\r\n,;") :]
        if held.startswith("{") and form.quoted:
            self._held = held
            self._await_object()
            return True
        if form.closing and held.startswith(form.closing):
            self._held = held[len(form.closing) :]
        elif not held or form.closing.startswith(held):
            return False
        self._begun = False
        self._read = self._text
        return True

    def _decoded(self, written: str) -> _Written | None:
        try:
            found = _decode_written(written.encode())
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return None
        return found if found.name in self._names else None


class _Value:
    """Finds the end of a JSON object in text that comes in parts. `depth` objects are open before it."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._string = False
        self._escaped = False

    def end(self, text: str) -> int | None:
        """Where in this part the object ends; None: not yet."""
        for at, character in enumerate(text, start=1):
            if self._escaped:
                self._escaped = False
            elif self._string:
                self._escaped = character == "\\"
                self._string = character != '"'
            elif character == '"':
                self._string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at
        return None


def _leading(text: str, characters: str) -> int:
    return len(text) - len(text.lstrip(characters))


def _beginning(text: str, mark: str) -> int:
    """Length of the longest end of the text that begins the mark."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
