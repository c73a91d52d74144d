"""`POST /v1/completions`: text in, text out, several prompts in one request."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from openai_api import limits
from openai_api.parsing import missing
from openai_api.protocol.call import Optional, Size, TokenId, TokenList, several, too_many
from openai_api.protocol.sampled import NEUTRAL, Sampled


class CompletionRequest(Sampled, kw_only=True):
    """`POST /v1/completions`"""

    prompt: str | Annotated[list[str | TokenId | TokenList], msgspec.Meta(min_length=1)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=limits.INT64_MAX)] | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    suffix: str | None = None

    optional: ClassVar[Optional] = Optional(
        {**NEUTRAL, "logprobs": (), "suffix": ("",), "add_special_tokens": (True,)}
    )

    @property
    def most_tokens(self) -> int | None:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def size(self, forwarded_bytes: int) -> Size:
        prompts = len(several(self.prompt, "prompt"))
        tokens = forwarded_bytes + limits.TEMPLATE_TOKENS
        return Size(tokens, prompts, prompts * (self.n or 1), self.most_tokens)

    def check(self) -> None:
        Sampled.check(self)
        if self.prompt is None:
            raise missing("prompt")
        prompts = several(self.prompt, "prompt")
        if len(prompts) > limits.PROMPTS:
            raise too_many("prompt", limits.PROMPTS)

    def forwarded(self, needs: frozenset[str]) -> bytes:
        body = self._passed_on(needs)
        body["prompt"] = self.prompt
        body["max_tokens"] = self.most_tokens
        if self.echo:
            body["echo"] = True
        return msgspec.json.encode(body)


COMPLETION_TOKENS = 16
"""OpenAI's default for `max_tokens` of this endpoint alone; said to engines, which have others."""
