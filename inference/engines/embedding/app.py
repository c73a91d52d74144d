"""The HTTP face of the embedding engine.

    POST /v1/embeddings   POST /v1/rerank   POST /v1/score   POST /tokenize   POST /detokenize

and what every engine has (inference.engines.http).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
from starlette.types import Send

from inference.engines.embedding.engine import EmbeddingEngine
from inference.engines.embedding.requests import (
    EmbeddingsRequest,
    RerankRequest,
    ScoreRequest,
    documents_of,
    embeddings_answer,
    inputs_of,
    parse,
    prompt_of,
    rerank_answer,
    score_answer,
    sides_of,
)
from inference.engines.http import Begun, Running, WorkerApp, send_whole
from inference.engines.tokenize import DetokenizeRequest, TokenizeRequest, tokens_answer

INLINE_NUMBERS = 50_000
"""Larger answers are written in a thread, so that others go on meanwhile."""


class EmbeddingApp(WorkerApp):
    """Serves one `EmbeddingEngine`."""

    def __init__(self, engine: EmbeddingEngine, *, slots: int, served_name: str) -> None:
        super().__init__(
            engine,
            slots=slots,
            served_name=served_name,
            answers={
                "/v1/embeddings": partial(self._begin, self._embed),
                "/v1/rerank": partial(self._begin, self._rerank),
                "/v1/score": partial(self._begin, self._score),
                "/tokenize": partial(self._begin, self._tokenize),
                "/detokenize": partial(self._begin, self._detokenize),
            },
        )
        self._engine = engine

    async def _embed(self, running: Running, body: bytes) -> bytes:
        request = parse(body, EmbeddingsRequest)
        inputs = inputs_of(request)
        answer = await self._engine.embed(
            inputs, dimensions=request.dimensions, keep=request.truncate_prompt_tokens
        )
        running.spent.prompt_tokens = answer.prompt_tokens
        model = request.model or self._served_name
        if answer.rows.size <= INLINE_NUMBERS:
            return embeddings_answer(request, answer, model)
        return await asyncio.to_thread(embeddings_answer, request, answer, model)

    async def _rerank(self, running: Running, body: bytes) -> bytes:
        request = parse(body, RerankRequest)
        texts = documents_of(request)
        answer = await self._engine.rerank(
            request.query,
            texts,
            keep=request.truncate_prompt_tokens,
            document_tokens=request.max_tokens_per_doc,
        )
        running.spent.prompt_tokens = answer.prompt_tokens
        return rerank_answer(
            request,
            texts,
            answer,
            model=request.model or self._served_name,
            request_id=running.request_id,
        )

    async def _score(self, running: Running, body: bytes) -> bytes:
        request = parse(body, ScoreRequest)
        left, right = sides_of(request)
        answer = await self._engine.score(left, right, keep=request.truncate_prompt_tokens)
        running.spent.prompt_tokens = answer.prompt_tokens
        return score_answer(
            answer,
            model=request.model or self._served_name,
            request_id=running.request_id,
            created=int(time.time()),
        )

    async def _tokenize(self, running: Running, body: bytes) -> bytes:
        request = parse(body, TokenizeRequest)
        tokens = await self._engine.tokenize(
            prompt_of(request), special=request.add_special_tokens is not False
        )
        return tokens_answer(request, tokens, self._engine.context_length)

    async def _detokenize(self, running: Running, body: bytes) -> bytes:
        return msgspec.json.encode({"prompt": self._engine.detokenize(parse(body, DetokenizeRequest).tokens)})

    def _begin(
        self, answer: Callable[[Running, bytes], Awaitable[bytes]], running: Running, body: bytes
    ) -> Begun:
        self._refuse_unless_serving()

        async def begun(send: Send) -> None:
            async with self._slots:
                made = await answer(running, body)
            await send_whole(send, 200, made, running.request_id)

        return begun
