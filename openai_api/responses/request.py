"""`POST /v1/responses`: OpenAI's fields, and the chat completion that they ask for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from openai_api import limits
from openai_api.errors import InvalidRequest
from openai_api.parsing import decode, missing
from openai_api.protocol.call import Call, Penalty, Size, Tokens
from openai_api.protocol.chat import ChatCompletionRequest
from openai_api.responses.items import InputItem, Messages
from openai_api.responses.words import reworded

LOGPROBS = "message.output_text.logprobs"
REFUSED = {
    "background": "Leave it out and wait for the answer, or set 'stream' to true.",
    "conversation": "Send the earlier items in 'input', or go on from an answer with 'previous_response_id'.",
    "prompt": "Send its text in 'instructions' and 'input'.",
}
"""Fields that would change the answer and that nothing here honours, and what to do instead."""


class FunctionTool(msgspec.Struct):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(msgspec.Struct, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextSettings(msgspec.Struct):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningSettings(msgspec.Struct):
    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(Call, kw_only=True, dict=True):
    """`POST /v1/responses`"""

    input: str | list[InputItem] | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: Tokens | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=limits.TEMPERATURE_MAX)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=limits.TOP_P_MAX)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    include: list[str] | None = None
    tools: Annotated[list[FunctionTool], msgspec.Meta(max_length=limits.TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    metadata: (
        Annotated[dict[str, Annotated[str, msgspec.Meta(max_length=512)]], msgspec.Meta(max_length=16)] | None
    ) = None
    max_tool_calls: Tokens | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    background: bool | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None

    @property
    def streamed(self) -> bool:
        return bool(self.stream)

    @property
    def shows_usage(self) -> bool:
        return True

    @property
    def items(self) -> list[InputItem]:
        """The input as items, whichever way it was given."""
        if isinstance(self.input, str):
            return [InputItem(role="user", content=self.input)]
        return self.input or []

    def check(self) -> None:
        Call.check(self)
        for field, instead in REFUSED.items():
            if getattr(self, field):
                raise InvalidRequest(
                    f"Unsupported value: '{field}' is not supported here. {instead}",
                    param=field,
                    code="unsupported_value",
                )
        if self.input is None:
            raise missing("input")
        if not self.input:
            raise InvalidRequest(
                "Invalid 'input': it is empty. Expected at least one character or item.",
                param="input",
                code="invalid_value" if self.input == "" else "empty_array",
            )
        self.earlier: list[str] = []
        """Ids of the responses that this one is built on, once they were looked up."""
        self.resolved = self.items
        """The input, once its references were looked up."""
        # What is only referred to is read later: for now, is the rest of it a request?
        later = self.previous_response_id is not None or any(item.is_reference for item in self.items)
        self.resolve([InputItem(role="user", content="")] if later else [], self.items)

    def resolve(self, earlier: list[InputItem], items: list[InputItem]) -> None:
        """Make the chat request of the conversation so far and this input, whose references were looked
        up. Raises InvalidRequest."""
        said = Messages()
        if self.instructions:
            said.say("system", self.instructions, "instructions")
        said.add(earlier, "previous_response_id")
        if isinstance(self.input, str):
            said.say("user", self.input, "input")
        else:
            said.add(items, "input")
        body = msgspec.json.encode(self._asked() | {"messages": said.messages})
        try:
            chat = decode(body, _decode_chat)
            chat.check()
        except InvalidRequest as error:
            raise reworded(error, said.places) from None
        self.chat: ChatCompletionRequest = chat

    def needs(self) -> frozenset[str]:
        return self.chat.needs()

    def forwarded(self, needs: frozenset[str]) -> bytes:
        return self.chat.forwarded(needs)

    def size(self, forwarded_bytes: int) -> Size:
        return self.chat.size(forwarded_bytes)

    def _asked(self) -> dict[str, Any]:
        """The chat request, but for its messages. `null` means "not given" there too."""
        tools, choice = self._tools()
        shown = bool(self.top_logprobs) or LOGPROBS in (self.include or ())
        return {
            "model": self.model,
            "stream": self.stream,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logprobs": shown or None,
            "top_logprobs": self.top_logprobs,
            "tools": tools,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls if tools else None,
            "response_format": self._response_format(),
            "verbosity": self.text.verbosity if self.text else None,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
        }

    def _tools(self) -> tuple[list[dict[str, Any]] | None, Any]:
        tools = []
        for at, tool in enumerate(self.tools or ()):
            if tool.type != "function":
                raise InvalidRequest(
                    f"Invalid value: '{tool.type[:100]}'. Only tools of type 'function' are supported.",
                    param=f"tools[{at}].type",
                    code="unsupported_value",
                )
            if not tool.name:
                raise missing(f"tools[{at}].name")
            function: dict[str, Any] = {"name": tool.name}
            for field in ("description", "parameters", "strict"):
                if (value := getattr(tool, field)) is not None:
                    function[field] = value
            tools.append({"type": "function", "function": function})
        return tools or None, _choice(self.tool_choice)

    def _response_format(self) -> dict[str, Any] | None:
        asked = self.text.format if self.text else None
        if asked is None or asked.type == "text":
            return None
        if asked.type == "json_object":
            return {"type": "json_object"}
        for field in ("name", "schema"):
            if getattr(asked, field) is None:
                raise missing(f"text.format.{field}")
        schema = {name: value for name, value in msgspec.to_builtins(asked).items() if name != "type"}
        return {"type": "json_schema", "json_schema": schema}


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "allowed_tools":
        return _named(choice, "tool_choice")
    tools = choice.get("tools")
    if not isinstance(tools, list):
        raise missing("tool_choice.tools")
    allowed = [_named(one, f"tool_choice.tools[{at}]") for at, one in enumerate(tools)]
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": allowed}}


def _named(tool: Any, place: str) -> dict[str, Any]:
    """One tool by its name, as a chat request says it."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise InvalidRequest(
            f"Invalid '{place}': expected a tool of type 'function'.", param=place, code="unsupported_value"
        )
    if not isinstance(tool.get("name"), str):
        raise missing(f"{place}.name")
    return {"type": "function", "function": {"name": tool["name"]}}


_decode_chat = msgspec.json.Decoder(ChatCompletionRequest).decode
