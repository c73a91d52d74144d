"""`POST /v1/chat/completions`: OpenAI's fields and the engines' extras."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec

from openai_api import limits
from openai_api.errors import InvalidRequest
from openai_api.parsing import invalid, missing
from openai_api.protocol.call import Optional, Tokens
from openai_api.protocol.messages import ChatMessage, check_messages, forwarded_messages
from openai_api.protocol.sampled import NEUTRAL, Sampled
from openai_api.protocol.structured import check_format
from openai_api.protocol.tools import check_choice, check_tools, names_one, narrowed

TemplateValues = Annotated[
    dict[str, str | int | float | bool | None], msgspec.Meta(max_length=limits.TEMPLATE_VALUES)
]
"""Plain ones only: a template is a program, and these are its input."""


class ChatCompletionRequest(Sampled, kw_only=True):
    """`POST /v1/chat/completions`"""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=limits.MESSAGES)] | None = (
        None
    )
    max_completion_tokens: Tokens | None = None
    modalities: list[Literal["text", "audio"]] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    web_search_options: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=limits.TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    function_call: str | dict[str, Any] | None = None
    functions: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=limits.TOOLS)] | None = None
    # The engines' extras.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    include_reasoning: bool | None = None
    documents: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=limits.RAG_DOCUMENTS)] | None = None
    chat_template: str | None = None
    chat_template_kwargs: TemplateValues | None = None

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
            "tool_choice": ("auto",),
            "parallel_tool_calls": (True,),
            "function_call": ("none", "auto"),
            "functions": ([],),
            "add_special_tokens": (False,),
            "add_generation_prompt": (True,),
            "continue_final_message": (False,),
            "include_reasoning": (True,),
            "documents": ([],),
            "chat_template": (),
            "chat_template_kwargs": ({},),
        }
    )

    @property
    def most_tokens(self) -> int | None:
        # The newer name wins.
        return self.max_completion_tokens or self.max_tokens

    def check(self) -> None:
        Sampled.check(self)
        if self.messages is None:
            raise missing("messages")
        if self.echo:
            raise _refused("echo")
        check_messages(self.messages)

    def check_asked(self, asked: frozenset[str]) -> None:
        Sampled.check_asked(self, asked)
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(
                "'top_logprobs' is only allowed when 'logprobs' is enabled.",
                param="top_logprobs",
                code="invalid_value",
            )
        if self.tools:
            check_tools(self.tools)
        if self.tool_choice is not None:
            check_choice(self.tool_choice, self.tools)
        if self.response_format is not None:
            check_format(self.response_format)
        if self.structured_outputs is not None and names_one(self.tool_choice):
            raise invalid("structured_outputs", "it cannot be used together with a named 'tool_choice'.")
        if self.chat_template is not None:
            raise _refused("chat_template")
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid(
                "continue_final_message", "it cannot be used together with 'add_generation_prompt'."
            )
        for name in self.chat_template_kwargs or ():
            if name in _TEMPLATES_OWN:
                raise invalid("chat_template_kwargs", f"'{name}' is not a value for the template.")

    def needs(self) -> frozenset[str]:
        asked = Sampled.needs(self)
        # Without tools they ask for nothing.
        return asked if not asked or self.tools else asked - _OF_TOOLS

    def forwarded(self, needs: frozenset[str]) -> bytes:
        body = self._passed_on(needs)
        body["messages"] = forwarded_messages(self.messages or [])
        # Engines all know the older name.
        if self.most_tokens is not None:
            body["max_tokens"] = self.most_tokens
        return msgspec.json.encode(body)

    def _reword(self, body: dict[str, Any], needs: frozenset[str]) -> None:
        Sampled._reword(self, body, needs)
        if self.tools and "tool_choice" in needs:
            body["tools"], body["tool_choice"] = narrowed(self.tools, self.tool_choice)
        if self.continue_final_message:
            # Engines add the prompt unless told otherwise, and refuse both.
            body["add_generation_prompt"] = False


def _refused(field: str) -> InvalidRequest:
    return InvalidRequest(
        f"Unsupported value: '{field}' is not accepted here. Leave it out.",
        param=field,
        code="unsupported_value",
    )


_OF_TOOLS = frozenset({"tool_choice", "parallel_tool_calls"})

_TEMPLATES_OWN = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""Arguments of the function that renders templates, which a value of the same name would replace."""
