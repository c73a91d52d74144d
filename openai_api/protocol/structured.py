"""Answers in a given form: JSON of a schema, a regex, one of some choices, a grammar.

Engines make a machine of each, which can be far larger than what it was made from. The bounds here keep
what can be seen without making it; the time that it takes is the engine's to bound.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec

from openai_api import limits
from openai_api.parsing import convert, invalid, missing


class _JsonSchema(msgspec.Struct):
    # \Z, not $: that would let a line's end follow.
    name: Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: Annotated[list[str], msgspec.Meta(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
KINDS_OF_SOME = frozenset({"regex", "grammar", "structural_tag"})
"""Announced by the engines that have them, as `structured_outputs.KIND`; the others come with any."""
GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""vLLM's older names, and which kind of `structured_outputs` each of them is."""


def check_format(given: dict[str, Any]) -> None:
    """`response_format`. Raises InvalidRequest naming what cannot be used."""
    asked = convert(given, ResponseFormat, "response_format")
    if asked.type != "json_schema":
        return
    if asked.json_schema is None:
        raise missing("response_format.json_schema")
    if asked.json_schema.schema is not None:
        check_schema(asked.json_schema.schema, "response_format.json_schema.schema")


def check_outputs(given: dict[str, Any], path: str = "structured_outputs") -> None:
    """`structured_outputs`, or a part of it that came under another name. Raises InvalidRequest naming
    what cannot be used."""
    asked = convert(given, StructuredOutputs, path)
    kinds = [kind for kind in KINDS if getattr(asked, kind) not in (None, False)]
    if len(kinds) != 1:
        raise invalid("structured_outputs", f"give exactly one of {', '.join(KINDS)}.")
    [kind] = kinds
    check_kind(kind, getattr(asked, kind), f"{path}.{kind}")


def check_kind(kind: str, value: Any, path: str) -> None:
    """The value of one kind, found at `path`. Raises InvalidRequest."""
    if kind == "json":
        check_schema(_schema_in(value, path) if isinstance(value, str) else value, path)
    elif kind == "regex":
        check_regex(value, path)
    elif kind == "choice":
        if not value:
            raise invalid(path, "empty array. Expected at least one choice.", "empty_array")
        _check_size(sum(len(one.encode()) for one in value), path)
    elif kind in ("grammar", "structural_tag"):
        _check_size(len(value.encode()), path)


def _schema_in(text: str, path: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        raise invalid(path, "the text is not a JSON schema.") from None


def check_schema(schema: dict[str, Any], path: str) -> None:
    """Raises InvalidRequest for a schema that is too large, too deep, or refers to another address."""
    _check_size(len(msgspec.json.encode(schema)), path)
    _check_level(schema, path, 1)


def _check_size(size: int, path: str) -> None:
    if size > limits.SCHEMA_BYTES:
        raise invalid(
            path, f"too long. Expected at most {limits.SCHEMA_BYTES} bytes.", "string_above_max_length"
        )


def _check_level(value: Any, path: str, level: int) -> None:
    if not isinstance(value, dict | list):
        return
    if level > limits.SCHEMA_DEPTH:
        raise invalid(path, f"the schema is nested deeper than {limits.SCHEMA_DEPTH} levels.")
    if isinstance(value, list):
        for item in value:
            _check_level(item, path, level + 1)
        return
    for name, item in value.items():
        if isinstance(item, str):
            if name in _REFERENCES and not item.startswith("#"):
                raise invalid(path, f"'{name}' may refer to the schema itself only, as '#/…'.")
            if name == "pattern":
                check_regex(item, path)
        elif name in _COUNTS and isinstance(item, int | float) and not 0 <= item <= limits.REGEX_STEPS:
            raise invalid(path, f"'{name}' lies between 0 and {limits.REGEX_STEPS}.")
        else:
            _check_level(item, path, level + 1)


_REFERENCES = frozenset({"$ref", "$dynamicRef", "$recursiveRef"})
_COUNTS = frozenset({"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"})


def check_regex(regex: str, path: str) -> None:
    """Raises InvalidRequest for one that is too long, or would be with its repetitions written out."""
    if len(regex.encode()) > limits.REGEX_BYTES:
        raise invalid(
            path,
            f"the regex is too long. Expected at most {limits.REGEX_BYTES} bytes.",
            "string_above_max_length",
        )
    if _written_out(regex) > limits.REGEX_STEPS:
        raise invalid(path, "the regex repeats too much.")


_PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)


def _written_out(regex: str) -> int:
    """About how many characters the regex has once `x{3}` is written as `xxx`."""
    groups = [0]
    last = 0
    for piece in _PIECE.finditer(regex):
        text = piece[0]
        if text == "(":
            groups.append(0)
            last = 0
        elif text == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif piece[1] is not None:
            # Ten digits are beyond any bound; more would take time to read.
            times = max(int(count[:10]) for count in (piece[1], piece[2] or "0"))
            groups[-1] += last * (max(times, 1) - 1)
            last *= max(times, 1)
        else:
            last = 1
            groups[-1] += 1
    return sum(groups)
