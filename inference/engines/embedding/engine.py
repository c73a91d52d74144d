"""The `embedding` engine: one request from texts to vectors or scores."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from inference.engines.base import BadRequest, EngineError, EngineSpec, LoadError
from inference.engines.embedding.arguments import read_arguments
from inference.engines.embedding.batcher import Batcher, Row
from inference.engines.embedding.folder import Kind
from inference.engines.embedding.loading import Loaded, load
from inference.engines.embedding.tokens import Piece
from inference.protocol import Cause, Load, Progress

logger = logging.getLogger("roundhouse.engine")

STOP_SECONDS = 4.0
INLINE_CHARACTERS = 4_000
"""Longer requests are read in a thread, so that others go on meanwhile."""
WARM_UP = "The first step is the slow one."


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Rows of numbers, and what they cost."""

    rows: Row
    """A vector per input; for a reranking a score per document, in one column."""
    prompt_tokens: int
    """Tokens that the model read."""
    truncated: tuple[bool, ...]
    """Which inputs, or documents, were cut to the limit."""


class EmbeddingEngine:
    """Serves one encoder or cross-encoder folder. See `inference.engines.base.Model`.

    Creating it checks the arguments (LoadError) and reads nothing.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.capabilities: frozenset[str] = frozenset()
        self.context_length = 0
        self._spec = spec
        self._arguments = read_arguments(spec.arguments)
        if spec.slots < 1:
            raise LoadError(Cause.BAD_ARGUMENT, "'slots' must be at least 1.")
        self._loaded: Loaded | None = None
        self._batcher: Batcher | None = None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def load(self, progress: Callable[[Progress], None]) -> None:
        """Get ready to answer, reporting progress. Raises LoadError."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[Loaded | LoadError] = loop.create_future()

        def run() -> None:
            # A daemon thread: a process that has to end is not held up by a long read.
            outcome: Loaded | LoadError
            try:
                outcome = load(self._spec, self._arguments, progress)
            except LoadError as error:
                outcome = error
            except BaseException as error:
                logger.exception("The model cannot be loaded.")
                outcome = LoadError(
                    Cause.CRASHED,
                    f"The model cannot be loaded ({type(error).__name__}); the log says why.",
                )
            try:
                loop.call_soon_threadsafe(_settle, ready, outcome)
            except RuntimeError:
                logger.debug("The event loop closed before the engine did.")

        threading.Thread(target=run, name="loading", daemon=True).start()
        loaded = await ready
        if isinstance(loaded, LoadError):
            raise loaded
        batcher = Batcher(
            loaded.encode,
            batch_tokens=loaded.batch_tokens,
            loop=loop,
            padded=loaded.padded,
            lanes=loaded.lanes,
        )
        batcher.start()
        self._loaded, self._batcher = loaded, batcher
        self.context_length = loaded.tokens.limit
        self.capabilities = _capabilities(loaded)
        progress(Progress(step="warming up"))
        try:
            await (self.rerank(WARM_UP, [WARM_UP], keep=-1) if self._reranks_only else self._warm_up())
        except EngineError as error:
            raise LoadError(Cause.CRASHED, "The model failed at its first step; the log says why.") from error

    async def embed(
        self, inputs: Sequence[str | list[int]], *, dimensions: int | None = None, keep: int | None = None
    ) -> Answer:
        """A vector per text or list of token ids.

        `keep`: cut inputs to so many tokens (-1: to the model's limit); None refuses longer ones.
        Raises BadRequest naming the field, or EngineError when the engine itself failed.
        """
        loaded = self._whole()
        if self._reranks_only:
            raise BadRequest("This model reranks; it makes no embeddings.", param="model")
        _check_dimensions(loaded, dimensions)
        one = len(inputs) == 1

        def read() -> list[Piece]:
            return [
                loaded.tokens.input(given, param="input" if one else f"input[{at}]", keep=keep)
                for at, given in enumerate(inputs)
            ]

        pieces = await self._read(read, sum(len(each) for each in inputs))
        rows = await self._run(pieces)
        if dimensions is not None and dimensions < rows.shape[1]:
            rows = rows[:, :dimensions]
            if loaded.normalised:
                rows = _unit(rows)
        return _answer(rows, pieces, pieces)

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        keep: int | None = None,
        document_tokens: int | None = None,
    ) -> Answer:
        """A score per document: the cross-encoder's, else the cosine of the angle between the vectors.

        `document_tokens`: cut each document to so many of its own tokens, whatever goes around them.
        `keep` and what it raises: as `embed`.
        """
        loaded = self._whole()
        tokens = loaded.tokens
        pairs = self._reranks_only

        def read_document(at: int, text: str) -> Piece:
            whole, param = text, f"documents[{at}]"
            if document_tokens is not None:
                text = tokens.beginning(text, document_tokens)
            if pairs:
                piece = tokens.pair(query, text, param=param, keep=keep)
            else:
                piece = tokens.document(text, param=param, keep=keep)
            return piece if text is whole else replace(piece, truncated=True)

        def read() -> list[Piece]:
            pieces = [read_document(at, text) for at, text in enumerate(documents)]
            return pieces if pairs else [tokens.query(query, param="query", keep=keep), *pieces]

        characters = len(query) * (len(documents) if pairs else 1) + sum(map(len, documents))
        pieces = await self._read(read, characters)
        rows = await self._run(pieces)
        if pairs:
            return _answer(rows, pieces, pieces)
        vectors = _unit(rows)
        return _answer((vectors[1:] @ vectors[0]).reshape(-1, 1), pieces, pieces[1:])

    async def score(self, left: Sequence[str], right: Sequence[str], *, keep: int | None = None) -> Answer:
        """A score per pair of texts, of which there is one on the left for all, or one for each on the right:
        the cross-encoder's, else the cosine of the angle between the vectors.

        `keep` and what it raises: as `embed`.
        """
        loaded = self._whole()
        tokens = loaded.tokens
        pairs = self._reranks_only
        lefts = list(left) * len(right) if len(left) == 1 else list(left)

        def read() -> list[Piece]:
            if pairs:
                return [
                    tokens.pair(one, other, param=f"text_2[{at}]", keep=keep)
                    for at, (one, other) in enumerate(zip(lefts, right, strict=True))
                ]
            return [
                tokens.input(text, param=f"{side}[{at}]", keep=keep)
                for side, texts in (("text_1", left), ("text_2", right))
                for at, text in enumerate(texts)
            ]

        pieces = await self._read(read, sum(map(len, lefts if pairs else left)) + sum(map(len, right)))
        rows = await self._run(pieces)
        if pairs:
            return _answer(rows, pieces, pieces)
        vectors = _unit(rows)
        # One row on the left goes with each on the right by itself.
        scores = (vectors[: len(left)] * vectors[len(left) :]).sum(axis=1, keepdims=True)
        return _answer(scores, pieces, pieces[len(left) :])

    async def tokenize(self, text: str, *, special: bool) -> list[tuple[int, str]]:
        """A text's tokens, each with its spelling; `special`: those around it as well."""
        tokens = self._whole().tokens
        if len(text) <= INLINE_CHARACTERS:
            return tokens.of_text(text, special=special)
        reading = partial(tokens.of_text, text, special=special)
        return await asyncio.get_running_loop().run_in_executor(self._reader, reading)

    def detokenize(self, tokens: list[int]) -> str:
        """Raises BadRequest for a token that the model does not have."""
        return self._whole().tokens.text_of(tokens, param="tokens")

    def load_report(self) -> Load:
        """See `Model.load_report`. Costs microseconds."""
        return Load() if self._batcher is None else self._batcher.report()

    def healthy(self) -> bool:
        """False once a thread of the model's has ended. Before `load` there is nothing to be ill."""
        return self._batcher is None or self._batcher.alive()

    async def close(self) -> None:
        """End the model's threads, open answers with it. May be called twice."""
        batcher, self._batcher = self._batcher, None
        self._reader.shutdown(wait=False, cancel_futures=True)
        if batcher is not None:
            await asyncio.to_thread(batcher.stop, STOP_SECONDS)

    @property
    def _reranks_only(self) -> bool:
        return self._loaded is not None and self._loaded.folder.kind == Kind.CROSS_ENCODER

    async def _warm_up(self) -> Answer:
        return await self.embed([WARM_UP], keep=-1)

    def _whole(self) -> Loaded:
        if self._loaded is None or self._batcher is None:
            raise EngineError("The engine is not loaded.")
        return self._loaded

    async def _read(self, read: Callable[[], list[Piece]], characters: int) -> list[Piece]:
        if characters <= INLINE_CHARACTERS:
            return read()
        return await asyncio.get_running_loop().run_in_executor(self._reader, read)

    async def _run(self, pieces: list[Piece]) -> Row:
        if self._batcher is None:
            raise EngineError("The engine is stopping.")
        return await self._batcher.run(pieces)


def _settle(ready: asyncio.Future[Loaded | LoadError], outcome: Loaded | LoadError) -> None:
    if not ready.done():
        ready.set_result(outcome)


_COMPARING = frozenset({"endpoint:rerank", "endpoint:score", "endpoint:tokenize", "max_tokens_per_doc"})


def _capabilities(loaded: Loaded) -> frozenset[str]:
    if loaded.folder.kind == Kind.CROSS_ENCODER:
        return _COMPARING
    names = _COMPARING | {"endpoint:embeddings"}
    return frozenset(names | {"dimensions"} if loaded.folder.matryoshka else names)


def _check_dimensions(loaded: Loaded, dimensions: int | None) -> None:
    allowed = loaded.folder.matryoshka
    if dimensions is None or dimensions == loaded.width:
        return
    if allowed is False:
        raise BadRequest(
            f"This model makes vectors of {loaded.width} numbers and cannot shorten them: "
            "leave 'dimensions' out.",
            param="dimensions",
            code="unsupported_value",
        )
    if allowed is not True and dimensions not in allowed:
        raise BadRequest(
            f"'dimensions' must be one of {', '.join(map(str, sorted({*allowed, loaded.width})))}.",
            param="dimensions",
            code="invalid_value",
        )
    if dimensions > loaded.width:
        raise BadRequest(
            f"'dimensions' must be at most {loaded.width}.", param="dimensions", code="invalid_value"
        )


def _answer(rows: Row, pieces: Sequence[Piece], told: Sequence[Piece]) -> Answer:
    return Answer(
        rows=rows,
        prompt_tokens=sum(len(piece.ids) for piece in pieces),
        truncated=tuple(piece.truncated for piece in told),
    )


def _unit(rows: Row) -> Row:
    lengths: np.ndarray[Any, np.dtype[np.float32]] = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Row = rows / np.maximum(lengths, 1e-12)
    return unit
