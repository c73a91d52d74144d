"""OpenAI's older format, text in and text out: several prompts in one request, told apart by their index.

As in `chat`, `usage` is a chunk's last key; it is the sum over the prompts.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from inference.engines.base import BadRequest, Delta, GenerationRequest
from inference.engines.chat import (
    DONE,
    SampledRequest,
    StreamOptions,
    decode,
    extra_of,
    refuse_several,
    sampling_of,
    unsupported,
    usage_of,
    usage_tail,
)

DEFAULT_TOKENS = 16
"""OpenAI's, for this endpoint alone."""

_TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_TokenList = Annotated[list[_TokenId], msgspec.Meta(min_length=1)]


class CompletionRequest(SampledRequest, kw_only=True):
    """The fields this server reads; null means "not given", unknown ones are ignored."""

    prompt: str | Annotated[list[str | _TokenId | _TokenList], msgspec.Meta(min_length=1, max_length=2**20)]
    max_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    echo: bool | None = None
    logprobs: int | None = None
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
    """What the engine is asked, one request for each prompt. Raises BadRequest for what it cannot honour."""
    refuse_several(asked)
    if asked.logprobs is not None:
        raise unsupported("logprobs")
    if asked.suffix:
        raise unsupported("suffix")
    if asked.best_of not in (None, 1):
        raise unsupported("best_of")
    extra = extra_of(asked, capabilities)
    sampling = sampling_of(asked, DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens)
    return [
        GenerationRequest(
            request_id=f"{request_id}.{at}",
            prompt=prompt,
            echo=bool(asked.echo),
            sampling=sampling,
            extra=extra,
        )
        for at, prompt in enumerate(_prompts(asked.prompt))
    ]


def _prompts(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    prompts: list[str | list[int]] = prompt
    return prompts


class Totals:
    """What the prompts of one request have cost together so far."""

    def __init__(self, prompts: int) -> None:
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.unfinished = prompts
        self._last: list[Delta | None] = [None] * prompts

    def take(self, at: int, delta: Delta) -> None:
        last = self._last[at]
        self._last[at] = delta
        self.prompt_tokens += delta.prompt_tokens - (last.prompt_tokens if last else 0)
        self.completion_tokens += delta.completion_tokens - (last.completion_tokens if last else 0)
        self.cached_tokens += delta.cached_tokens - (last.cached_tokens if last else 0)
        self.unfinished -= delta.finish_reason is not None


class TextChunks:
    """The events of one streamed answer."""

    def __init__(self, asked: CompletionRequest, *, request_id: str, model: str, created: int) -> None:
        options = asked.stream_options or StreamOptions()
        self._final_usage = bool(options.include_usage)
        self.shows_every_token = bool(options.continuous_usage_stats)
        self._head = b"data: " + _head(request_id, model, created)
        self._no_usage = b',"usage":null}\n\n' if self._final_usage else b"}\n\n"

    def text(self, at: int, delta: Delta, totals: Totals) -> bytes:
        return (
            self._head
            + b'{"index":%d,"text":' % at
            + msgspec.json.encode(delta.text)
            + b',"logprobs":null,"finish_reason":'
            + msgspec.json.encode(delta.finish_reason)
            + b"}]"
            + (
                usage_tail(totals.prompt_tokens, totals.completion_tokens)
                if self.shows_every_token
                else self._no_usage
            )
        )

    def end(self, totals: Totals) -> bytes:
        """The usage if it was asked for, and the end."""
        if not self._final_usage:
            return DONE
        return self._head + b'],"usage":' + msgspec.json.encode(_usage(totals)) + b"}\n\n" + DONE


def completion(
    *, request_id: str, model: str, created: int, texts: list[str], reasons: list[str], totals: Totals
) -> bytes:
    """The body of an answer that is not streamed."""
    choices = [
        {"index": at, "text": text, "logprobs": None, "finish_reason": reason}
        for at, (text, reason) in enumerate(zip(texts, reasons, strict=True))
    ]
    return (
        _head(request_id, model, created)
        + msgspec.json.encode(choices)[1:]
        + b',"usage":'
        + msgspec.json.encode(_usage(totals))
        + b"}"
    )


def _head(request_id: str, model: str, created: int) -> bytes:
    return (
        b'{"id":'
        + msgspec.json.encode(f"cmpl-{request_id}")
        + b',"object":"text_completion","created":%d,"model":' % created
        + msgspec.json.encode(model)
        + b',"choices":['
    )


def _usage(totals: Totals) -> dict[str, object]:
    return usage_of(totals.prompt_tokens, totals.completion_tokens, totals.cached_tokens)
