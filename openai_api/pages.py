"""`/docs/`: the OpenAPI document as a page to read. Nothing in it needs a script or another host."""

from __future__ import annotations

import json
import re
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.views.decorators.http import require_safe

from openai_api.document import document

METHODS = ("get", "post", "patch", "delete")


@require_safe
def docs(request: HttpRequest) -> HttpResponse:
    """Needs no key: it tells what the public API looks like, not what is in it."""
    api = document()
    operations = [
        _operation(api, method, path, item[method])
        for path, item in api["paths"].items()
        for method in METHODS
        if method in item
    ]
    groups = [
        {
            "name": tag["name"],
            "about": tag["description"],
            "operations": [one for one in operations if one["tag"] == tag["name"]],
        }
        for tag in api["tags"]
    ]
    shown = {}
    for name, said in api["components"]["responses"].items():
        example = said["content"]["application/json"].get("example")
        shown[name] = {"about": _marked(said["description"]), "example": example and _pretty(example)}
    refusals = [(status, told) for status, told in shown.items() if status.isdigit()]
    types = [_kind(name, schema) for name, schema in sorted(api["components"]["schemas"].items())]
    facts = {
        "info": api["info"],
        "about": _marked(api["info"]["description"]),
        "groups": groups,
        "refusals": refusals,
        "types": types,
    }
    return render(request, "openai_api/docs.html", facts)


def _operation(api: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> dict[str, Any]:
    schemas = api["components"]["schemas"]
    fields = [
        _field(one["name"], one["schema"] | one, one["required"]) for one in operation.get("parameters", ())
    ]
    example = None
    if body := operation.get("requestBody"):
        content = body["content"]["application/json"]
        schema = content["schema"]
        if "$ref" in schema:
            schema = schemas[schema["$ref"].rpartition("/")[2]]
        example = _pretty(content["example"])
        fields += _fields(schema)
        fields.sort(key=lambda field: not field["required"])
    responses = operation["responses"]
    done = next((status for status in responses if status.startswith("2")), "")
    answered = responses.get(done, {}).get("content", {})
    answer = answered.get("application/json", {})
    return {
        "id": operation["operationId"],
        "tag": operation["tags"][0],
        "method": method.upper(),
        "path": path,
        "summary": operation["summary"],
        "description": _marked(operation.get("description", "")),
        "deprecated": operation.get("deprecated", False),
        "public": {} in operation.get("security", ()),
        "session": any("session" in one for one in operation.get("security", ())),
        "fields": fields,
        "example": example,
        "answer": _pretty(answer["example"]) if "example" in answer else None,
        "answer_type": _linked(_type(answer["schema"])) if "$ref" in answer.get("schema", {}) else None,
        "stream": answered.get("text/event-stream", {}).get("x-example", "").strip(),
        "refusals": [status for status in responses if status != done],
    }


def _fields(schema: dict[str, Any]) -> list[dict[str, Any]]:
    required = schema.get("required", ())
    return [_field(name, kind, name in required) for name, kind in schema.get("properties", {}).items()]


def _field(name: str, kind: dict[str, Any], required: bool) -> dict[str, Any]:
    return {
        "name": name,
        "type": _linked(_type(kind)),
        "required": required,
        "about": _marked(kind.get("description", "")),
    }


def _kind(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that others name."""
    about = " ".join(schema.get("description", "").split())
    return {"name": name, "about": _marked(about), "fields": _fields(schema)}


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "anyOf" in schema:
        kinds = [_type(one) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return " or ".join(f"`{one}`" for one in schema["enum"] if one is not None)
    if "const" in schema:
        return f"`{schema['const']}`"
    if "$ref" in schema:
        return f"[{schema['$ref'].rpartition('/')[2]}]"
    kind = str(schema.get("type", "any"))
    if kind == "array":
        inner = _type(schema.get("items") or {})
        most = f", at most {schema['maxItems']}" if "maxItems" in schema else ""
        if inner == "any":
            return f"list{most}"
        return f"list of ({inner}){most}" if " or " in inner else f"list of {inner}{most}"
    if kind in ("integer", "number"):
        lower, upper = schema.get("minimum"), schema.get("maximum")
        if lower is not None and upper is not None and upper < 2**63 - 1:
            return f"{kind}, {lower} to {upper}"
        return f"{kind}, at least {lower}" if lower is not None and lower > -(2**63) else kind
    return kind


def _linked(kind: str) -> SafeString:
    """A type with the names of others as links."""
    pieces = re.split(r"\[(\w+)\]", kind)
    return format_html_join(
        "",
        "{}",
        (
            (format_html('<a href="#type-{}">{}</a>', one, one) if at % 2 else _marked(one),)
            for at, one in enumerate(pieces)
        ),
    )


def _marked(text: str) -> SafeString:
    """Text with what stands between backticks as code."""
    pieces = text.split("`")
    return format_html_join(
        "", "{}", ((format_html("<code>{}</code>", one) if at % 2 else one,) for at, one in enumerate(pieces))
    )


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
