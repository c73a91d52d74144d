"""The OpenAPI document: made from the structs that parse requests, so that what is served and what is
described cannot differ by name, type or bound. Its words and examples are `openai_api.described`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import msgspec
from django.conf import settings

from inference.errors import NoCapacity
from inference.http import BodyTooLarge
from openai_api import answers, limits
from openai_api.described import (
    ENDPOINT,
    FIELDS,
    MODEL,
    OF_SCHEMA,
    OTHERS,
    REFUSALS,
    TAGS,
    Operation,
)
from openai_api.endpoints import ENDPOINTS
from openai_api.errors import (
    ROWS,
    ForbiddenModel,
    RateLimited,
    TimeIsUp,
    UnknownModel,
    WrongKey,
    answer_to,
)
from openai_api.messages.errors import as_anthropic
from openai_api.parsing import missing
from openai_api.protocol.structured import ResponseFormat, StructuredOutputs
from openai_api.protocol.tools import Choice, ToolDefinition

VERSION = "1.0"

EXACT: dict[tuple[str, str], Any] = {
    ("ChatCompletionRequest", "tools"): list[ToolDefinition],
    ("TokenizeRequest", "tools"): list[ToolDefinition],
    ("ChatCompletionRequest", "tool_choice"): Literal["none", "auto", "required"] | Choice,
    ("ChatCompletionRequest", "response_format"): ResponseFormat,
    ("ChatCompletionRequest", "structured_outputs"): StructuredOutputs,
    ("CompletionRequest", "structured_outputs"): StructuredOutputs,
    ("ChatMessage", "tool_calls"): list[answers.ToolCall],
}
"""What is read as a mere object first and checked as these after, so that a plain request pays nothing."""

_STATUSES = {row.status for row in ROWS.values()}
"""What is answered at all: a status that no error has is not described."""

_TOLD: dict[int, Exception] = {
    400: missing("model"),
    401: WrongKey("sk-abcdefghijklmnop"),
    403: ForbiddenModel(MODEL, "research"),
    404: UnknownModel(MODEL),
    413: BodyTooLarge(limits.BODY_BYTES),
    429: RateLimited(
        "Rate limit reached for `smollm2-135m-instruct` in project `research` on requests per minute: "
        "Limit 60, Used 60, Requested 1. Please try again in 1s.",
        [],
    ),
    500: RuntimeError(),
    503: NoCapacity(1.0),
    504: TimeIsUp(60),
}
"""An error for each status: its example is what the API says of it."""

_SHAPES: dict[type[msgspec.Struct], tuple[str, Callable[[Exception], tuple[int, Any, Any]]]] = {
    answers.Error: ("", answer_to),
    answers.MessageError: ("-anthropic", as_anthropic),
}
"""The shapes of errors: how their responses' names end, and what makes them."""

_PATH: dict[str, dict[str, Any]] = {
    "model": {"type": "string", "minLength": 1, "maxLength": limits.MODEL_NAME_LENGTH},
    "key_id": {"type": "string", "pattern": "^[0-9A-Za-z]{12}$"},
    "response_id": {"type": "string", "pattern": "^resp_[A-Za-z0-9_]{1,59}$"},
}
_SCHEMA = "#/components/schemas/{name}"
DONE = "data: [DONE]\n\n"
_KEYS = ("key", "x_api_key", "api_key")


@cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document. Callers do not change it."""
    operations = {
        ("post", one.path): replace(ENDPOINT[one.path], request=one.request) for one in ENDPOINTS
    } | OTHERS
    schemas = _schemas(operations.values())
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), told in operations.items():
        paths.setdefault(path, {})[method] = _operation(method, path, told, schemas)
    for name, schema in schemas.items():
        _describe(name, schema)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Roundhouse",
            "version": VERSION,
            "description": "Language models behind OpenAI's API. Every error, on every path, has the one "
            "shape `Error` (under `/v1/messages`: `MessageError`); every answer carries `x-request-id`. "
            "`null` for a field means that it is not given.",
        },
        "servers": [{"url": "/"}],
        "security": [{one: []} for one in _KEYS],
        "tags": [{"name": name, "description": about} for name, about in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A key: `Authorization: Bearer …`",
                },
                "x_api_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "api_key": {"type": "apiKey", "in": "header", "name": "api-key"},
                "metrics_token": {"type": "http", "scheme": "bearer"},
                "session": {"type": "apiKey", "in": "cookie", "name": settings.SESSION_COOKIE_NAME},
                "csrf": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "x-csrftoken",
                    "description": f"What the cookie `{settings.CSRF_COOKIE_NAME}` holds.",
                },
            },
            "headers": {
                "request-id": {
                    "description": "Names the request, here and in the server's log.",
                    "schema": {"type": "string"},
                },
                "retry-after": {
                    "description": "Seconds after which another try can help.",
                    "schema": {"type": "integer", "minimum": 1},
                },
            },
            "responses": {
                f"{status}{suffix}": _refusal(status, shape)
                for shape, (suffix, _) in _SHAPES.items()
                for status in REFUSALS
                if status in _STATUSES
            },
        },
    }


@cache
def document_json() -> bytes:
    return msgspec.json.encode(document())


# -- operations


def _operation(method: str, path: str, told: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {"operationId": told.id, "tags": [told.tag], "summary": told.summary}
    if told.about:
        operation["description"] = told.about
    if told.deprecated:
        operation["deprecated"] = True
    if told.public:
        operation["security"] = [{}]
        if path == "/metrics":
            operation["security"].append({"metrics_token": []})
    if told.session:
        operation["security"] = [{"session": []} if method == "get" else {"session": [], "csrf": []}]
    if parameters := _parameters(path, told):
        operation["parameters"] = parameters
    if told.request is not None:
        operation["requestBody"] = {
            # A body that demands nothing may be left out.
            "required": bool(told.required or schemas[told.request.__name__].get("required")),
            "content": {
                "application/json": {"schema": _body(told, schemas), "example": told.example},
            },
        }
    responses: dict[str, Any] = {}
    if told.answer is not None or told.text or told.bare:
        responses[str(told.status)] = _answer(told)
    for status in told.refusals:
        if told.bare or told.error not in _SHAPES:
            responses[str(status)] = {"description": "It cannot, at the moment."}
            if not told.bare:
                content = {"application/json": {"schema": _reference(told.error)}}
                responses[str(status)]["content"] = content
        elif status in _STATUSES:
            name = f"{status}{_SHAPES[told.error][0]}"
            responses[str(status)] = {"$ref": f"#/components/responses/{name}"}
    operation["responses"] = responses
    return operation


def _parameters(path: str, told: Operation) -> list[dict[str, Any]]:
    named = [
        {"name": one, "in": "path", "required": True, "schema": _PATH[one]}
        for one in re.findall(r"{(\w+)}", path)
    ]
    asked = [
        {
            "name": one.name,
            "in": "query",
            "required": one.required,
            "schema": one.schema,
            "description": one.about,
        }
        for one in told.query
    ]
    return named + asked


def _body(told: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    """The schema of the request: the struct's, and what the operation demands of it beside."""
    if told.request is None:
        raise AssertionError("an operation without a body")
    schema: dict[str, Any] = schemas[told.request.__name__]
    if told.required and set(told.required) < set(schema.get("required", ())):
        # Another path names in its URL what this one's body need not.
        optional = {
            name: {"anyOf": [schema["properties"][name], {"type": "null"}]}
            for name in set(schema["required"]) - set(told.required)
        }
        return schema | {"required": list(told.required), "properties": schema["properties"] | optional}
    for field in told.required:
        _demand(schema["properties"], field)
    if told.required:
        schema["required"] = list(told.required)
    return _reference(told.request)


def _demand(properties: dict[str, Any], field: str) -> None:
    """`null` is not a value of a required field."""
    given = properties[field]
    given.pop("default", None)
    kinds = [kind for kind in given.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1:
        del given["anyOf"]
        given.update(kinds[0])
    elif kinds:
        given["anyOf"] = kinds


def _answer(told: Operation) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "description": "The answer.",
        "headers": {"x-request-id": {"$ref": "#/components/headers/request-id"}},
    }
    content: dict[str, Any] = {}
    if told.answer is not None:
        content["application/json"] = {"schema": _reference(told.answer), "example": told.answered}
    elif told.text:
        content[told.text] = {"schema": {"type": "object" if "json" in told.text else "string"}}
    if told.events is not None:
        done = told.stream.endswith(DONE)
        content["text/event-stream"] = {"schema": _event(told.events, done=done), "x-example": told.stream}
    if content:
        answer["content"] = content
    return answer


def _event(kind: type[msgspec.Struct], *, done: bool) -> dict[str, Any]:
    """Of a stream, 3.1 describes each event. `done`: the last is no JSON."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": _reference(kind),
    }
    return {
        "type": "object",
        "description": f"A server-sent event; its data is a `{kind.__name__}`.",
        "properties": {
            "event": {"type": "string"},
            "data": {"anyOf": [data, {"const": "[DONE]"}]} if done else data,
        },
        "required": ["data"],
    }


def _refusal(status: int, shape: type[msgspec.Struct]) -> dict[str, Any]:
    headers = {"x-request-id": {"$ref": "#/components/headers/request-id"}}
    if status in (429, 503):
        headers["retry-after"] = {"$ref": "#/components/headers/retry-after"}
    content: dict[str, Any] = {"schema": _reference(shape)}
    if status in _TOLD:
        _, make = _SHAPES[shape]
        content["example"] = make(_TOLD[status])[1]
    return {
        "description": REFUSALS[status],
        "headers": headers,
        "content": {"application/json": content},
    }


def _reference(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _SCHEMA.format(name=kind.__name__)}


# -- schemas


def _schemas(operations: Iterable[Operation]) -> dict[str, Any]:
    """Of every struct that the operations name, by its name."""
    kinds: list[Any] = []
    for told in operations:
        kinds += [kind for kind in (told.request, told.answer, told.events, told.error) if kind is not None]
    exact, components = msgspec.json.schema_components(
        [*dict.fromkeys(kinds), *_SHAPES, *EXACT.values()], ref_template=_SCHEMA
    )
    of_fields = exact[-len(EXACT) :]
    for ((name, field), _), schema in zip(EXACT.items(), of_fields, strict=True):
        given = components[name]["properties"][field]
        bounds: dict[str, Any] = next((one for one in given["anyOf"] if one.get("type") == "array"), {})
        most = {"maxItems": bounds["maxItems"]} if "maxItems" in bounds else {}
        given["anyOf"] = [*schema.get("anyOf", [schema | most]), {"type": "null"}]
    # What is private to a module has a name in the document all the same.
    text = re.sub(r"(#/components/schemas/)_", r"\1", msgspec.json.encode(components).decode())
    # Python's way to say "the end, and no line's end before it" is ECMA's `$`.
    text = text.replace(r"\\Z", "$")
    return {name.removeprefix("_"): schema for name, schema in msgspec.json.decode(text).items()}


def _describe(name: str, schema: dict[str, Any]) -> None:
    """Say what the fields of a request mean."""
    schema.pop("title", None)
    for field, given in schema.get("properties", {}).items():
        if given.get("default", "") is None:
            # Nothing to know: that it may be left out is told by what is required.
            del given["default"]
        if name.endswith("Request") and (words := OF_SCHEMA.get((name, field)) or FIELDS.get(field)):
            given["description"] = words
