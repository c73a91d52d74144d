"""`POST /v1/chat/completions`: OpenAI's fields and the engines' extras."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec

from openai_api import limits
from openai_api.errors import InvalidRequest
from openai_api.parsing import missing
from openai_api.protocol.call import Optional, Tokens
from openai_api.protocol.sampled import NEUTRAL, Sampled


class ContentPart(msgspec.Struct, omit_defaults=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, omit_defaults=True):
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], msgspec.Meta(max_length=limits.CONTENT_PARTS)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=limits.TOOLS)] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None


class ChatCompletionRequest(Sampled, kw_only=True):
    """`POST /v1/chat/completions`"""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=limits.MESSAGES)] | None = (
        None
    )
    max_completion_tokens: Tokens | None = None
    modalities: list[str] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    reasoning_effort: str | None = None
    web_search_options: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=limits.TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    function_call: str | dict[str, Any] | None = None
    functions: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=limits.TOOLS)] | None = None
    # The engines' extras.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    optional: ClassVar[Optional] = Optional(
        {
            **NEUTRAL,
            "modalities": (["text"],),
            "verbosity": ("medium",),
            "reasoning_effort": ("none",),
            "web_search_options": (),
            "response_format": ({"type": "text"},),
            "audio": (),
            "logprobs": (False,),
            "top_logprobs": (0,),
            "tools": ([],),
            "tool_choice": ("none", "auto"),
            "function_call": ("none", "auto"),
            "functions": ([],),
            "echo": (False,),
            "add_generation_prompt": (True,),
            "continue_final_message": (False,),
            "documents": ([],),
            "chat_template": (),
            "chat_template_kwargs": ({},),
        }
    )

    def check(self) -> None:
        Sampled.check(self)
        if self.messages is None:
            raise missing("messages")
        for at, message in enumerate(self.messages):
            _check_message(message, at)
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(
                "'top_logprobs' is only allowed when 'logprobs' is enabled.",
                param="top_logprobs",
                code="invalid_value",
            )
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise InvalidRequest(
                "'tool_choice' is only allowed when 'tools' are specified.",
                param="tool_choice",
                code="invalid_value",
            )

    def forwarded(self, needs: frozenset[str]) -> bytes:
        body = self._passed_on(needs)
        body["messages"] = self.messages
        # The newer name wins; engines all know the older one.
        max_tokens = self.max_completion_tokens or self.max_tokens
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        return msgspec.json.encode(body)


def _check_message(message: ChatMessage, at: int) -> None:
    if message.content is None:
        if message.role != "assistant" or not (message.tool_calls or message.function_call):
            raise missing(f"messages[{at}].content")
    elif not isinstance(message.content, str):
        if not message.content:
            raise InvalidRequest(
                f"Invalid 'messages[{at}].content': empty array. Expected at least one part.",
                param=f"messages[{at}].content",
                code="empty_array",
            )
        for index, part in enumerate(message.content):
            if part.type != "text":
                raise InvalidRequest(
                    f"Invalid value: '{part.type[:100]}'. This model reads text only: "
                    "use content parts of type 'text'.",
                    param=f"messages[{at}].content[{index}].type",
                    code="unsupported_value",
                )
            if part.text is None:
                raise missing(f"messages[{at}].content[{index}].text")
    if message.role == "tool" and message.tool_call_id is None:
        raise missing(f"messages[{at}].tool_call_id")
    for field in ("function_call", "audio"):
        if getattr(message, field) is not None:
            raise InvalidRequest(
                f"'messages[{at}].{field}' is not supported.",
                param=f"messages[{at}].{field}",
                code="unsupported_value",
            )
