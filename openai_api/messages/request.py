"""Anthropic's request objects, and the chat request that each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec

from openai_api import limits
from openai_api.errors import InvalidRequest
from openai_api.parsing import missing
from openai_api.protocol.call import Call, Size, StopList, Tokens
from openai_api.protocol.chat import ChatCompletionRequest


class TextBlock(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class ImageBlock(msgspec.Struct, tag_field="type", tag="image"):
    source: dict[str, Any] | None = None


class DocumentBlock(msgspec.Struct, tag_field="type", tag="document"):
    source: dict[str, Any] | None = None


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    thinking: str | None = None


class RedactedThinkingBlock(msgspec.Struct, tag_field="type", tag="redacted_thinking"):
    data: str | None = None


class ToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


Shown = TextBlock | ImageBlock | DocumentBlock
Blocks = Annotated[list[Shown], msgspec.Meta(max_length=limits.CONTENT_PARTS)]


class ToolResultBlock(msgspec.Struct, tag_field="type", tag="tool_result"):
    tool_use_id: str
    content: str | Blocks | None = None
    is_error: bool | None = None


Block = Shown | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock


class Turn(msgspec.Struct):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], msgspec.Meta(min_length=1, max_length=limits.CONTENT_PARTS)]


class Tool(msgspec.Struct):
    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, msgspec.Meta(ge=1024, le=limits.INT64_MAX)] | None = None


class OutputConfig(msgspec.Struct):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class Conversation(Call, kw_only=True, dict=True):
    """What both endpoints read. `cache_control`, `metadata` and the like change nothing here."""

    messages: Annotated[list[Turn], msgspec.Meta(min_length=1, max_length=limits.MESSAGES)] | None = None
    system: str | Blocks | None = None
    tools: Annotated[list[Tool], msgspec.Meta(max_length=limits.TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    mcp_servers: list[dict[str, Any]] | None = None

    def check(self) -> None:
        Call.check(self)
        if self.messages is None:
            raise missing("messages")
        if self.mcp_servers:
            raise _unsupported("mcp_servers", "'mcp_servers' is not supported: declare tools instead.")
        self.chat.check()

    @cached_property
    def chat(self) -> ChatCompletionRequest:
        """The same as a chat request. Raises InvalidRequest naming a field of either format; `errors`
        tells both in Anthropic's words."""
        given = {name: value for name, value in self._as_chat().items() if value is not None}
        try:
            return msgspec.convert(given, ChatCompletionRequest)
        except msgspec.ValidationError as error:
            # One turn may become many messages, and many turns one: their bounds are chat's.
            raise InvalidRequest(
                f"Invalid value for 'messages': {str(error)[:200]}.", param="messages", code="invalid_value"
            ) from None

    def _as_chat(self) -> dict[str, Any]:
        chat: dict[str, Any] = {"model": self.model, "messages": _messages(self.system, self.messages or [])}
        if chat["messages"][-1]["role"] == "assistant":
            chat |= {"continue_final_message": True, "add_generation_prompt": False}
        if self.tools:
            chat["tools"] = [_tool(tool, at) for at, tool in enumerate(self.tools)]
        if self.tool_choice is not None:
            chat["tool_choice"] = _choice(self.tool_choice)
            if self.tool_choice.disable_parallel_tool_use:
                chat["parallel_tool_calls"] = False
        if self.output_config is not None:
            chat["reasoning_effort"] = self.output_config.effort
            chat["response_format"] = _format(self.output_config.format)
        if self.thinking is not None and self.thinking.type == "enabled" and not chat.get("reasoning_effort"):
            chat["reasoning_effort"] = _effort(self.thinking)
        return chat


class MessagesRequest(Conversation, kw_only=True, dict=True):
    """`POST /v1/messages`"""

    max_tokens: Tokens | None = None
    stream: bool | None = None
    stop_sequences: StopList | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=limits.TOP_P_MAX)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=limits.INT64_MAX)] | None = None

    @property
    def streamed(self) -> bool:
        return bool(self.stream)

    @property
    def shows_usage(self) -> bool:
        return True

    def check(self) -> None:
        Conversation.check(self)
        if self.max_tokens is None:
            raise missing("max_tokens")
        budget = self.thinking.budget_tokens if self.thinking is not None else None
        if budget is not None and budget >= self.max_tokens:
            raise InvalidRequest(
                "'thinking.budget_tokens' must be less than 'max_tokens'.",
                param="thinking.budget_tokens",
                code="integer_above_max_value",
            )

    def needs(self) -> frozenset[str]:
        return self.chat.needs()

    def forwarded(self, needs: frozenset[str]) -> bytes:
        return self.chat.forwarded(needs)

    def size(self, forwarded_bytes: int) -> Size:
        return self.chat.size(forwarded_bytes)

    def _as_chat(self) -> dict[str, Any]:
        return Conversation._as_chat(self) | {
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stream": self.stream,
            "stream_options": {"include_usage": True} if self.stream else None,
        }


class CountTokensRequest(Conversation, kw_only=True, dict=True):
    """`POST /v1/messages/count_tokens`"""

    def needs(self) -> frozenset[str]:
        return self.chat.needs() & _SEEN_IN_A_PROMPT

    def forwarded(self, needs: frozenset[str]) -> bytes:
        chat = self.chat
        body: dict[str, Any] = {"model": chat.model, "messages": chat.messages, "add_generation_prompt": True}
        return msgspec.json.encode(body | {name: getattr(chat, name) for name in needs})


_SEEN_IN_A_PROMPT = frozenset({"tools", "continue_final_message", "add_generation_prompt"})


def _messages(system: str | Sequence[Shown] | None, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Chat's messages. Turns of one role that follow each other become one, as at Anthropic's."""
    found: list[dict[str, Any]] = []
    if system:
        found.append({"role": "system", "content": _texts(system, "system")})
    for at, turn in enumerate(turns):
        where = f"messages[{at}].content"
        for message in [_of_assistant(turn, where)] if turn.role == "assistant" else _of_others(turn, where):
            if found and _is_one_turn(found[-1], message):
                found[-1] |= message | {"content": found[-1]["content"] + message["content"]}
            else:
                found.append(message)
    if "tool_calls" in found[-1]:
        raise InvalidRequest(
            "Invalid 'messages': each 'tool_use' needs its 'tool_result' in the message after it.",
            param="messages",
            code="invalid_value",
        )
    return [message | {"content": _content(message["content"])} for message in found]


def _is_one_turn(last: dict[str, Any], message: dict[str, Any]) -> bool:
    same = last["role"] == message["role"] != "tool"
    return same and "tool_calls" not in last


def _of_others(turn: Turn, where: str) -> list[dict[str, Any]]:
    """Text in one message, each result of a tool in one of its own, in the order given."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": [turn.content]}]
    found: list[dict[str, Any]] = []
    for at, block in enumerate(turn.content):
        if isinstance(block, ToolResultBlock) and turn.role == "user":
            texts = _texts(block.content or "", f"{where}[{at}].content")
            found.append(
                {
                    "role": "tool",
                    "tool_call_id": block.tool_use_id,
                    # Chat has no word for it, and the model is to know.
                    "content": ["Error: " + "".join(texts)] if block.is_error else texts,
                }
            )
            continue
        texts = _texts([_as_text(block, f"{where}[{at}]")], where)
        if found and found[-1]["role"] == turn.role:
            found[-1]["content"] += texts
        else:
            found.append({"role": turn.role, "content": texts})
    return found


def _of_assistant(turn: Turn, where: str) -> dict[str, Any]:
    """Earlier thinking is left out, as the templates of models that think do it too."""
    if isinstance(turn.content, str):
        return {"role": "assistant", "content": [turn.content]}
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for at, block in enumerate(turn.content):
        if isinstance(block, ToolUseBlock):
            arguments = msgspec.json.encode(block.input).decode()
            called = {"name": block.name, "arguments": arguments}
            calls.append({"id": block.id, "type": "function", "function": called})
        elif not isinstance(block, ThinkingBlock | RedactedThinkingBlock):
            texts += _texts([_as_text(block, f"{where}[{at}]")], where)
    message: dict[str, Any] = {"role": "assistant", "content": texts}
    return message | {"tool_calls": calls} if calls else message


def _as_text(block: Block, where: str) -> TextBlock:
    if isinstance(block, TextBlock):
        return block
    if isinstance(block, ImageBlock | DocumentBlock):
        raise _no_media(block, where)
    raise InvalidRequest(
        f"Invalid '{where}.type': a block of this type has no place in a message of this role.",
        param=f"{where}.type",
        code="invalid_value",
    )


def _texts(given: str | Sequence[Shown], where: str) -> list[str]:
    if isinstance(given, str):
        return [given]
    return [_as_text(block, f"{where}[{at}]").text for at, block in enumerate(given)]


def _content(texts: list[str]) -> str | list[dict[str, str]]:
    return "".join(texts) if len(texts) < 2 else [{"type": "text", "text": text} for text in texts]


def _no_media(block: ImageBlock | DocumentBlock, where: str) -> InvalidRequest:
    if (block.source or {}).get("type") == "url":
        return InvalidRequest(
            f"Invalid '{where}.source': remote_media_disabled. Nothing is fetched from addresses.",
            param=f"{where}.source",
            code="remote_media_disabled",
        )
    return _unsupported(
        f"{where}.type", f"Invalid '{where}.type': this model reads text only, use blocks of type 'text'."
    )


def _tool(tool: Tool, at: int) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise _unsupported(
            f"tools[{at}].type",
            f"Unsupported 'tools[{at}].type': tools are run by the client here; "
            "give each a 'name' and an 'input_schema'.",
        )
    if tool.input_schema is None:
        raise missing(f"tools[{at}].input_schema")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> str | dict[str, Any]:
    if choice.type != "tool":
        return "required" if choice.type == "any" else choice.type
    if choice.name is None:
        raise missing("tool_choice.name")
    return {"type": "function", "function": {"name": choice.name}}


def _format(wanted: dict[str, Any] | None) -> dict[str, Any] | None:
    if wanted is None:
        return None
    if wanted.get("type") != "json_schema":
        raise _unsupported(
            "output_config.format.type", "Unsupported 'output_config.format.type': use 'json_schema'."
        )
    if not isinstance(wanted.get("schema"), dict):
        raise missing("output_config.format.schema")
    schema = {"name": "answer", "schema": wanted["schema"], "strict": True}
    return {"type": "json_schema", "json_schema": schema}


def _effort(thinking: Thinking) -> str:
    """Engines are told how hard to think, not how long."""
    if thinking.budget_tokens is None:
        raise missing("thinking.budget_tokens")
    return next((effort for most, effort in _EFFORTS if thinking.budget_tokens < most), "high")


_EFFORTS = ((4096, "low"), (16384, "medium"))


def _unsupported(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="unsupported_value")
