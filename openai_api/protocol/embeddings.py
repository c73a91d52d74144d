"""`POST /v1/embeddings`"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from openai_api import limits
from openai_api.parsing import missing
from openai_api.protocol.call import (
    NOTHING,
    Call,
    Kept,
    TokenId,
    TokenList,
    empty_string,
    several,
    too_many,
)


class EmbeddingRequest(Call, kw_only=True):
    """`POST /v1/embeddings`"""

    input: str | Annotated[list[str | TokenId | TokenList], msgspec.Meta(min_length=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=limits.INT64_MAX)] | None = None
    truncate_prompt_tokens: Kept | None = None
    """Longer inputs are cut to so many tokens, -1: to the model's limit; null: they are refused."""

    def check(self) -> None:
        Call.check(self)
        if self.input is None:
            raise missing("input")
        inputs = several(self.input, "input")
        if len(inputs) > limits.EMBEDDING_INPUTS:
            raise too_many("input", limits.EMBEDDING_INPUTS)
        if "" in inputs:
            raise empty_string("input")

    def needs(self) -> frozenset[str]:
        return NOTHING if self.dimensions is None else _DIMENSIONS

    def forwarded(self, needs: frozenset[str]) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "input": several(self.input, "input"),
            "encoding_format": self.encoding_format or "float",
        }
        if needs:
            body["dimensions"] = self.dimensions
        if self.truncate_prompt_tokens is not None:
            body["truncate_prompt_tokens"] = self.truncate_prompt_tokens
        return msgspec.json.encode(body)


_DIMENSIONS = frozenset({"dimensions"})
