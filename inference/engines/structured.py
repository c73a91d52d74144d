"""What a request says of the form of its answer: `response_format` and `structured_outputs`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from inference.engines.base import BadRequest, Structured


class JsonSchema(msgspec.Struct):
    name: str | None = None
    schema: dict[str, Any] | bool | None = None


class ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct):
    """One of the first six."""

    json: str | dict[str, Any] | None = None
    choice: Annotated[list[str], msgspec.Meta(min_length=1, max_length=1024)] | None = None
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


KINDS = ("json", "choice", "json_object", "regex", "grammar", "structural_tag")
_OF_SOME = ("regex", "grammar", "structural_tag", "disable_additional_properties")

_OBJECT: dict[str, Any] = {"type": "object"}


def of_format(asked: ResponseFormat) -> Structured | None:
    """None: plain text. Raises BadRequest."""
    if asked.type == "text":
        return None
    if asked.type == "json_object":
        return Structured(param="response_format", schema=_OBJECT)
    if asked.json_schema is None:
        raise BadRequest(
            "Missing required parameter: 'response_format.json_schema'.",
            param="response_format.json_schema",
            code="missing_required_parameter",
        )
    schema = asked.json_schema.schema
    return Structured(
        param="response_format.json_schema.schema", schema=_OBJECT if schema is None else schema
    )


def of_outputs(asked: StructuredOutputs) -> Structured | None:
    """None: nothing is asked for. Raises BadRequest."""
    given = [name for name in KINDS if getattr(asked, name) not in (None, False)]
    if not given:
        return None
    if len(given) > 1:
        raise BadRequest(
            f"Only one kind of 'structured_outputs' can be used, not {' and '.join(given)}.",
            param="structured_outputs",
            code="invalid_value",
        )
    [kind] = given
    param = f"structured_outputs.{kind}"
    if asked.choice is not None:
        return Structured(param=param, choices=tuple(asked.choice))
    if asked.regex is not None:
        return Structured(param=param, regex=asked.regex)
    if asked.grammar is not None:
        return Structured(param=param, grammar=asked.grammar)
    schema = _OBJECT if asked.json is None else _schema(asked.json, param)
    return Structured(param=param, schema=schema, compact=bool(asked.disable_any_whitespace))


def of_some(asked: StructuredOutputs | None) -> dict[str, bool]:
    """What of it only some engines have, under the names of capabilities, and whether it is asked for."""
    return {
        f"structured_outputs.{name}": getattr(asked, name, None) not in (None, False) for name in _OF_SOME
    }


def _schema(given: str | dict[str, Any], param: str) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    try:
        return msgspec.json.decode(given, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise BadRequest(f"'{param}' is no JSON schema.", param=param, code="invalid_value") from None
