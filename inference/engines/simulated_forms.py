"""Texts of the simulated engine that must have a form: calls of tools, and structured output."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from inference.engines.base import GenerationRequest, Structured, Tools
from inference.engines.schemas import instance
from inference.engines.tools import CLOSE, OPEN


def formed_text(request: GenerationRequest, commanded: str | None) -> str | None:
    """The text that the request's form asks for; None: any. `commanded` names a tool that is to be
    called if there is one of that name. Raises BadRequest for a schema that no value satisfies."""
    if request.tools is not None and (called := _called(request.tools, request.messages, commanded)):
        return "\n".join(_call(function) for function in called)
    return None if request.structured is None else _structured(request.structured)


def _called(tools: Tools, messages: list[dict[str, Any]], commanded: str | None) -> list[dict[str, Any]]:
    functions = [tool["function"] for tool in tools.functions]
    if tools.named is not None:
        return [function for function in functions if function["name"] == tools.named][:1]
    last = messages[-1]
    said = str(last.get("content") or "") if last.get("role") == "user" else ""
    words = {commanded} if commanded is not None else set(re.findall(r"[\w.-]*\w", said))
    meant = [function for function in functions if function["name"] in words]
    if not meant and tools.required:
        meant = functions[:1]
    return meant if tools.parallel else meant[:1]


def _call(function: dict[str, Any]) -> str:
    arguments = {}
    if parameters := function.get("parameters"):
        arguments = instance(parameters, param="tools")
    written = msgspec.json.encode({"name": function["name"], "arguments": arguments}).decode()
    return f"{OPEN}\n{written}\n{CLOSE}"


def _structured(structured: Structured) -> str:
    if structured.choices:
        return structured.choices[0]
    return msgspec.json.encode(instance(structured.schema, param=structured.param)).decode()
