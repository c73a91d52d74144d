"""`/docs/`: the OpenAPI document as a page to read. Nothing in it needs a script or another host."""

from __future__ import annotations

import json
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.views.decorators.http import require_safe

from openai_api.document import document

METHODS = ("get", "post")


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
    refusals = [
        (status, _marked(said["description"])) for status, said in api["components"]["responses"].items()
    ]
    about = _marked(api["info"]["description"])
    facts = {"info": api["info"], "about": about, "operations": operations, "refusals": refusals}
    return render(request, "openai_api/docs.html", facts)


def _operation(api: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> dict[str, Any]:
    schemas = api["components"]["schemas"]
    fields: list[dict[str, Any]] = [
        {
            "name": one["name"],
            "type": _type(one["schema"]),
            "required": one["required"],
            "about": one.get("description", ""),
        }
        for one in operation.get("parameters", ())
    ]
    example = None
    if body := operation.get("requestBody"):
        content = body["content"]["application/json"]
        schema = schemas[content["schema"]["$ref"].rpartition("/")[2]]
        example = _pretty(content["example"])
        fields += [
            {"name": name, "type": _type(kind), "required": name in schema.get("required", ()), "about": ""}
            for name, kind in schema["properties"].items()
        ]
        fields.sort(key=lambda field: not field["required"])
    answer = operation["responses"]["200"]["content"]["application/json"]
    return {
        "id": operation["operationId"],
        "method": method.upper(),
        "path": path,
        "summary": operation["summary"],
        "description": _marked(operation.get("description", "")),
        "fields": fields,
        "example": example,
        "answer": _pretty(answer["example"]) if "example" in answer else None,
    }


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "anyOf" in schema:
        kinds = [_type(one) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return " or ".join(str(one) for one in schema["enum"] if one is not None)
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    kind = str(schema.get("type", "any"))
    if kind == "array":
        inner = _type(schema.get("items") or {})
        most = f", at most {schema['maxItems']}" if "maxItems" in schema else ""
        return f"list of ({inner}){most}" if " or " in inner else f"list of {inner}{most}"
    if kind in ("integer", "number"):
        lower, upper = schema.get("minimum"), schema.get("maximum")
        if lower is not None and upper is not None and upper < 2**63 - 1:
            return f"{kind}, {lower} to {upper}"
        return f"{kind}, at least {lower}" if lower is not None and lower > -(2**63) else kind
    return kind


def _marked(text: str) -> SafeString:
    """Text with what stands between backticks as code."""
    pieces = text.split("`")
    return format_html_join(
        "", "{}", ((format_html("<code>{}</code>", one) if at % 2 else one,) for at, one in enumerate(pieces))
    )


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
