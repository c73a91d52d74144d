"""`POST /tokenize` and `POST /detokenize`"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any

import msgspec

from openai_api import limits
from openai_api.errors import InvalidRequest
from openai_api.parsing import missing
from openai_api.protocol.call import NOTHING, Call, TokenId
from openai_api.protocol.chat import ChatCompletionRequest, TemplateValues
from openai_api.protocol.messages import ChatMessage
from openai_api.protocol.tools import check_tools


class TokenizeRequest(Call, kw_only=True, dict=True):
    """`POST /tokenize`: a text as it stands, or a conversation as the model's template writes it."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=limits.MESSAGES)] | None = (
        None
    )
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    # Of conversations.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=limits.TOOLS)] | None = None
    chat_template: str | None = None
    chat_template_kwargs: TemplateValues | None = None

    @cached_property
    def chat(self) -> ChatCompletionRequest:
        """The same conversation, asked for an answer: what that refuses is refused here."""
        return ChatCompletionRequest(
            model=self.model,
            messages=self.messages,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            tools=self.tools,
            chat_template=self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def check(self) -> None:
        Call.check(self)
        if self.messages is None:
            if self.prompt is None:
                raise missing("prompt")
            # A text has no use for them, but they are not taken broken.
            check_tools(self.tools or [])
        elif self.prompt is None:
            self.chat.check()
        else:
            raise InvalidRequest(
                "Give 'prompt' or 'messages', not both.", param="messages", code="invalid_value"
            )

    def needs(self) -> frozenset[str]:
        # That a prompt for an answer may be left out is part of this endpoint.
        return NOTHING if self.messages is None else self.chat.needs() - {"add_generation_prompt"}

    def forwarded(self, needs: frozenset[str]) -> bytes:
        body: dict[str, Any] = {"model": self.model}
        named = ["return_token_strs", "add_special_tokens"]
        if self.messages is None:
            body["prompt"] = self.prompt
        else:
            body["messages"] = self.messages
            named += ["add_generation_prompt", *needs]
            if self.continue_final_message:
                # Engines add the prompt unless told otherwise, and refuse both.
                body["add_generation_prompt"] = False
        return msgspec.json.encode(
            body | {name: value for name in named if (value := getattr(self, name)) is not None}
        )


class DetokenizeRequest(Call, kw_only=True):
    """`POST /detokenize`"""

    tokens: list[TokenId] | None = None

    def check(self) -> None:
        Call.check(self)
        if self.tokens is None:
            raise missing("tokens")

    def forwarded(self, needs: frozenset[str]) -> bytes:
        return msgspec.json.encode({"model": self.model, "tokens": self.tokens})


class TokenCheck(msgspec.Struct):
    """A prompt of `POST /api/v1/token_check`"""

    model: Annotated[str, msgspec.Meta(max_length=limits.MODEL_NAME_LENGTH)]
    prompt: str
    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=limits.INT64_MAX)] = 0


class TokenChecks(msgspec.Struct):
    """`POST /api/v1/token_check`, as FastChat answers it."""

    prompts: Annotated[list[TokenCheck], msgspec.Meta(max_length=limits.PROMPTS)]
