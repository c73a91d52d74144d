"""`POST /v1/embeddings`"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec

from openai_api import limits
from openai_api.parsing import missing
from openai_api.protocol.call import (
    Call,
    Kept,
    Optional,
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
    # The engines' extras.
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    embed_dtype: str | None = None
    endianness: str | None = None
    normalize: bool | None = None
    messages: list[dict[str, Any]] | None = None

    optional: ClassVar[Optional] = Optional(
        {
            "dimensions": (),
            "truncation_side": ("right",),
            "add_special_tokens": (True,),
            "embed_dtype": ("float32",),
            "endianness": ("native", "little"),
            "normalize": (True,),
            "messages": ([],),
        }
    )

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
        return self.optional.asked(self)

    def forwarded(self, needs: frozenset[str]) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "input": several(self.input, "input"),
            "encoding_format": self.encoding_format or "float",
        }
        for name in needs:
            body[name] = getattr(self, name)
        if self.truncate_prompt_tokens is not None:
            body["truncate_prompt_tokens"] = self.truncate_prompt_tokens
        return msgspec.json.encode(body)
