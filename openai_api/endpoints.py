"""The endpoints that a worker answers, each described once; `generation` is the path of them all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from inference.http import Header
from openai_api.answered import Answered
from openai_api.auth import Key
from openai_api.errors import answer_to
from openai_api.messages.answer import Messages, as_count
from openai_api.messages.errors import as_anthropic
from openai_api.messages.request import CountTokensRequest, MessagesRequest
from openai_api.parsing import decode
from openai_api.protocol import (
    Call,
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    RerankRequest,
)
from openai_api.protocol.score import ScoreRequest
from openai_api.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from openai_api.responses.answer import Responding
from openai_api.responses.request import ResponsesRequest
from openai_api.responses.store import prepare as prepare_response
from openai_api.responses.words import errors as response_errors
from registry.rights import Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    path: str
    """Where clients ask; the ledger's name of it too."""
    asked: str
    """Where the worker is asked."""
    capability: str
    """What a worker that answers it announces."""
    scope: str
    """What a key that is held to some endpoints must have: see `registry.rights.Scope`."""
    request: type[Call]
    reshape: Callable[[bytes], bytes] | None = None
    """Makes the client's answer of the worker's whole one; None: they are the same."""
    adapter: Callable[[Answered, Any, Key, str], Answered] | None = None
    """Given where the answer goes, the call, its key and the request id: what speaks this endpoint's format
    between the worker and there, whole answers and streams; None: they are the same."""
    prepare: Callable[[Any, Key], Awaitable[None]] | None = None
    """Reads what the call refers to (an earlier response), once its key may use its model."""
    counted: bool = True
    """Whether an answer tells its usage. One that does not costs no tokens."""
    errors: Callable[[Exception], tuple[int, dict[str, Any], list[Header]]] = answer_to
    """How an error is told before the first byte."""
    model: str | None = None
    """The model that the URL names, whatever the body says; None: the body names it."""
    needs: frozenset[str] = field(init=False)
    """The capability, as what a worker must have for a request that asks for nothing else."""
    _decoder: msgspec.json.Decoder[Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", frozenset({self.capability}))
        object.__setattr__(self, "_decoder", msgspec.json.Decoder(self.request))

    def parse(self, body: bytes) -> Call:
        """Read and check a body. Raises InvalidRequest naming the field."""
        call: Call = decode(body, self._decoder.decode)
        if self.model is not None:
            call.model = self.model
        call.check()
        return call


class _Ranked(msgspec.Struct):
    index: int
    relevance_score: float


class _Ranking(msgspec.Struct):
    results: list[_Ranked]
    id: str = ""


_decode_ranking = msgspec.json.Decoder(_Ranking).decode


def as_cohere(answer: bytes) -> bytes:
    """A ranking in the shape of Cohere's second version. Raises msgspec.DecodeError for what is none."""
    ranking = _decode_ranking(answer)
    meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    return msgspec.json.encode({"id": ranking.id, "results": ranking.results, "meta": meta})


CHAT = Endpoint(
    path="/v1/chat/completions",
    asked="/v1/chat/completions",
    capability="endpoint:chat",
    scope=Scope.CHAT.value,
    request=ChatCompletionRequest,
)
COMPLETIONS = Endpoint(
    path="/v1/completions",
    asked="/v1/completions",
    capability="endpoint:completions",
    scope=Scope.COMPLETIONS.value,
    request=CompletionRequest,
)
EMBEDDINGS = Endpoint(
    path="/v1/embeddings",
    asked="/v1/embeddings",
    capability="endpoint:embeddings",
    scope=Scope.EMBEDDINGS.value,
    request=EmbeddingRequest,
)
RERANK = Endpoint(
    path="/v1/rerank",
    asked="/v1/rerank",
    capability="endpoint:rerank",
    scope=Scope.RERANK.value,
    request=RerankRequest,
)
RERANK_COHERE = Endpoint(
    path="/v2/rerank",
    asked="/v1/rerank",
    capability="endpoint:rerank",
    scope=Scope.RERANK.value,
    request=RerankRequest,
    reshape=as_cohere,
)
RESPONSES = Endpoint(
    path="/v1/responses",
    asked="/v1/chat/completions",
    capability="endpoint:chat",
    scope=Scope.RESPONSES.value,
    request=ResponsesRequest,
    adapter=Responding,
    prepare=prepare_response,
    errors=response_errors,
)
MESSAGES = Endpoint(
    path="/v1/messages",
    asked="/v1/chat/completions",
    capability="endpoint:chat",
    scope=Scope.MESSAGES.value,
    request=MessagesRequest,
    adapter=Messages,
    errors=as_anthropic,
)
COUNT_TOKENS = Endpoint(
    path="/v1/messages/count_tokens",
    asked="/tokenize",
    capability="endpoint:tokenize",
    scope=Scope.MESSAGES.value,
    request=CountTokensRequest,
    reshape=as_count,
    counted=False,
    errors=as_anthropic,
)
TOKENIZE = Endpoint(
    path="/tokenize",
    asked="/tokenize",
    capability="endpoint:tokenize",
    scope=Scope.TOKENIZE.value,
    request=TokenizeRequest,
    counted=False,
)
DETOKENIZE = Endpoint(
    path="/detokenize",
    asked="/detokenize",
    capability="endpoint:tokenize",
    scope=Scope.TOKENIZE.value,
    request=DetokenizeRequest,
    counted=False,
)
SCORE = Endpoint(
    path="/v1/score",
    asked="/v1/score",
    capability="endpoint:score",
    scope=Scope.RERANK.value,
    request=ScoreRequest,
)
ALIASES = (
    replace(TOKENIZE, path="/v1/tokenize"),
    replace(DETOKENIZE, path="/v1/detokenize"),
    replace(SCORE, path="/score"),
)
"""Other paths of endpoints."""

ENDPOINTS = (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    RERANK,
    RERANK_COHERE,
    RESPONSES,
    MESSAGES,
    COUNT_TOKENS,
    TOKENIZE,
    DETOKENIZE,
    SCORE,
    *ALIASES,
)
