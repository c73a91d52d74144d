"""OpenAI's older format, text in and text out: several prompts in one request, told apart by their index.

As in chat, `usage` is a chunk's last key; it is the sum over the choices.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from inference.engines.base import BadRequest, Delta, Detail, GenerationRequest
from inference.engines.chat import (
    DONE,
    MOST_TOP_LOGPROBS,
    SampledRequest,
    StreamOptions,
    TokenId,
    asked_of,
    decode,
    refuse_unsupported,
    samples_of,
    sampling_of,
    structured_of,
)
from inference.engines.chat_answers import stopped_by
from inference.engines.logprobs import of_text
from inference.engines.usage import Totals

DEFAULT_TOKENS = 16
"""OpenAI's, for this endpoint alone."""

_TokenList = Annotated[list[TokenId], msgspec.Meta(min_length=1)]


class CompletionRequest(SampledRequest, kw_only=True):
    """The fields this server reads; null means "not given", unknown ones are ignored."""

    prompt: str | Annotated[list[str | TokenId | _TokenList], msgspec.Meta(min_length=1, max_length=2**20)]
    max_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    suffix: str | None = None
    best_of: int | None = None


_decoder = msgspec.json.Decoder(CompletionRequest)


def parse_completion(body: bytes) -> CompletionRequest:
    """Read and check a body. Raises BadRequest with the field's name."""
    asked = decode(body, _decoder.decode)
    kinds = {type(one) for one in asked.prompt} if isinstance(asked.prompt, list) else {str}
    if len(kinds) > 1:
        raise BadRequest(
            "'prompt' must be a text, several, a list of token ids, or several of those: not a mixture.",
            param="prompt",
            code="invalid_type",
        )
    return asked


def to_generations(
    asked: CompletionRequest, request_id: str, capabilities: frozenset[str]
) -> list[GenerationRequest]:
    """What the engine is asked, one request for each choice, a prompt's samples one after the other. Raises
    BadRequest for what it cannot honour."""
    refuse_unsupported(
        capabilities,
        logprobs=asked.logprobs is not None,
        suffix=asked.suffix,
        best_of=asked.best_of not in (None, asked.samples),
        **asked_of(asked),
    )
    sampling = sampling_of(asked, DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens)
    structured = structured_of(asked)
    wanted: list[GenerationRequest] = []
    for at, prompt in enumerate(_prompts(asked.prompt)):
        one = GenerationRequest(
            request_id=f"{request_id}.{at}",
            prompt=prompt,
            echo=bool(asked.echo),
            sampling=sampling,
            top_logprobs=asked.logprobs,
            token_ids=bool(asked.return_token_ids),
            prompt_logprobs=asked.prompt_logprobs,
            begun=tuple(asked.continue_token_ids or ()),
            structured=structured,
        )
        wanted += samples_of(one, asked.samples)
    return wanted


def _prompts(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    prompts: list[str | list[int]] = prompt
    return prompts


class TextChunks:
    """The events of one streamed answer."""

    def __init__(
        self, asked: CompletionRequest, totals: Totals, *, request_id: str, model: str, created: int
    ) -> None:
        options = asked.stream_options or StreamOptions()
        self._final_usage = bool(options.include_usage)
        self._continuous = bool(options.continuous_usage_stats)
        self._logprobs = asked.logprobs is not None
        self._token_ids = bool(asked.return_token_ids)
        self._totals = totals
        self._offsets = [0] * totals.unfinished
        self._head = b"data: " + _head(request_id, model, created)
        self._no_usage = b',"usage":null}\n\n' if self._final_usage else b"}\n\n"

    def step(self, at: int, delta: Delta) -> bytes:
        """What one more delta adds, counted; the last one adds the end."""
        totals = self._totals
        totals.take(at, delta)
        if not delta.text and delta.finish_reason is None and not self._continuous:
            return b""
        event = (
            self._head
            + b'{"index":%d,"text":' % at
            + msgspec.json.encode(delta.text)
            + (_NO_LOGPROBS if delta.detail is None else self._detail(at, delta, delta.detail))
            + b',"finish_reason":'
            + msgspec.json.encode(delta.finish_reason)
            + stopped_by(delta.stop)
            + b"}]"
            + (totals.tail() if self._continuous else self._no_usage)
        )
        return event if totals.unfinished else event + self._end()

    def _detail(self, at: int, delta: Delta, detail: Detail) -> bytes:
        offset = self._offsets[at]
        self._offsets[at] += sum(len(token.text) for token in detail.tokens)
        logprobs = of_text(detail.tokens, offset) if self._logprobs else None
        said = b',"logprobs":' + msgspec.json.encode(logprobs)
        if self._token_ids:
            said += b',"token_ids":' + msgspec.json.encode(_ids_of(delta, detail))
            if detail.prompt_token_ids is not None:
                said += b',"prompt_token_ids":' + msgspec.json.encode(detail.prompt_token_ids)
        return said

    def _end(self) -> bytes:
        """The usage if it was asked for, and the end."""
        if not self._final_usage:
            return DONE
        return self._head + b'],"usage":' + msgspec.json.encode(self._totals.usage()) + b"}\n\n" + DONE


class WholeTexts:
    """One answer that is not streamed."""

    def __init__(
        self, asked: CompletionRequest, totals: Totals, *, request_id: str, model: str, created: int
    ) -> None:
        self._logprobs = asked.logprobs is not None
        self._token_ids = bool(asked.return_token_ids)
        self._totals = totals
        self._head = _head(request_id, model, created)
        self._deltas: list[list[Delta]] = [[] for _ in range(totals.unfinished)]

    def step(self, at: int, delta: Delta) -> None:
        self._totals.take(at, delta)
        self._deltas[at].append(delta)

    def body(self) -> bytes:
        choices = [self._choice(at, deltas) for at, deltas in enumerate(self._deltas)]
        return (
            self._head
            + msgspec.json.encode(choices)[1:]
            + b',"usage":'
            + msgspec.json.encode(self._totals.usage())
            + b"}"
        )

    def _choice(self, at: int, deltas: list[Delta]) -> dict[str, Any]:
        told = [(delta, delta.detail) for delta in deltas if delta.detail is not None]
        choice: dict[str, Any] = {
            "index": at,
            "text": "".join(delta.text for delta in deltas),
            "logprobs": None,
            "finish_reason": deltas[-1].finish_reason,
        }
        if deltas[-1].stop is not None:
            choice["stop_reason"] = deltas[-1].stop
        if self._logprobs:
            choice["logprobs"] = of_text([token for _, detail in told for token in detail.tokens], 0)
        scored = next((detail.prompt_logprobs for _, detail in told if detail.prompt_logprobs), None)
        if scored is not None:
            choice["prompt_logprobs"] = scored
        if self._token_ids:
            choice["token_ids"] = [id_ for delta, detail in told for id_ in _ids_of(delta, detail)]
            choice["prompt_token_ids"] = next(
                (detail.prompt_token_ids for _, detail in told if detail.prompt_token_ids is not None), None
            )
        return choice


_NO_LOGPROBS = b',"logprobs":null'


def _ids_of(delta: Delta, detail: Detail) -> list[int]:
    """Of what was generated: the echo of a prompt is not."""
    return [token.id for token in detail.tokens] if delta.completion_tokens else []


def _head(request_id: str, model: str, created: int) -> bytes:
    return (
        b'{"id":'
        + msgspec.json.encode(f"cmpl-{request_id}")
        + b',"object":"text_completion","created":%d,"model":' % created
        + msgspec.json.encode(model)
        + b',"choices":['
    )
