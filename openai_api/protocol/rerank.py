"""`POST /v1/rerank`, and Cohere's `/v2/rerank`"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec

from openai_api import limits
from openai_api.parsing import missing
from openai_api.protocol.call import PAIR_TOKENS, Call, Kept, Optional, Size, Tokens, empty_string


class RerankDocument(msgspec.Struct):
    text: str


class RerankRequest(Call, kw_only=True):
    """`POST /v1/rerank`, and Cohere's `/v2/rerank`"""

    query: str | None = None
    documents: (
        Annotated[list[str | RerankDocument], msgspec.Meta(min_length=1, max_length=limits.RERANK_DOCUMENTS)]
        | None
    ) = None
    top_n: Annotated[int, msgspec.Meta(ge=1, le=limits.INT64_MAX)] | None = None
    return_documents: bool | None = None
    truncate_prompt_tokens: Kept | None = None
    # Extras of Cohere's and of the engines.
    max_tokens_per_doc: Tokens | None = None
    max_chunks_per_doc: Tokens | None = None
    rank_fields: list[str] | None = None
    truncation_side: Literal["left", "right"] | None = None
    use_activation: bool | None = None
    instruction: str | None = None

    optional: ClassVar[Optional] = Optional(
        {
            "max_tokens_per_doc": (),
            "max_chunks_per_doc": (),
            "rank_fields": ([], ["text"]),
            "truncation_side": ("right",),
            "use_activation": (True,),
            "instruction": ("",),
        }
    )

    def check(self) -> None:
        Call.check(self)
        if self.query is None:
            raise missing("query")
        if not self.query:
            raise empty_string("query")
        if self.documents is None:
            raise missing("documents")

    def needs(self) -> frozenset[str]:
        return self.optional.asked(self)

    def size(self, forwarded_bytes: int) -> Size:
        # The query is read once more with each document.
        pairs = len(self.documents or ())
        most = forwarded_bytes + pairs * (len((self.query or "").encode()) + PAIR_TOKENS)
        return Size(most, pairs)

    def forwarded(self, needs: frozenset[str]) -> bytes:
        documents = [one if isinstance(one, str) else one.text for one in self.documents or ()]
        body: dict[str, Any] = {"model": self.model, "query": self.query, "documents": documents}
        if self.top_n is not None:
            body["top_n"] = self.top_n
        if self.return_documents is not None:
            body["return_documents"] = self.return_documents
        if self.truncate_prompt_tokens is not None:
            body["truncate_prompt_tokens"] = self.truncate_prompt_tokens
        for name in needs:
            body[name] = getattr(self, name)
        return msgspec.json.encode(body)
