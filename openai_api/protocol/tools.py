"""Tools: what a request may define, and which of them it may choose."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from openai_api.errors import InvalidRequest
from openai_api.parsing import convert, invalid, missing
from openai_api.protocol.structured import check_schema

# \Z, not $: that would let a line's end follow.
ToolName = Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]


class _Function(msgspec.Struct):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(msgspec.Struct):
    type: Literal["function", "custom"]
    function: _Function | None = None


class _Named(msgspec.Struct):
    name: str


class _ChosenFunction(msgspec.Struct, tag_field="type", tag="function"):
    function: _Named


class _ChosenCustom(msgspec.Struct, tag_field="type", tag="custom"):
    custom: _Named


class _AllowedTools(msgspec.Struct):
    mode: Literal["auto", "required"]
    tools: Annotated[list[_ChosenFunction | _ChosenCustom], msgspec.Meta(min_length=1)]


class _Allowed(msgspec.Struct, tag_field="type", tag="allowed_tools"):
    allowed_tools: _AllowedTools


Choice = _ChosenFunction | _ChosenCustom | _Allowed
_WORDS = ("none", "auto", "required")


def check_tools(tools: list[dict[str, Any]]) -> None:
    """Raises InvalidRequest naming what cannot be used."""
    names: set[str] = set()
    for at, given in enumerate(tools):
        path = f"tools[{at}]"
        tool = convert(given, ToolDefinition, path)
        if tool.type == "custom":
            raise InvalidRequest(
                "Unsupported value: tools of type 'custom' are not supported. Use 'function'.",
                param=f"{path}.type",
                code="unsupported_value",
            )
        if tool.function is None:
            raise missing(f"{path}.function")
        if tool.function.name in names:
            raise invalid(f"{path}.function.name", f"'{tool.function.name}' is defined twice.")
        names.add(tool.function.name)
        if tool.function.parameters is not None:
            check_schema(tool.function.parameters, f"{path}.function.parameters")


def check_choice(choice: str | dict[str, Any], tools: list[dict[str, Any]] | None) -> None:
    """`tools` were checked. Raises InvalidRequest naming what cannot be used."""
    if not tools:
        if choice in ("none", "auto"):
            return
        raise InvalidRequest(
            "'tool_choice' is only allowed when 'tools' are specified.",
            param="tool_choice",
            code="invalid_value",
        )
    if isinstance(choice, str):
        if choice not in _WORDS:
            raise invalid("tool_choice", f"expected one of {', '.join(_WORDS)}, or an object.")
        return
    # The annotation is for mypy: a union is no type to it.
    kind: Any = Choice
    chosen = convert(choice, kind, "tool_choice")
    wanted = chosen.allowed_tools.tools if isinstance(chosen, _Allowed) else [chosen]
    known = {tool["function"]["name"] for tool in tools}
    for one in wanted:
        name = one.function.name if isinstance(one, _ChosenFunction) else one.custom.name
        if isinstance(one, _ChosenCustom) or name not in known:
            raise invalid("tool_choice", f"the tool '{name[:64]}' is not among 'tools'.")


def names_one(choice: str | dict[str, Any] | None) -> bool:
    """It demands one certain tool. `choice` was checked."""
    return isinstance(choice, dict) and choice["type"] != "allowed_tools"


def narrowed(
    tools: list[dict[str, Any]], choice: str | dict[str, Any] | None
) -> tuple[list[dict[str, Any]], str | dict[str, Any] | None]:
    """Tools and choice as engines know them: of those that are allowed, any. Both were checked."""
    if not isinstance(choice, dict) or choice["type"] != "allowed_tools":
        return tools, choice
    allowed = choice["allowed_tools"]
    names = {one["function"]["name"] for one in allowed["tools"]}
    return [tool for tool in tools if tool["function"]["name"] in names], allowed["mode"]
