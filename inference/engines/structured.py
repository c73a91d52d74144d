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
    """One of them; `regex` and the others are no fields of engines behind this server."""

    json: str | dict[str, Any] | None = None
    choice: Annotated[list[str], msgspec.Meta(min_length=1, max_length=1024)] | None = None
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    structural_tag: str | dict[str, Any] | None = None


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
    given = [name for name in asked.__struct_fields__ if getattr(asked, name) not in (None, False)]
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
    if asked.json_object:
        return Structured(param=param, schema=_OBJECT)
    if asked.json is None:
        raise BadRequest(f"This model does not support '{param}'.", param=param, code="unsupported_parameter")
    return Structured(param=param, schema=_schema(asked.json, param))


def _schema(given: str | dict[str, Any], param: str) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    try:
        return msgspec.json.decode(given, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise BadRequest(f"'{param}' is no JSON schema.", param=param, code="invalid_value") from None
