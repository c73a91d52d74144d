"""OpenAI's chat format on an engine's port: a body in, chunks or one answer out.

Chunks are put together from bytes made once per request; only the text is encoded per token. `usage`
is always a chunk's last key, without spaces, so that a gateway can cut it off without parsing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from inference.engines.base import BadRequest, GenerationRequest, Sampling

T = TypeVar("T")

MAX_BODY_BYTES = 32 * 1024 * 1024
"""Gateways hold clients to less; this only keeps a broken gateway from filling the engine's memory."""

DONE = b"data: [DONE]\n\n"

_StopText = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_Tokens = Annotated[int, msgspec.Meta(ge=1)]


class _Part(msgspec.Struct):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, omit_defaults=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[_Part] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Every chunk carries the usage so far."""


class SampledRequest(msgspec.Struct, kw_only=True):
    """What chat and completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=1_000_000)] | None = None
    stop: _StopText | Annotated[list[_StopText], msgspec.Meta(max_length=16)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    seed: int | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=10)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    logit_bias: dict[str, float] | None = None


class ChatRequest(SampledRequest, kw_only=True):
    """The fields this server reads; null means "not given", unknown ones are ignored."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=100_000)]
    max_completion_tokens: _Tokens | None = None
    max_tokens: _Tokens | None = None
    logprobs: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None


_NEUTRAL: dict[str, object] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "min_p": 0,
    "logit_bias": {},
}
"""Fields beyond `Sampling`, and the value that asks for nothing: an engine that does not have the field
among its capabilities refuses any other value, because a silently ignored one is a wrong answer."""


def parse_chat(body: bytes) -> ChatRequest:
    """Read and check a body. Raises BadRequest with the field's name."""
    return decode(body, _decoder.decode)


def decode(body: bytes, decoder: Callable[[bytes], T]) -> T:
    """The body as `decoder` reads it. Raises BadRequest with the field's name."""
    try:
        return decoder(body)
    except msgspec.ValidationError as error:
        raise explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRequest("The body is not valid JSON.") from None


_decoder = msgspec.json.Decoder(ChatRequest)


def to_generation(chat: ChatRequest, request_id: str, capabilities: frozenset[str]) -> GenerationRequest:
    """What the engine is asked. Raises BadRequest for what it cannot honour."""
    _refuse_unsupported(chat)
    return GenerationRequest(
        request_id=request_id,
        messages=[_plain(message, at) for at, message in enumerate(chat.messages)],
        sampling=sampling_of(chat, chat.max_completion_tokens or chat.max_tokens),
        extra=extra_of(chat, capabilities),
    )


def sampling_of(asked: SampledRequest, max_tokens: int | None) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(0, asked.top_k or 0),
        stop=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
        ignore_eos=bool(asked.ignore_eos),
    )


def extra_of(asked: SampledRequest, capabilities: frozenset[str]) -> dict[str, Any]:
    """The fields beyond `Sampling` that ask for something. Raises BadRequest for those that the engine
    does not have."""
    extra: dict[str, Any] = {}
    for field, neutral in _NEUTRAL.items():
        value = getattr(asked, field)
        if value is None or value == neutral:
            continue
        if field not in capabilities:
            raise unsupported(field)
        extra[field] = value
    if asked.seed is not None and "seed" in capabilities:  # elsewhere best effort, as OpenAI describes it
        extra["seed"] = asked.seed
    return extra


def refuse_several(asked: SampledRequest) -> None:
    if asked.n not in (None, 1):
        raise unsupported("n")


def _refuse_unsupported(chat: ChatRequest) -> None:
    refuse_several(chat)
    if chat.logprobs:
        raise unsupported("logprobs")
    if chat.tools and chat.tool_choice != "none":
        raise unsupported("tools")
    if chat.response_format is not None and chat.response_format.get("type", "text") != "text":
        raise unsupported("response_format")


def unsupported(field: str) -> BadRequest:
    return BadRequest(f"This model does not support '{field}'.", param=field, code="unsupported_parameter")


def _plain(message: ChatMessage, at: int) -> dict[str, Any]:
    """The message as chat templates expect it: content is text."""
    plain: dict[str, Any] = {"role": message.role, "content": ""}
    if message.role == "developer":  # OpenAI's newer name of the same thing; templates know the older one
        plain["role"] = "system"
    if isinstance(message.content, str):
        plain["content"] = message.content
    elif message.content is not None:
        for index, part in enumerate(message.content):
            if part.type != "text" or part.text is None:
                raise BadRequest(
                    "This model reads text only: use content parts of type 'text' with a 'text'.",
                    param=f"messages[{at}].content[{index}].type",
                    code="invalid_value",
                )
        plain["content"] = "\n".join(part.text or "" for part in message.content)
    for field in ("name", "tool_call_id", "tool_calls"):
        if (value := getattr(message, field)) is not None:
            plain[field] = value
    return plain


_MISSING = re.compile(r"^Object missing required field `([^`]+)`(?: - at `\$\.?(.*)`)?$")
_LOCATED = re.compile(r"^(.*?)(?: - at `\$\.?(.*)`)?$", re.DOTALL)


def explain(problem: str) -> BadRequest:
    if missing := _MISSING.match(problem):
        field = f"{missing[2]}.{missing[1]}" if missing[2] else missing[1]
        return BadRequest(
            f"Missing required parameter: '{field}'.", param=field, code="missing_required_parameter"
        )
    located = _LOCATED.match(problem)
    said, field = (located[1], located[2]) if located else (problem, None)
    code = "invalid_type" if ", got " in said else "invalid_value"
    return BadRequest(f"Invalid value for '{field or 'body'}': {said[:300]}.", param=field or None, code=code)


class ChunkWriter:
    """The events of one streamed answer."""

    def __init__(self, chat: ChatRequest, *, request_id: str, model: str, created: int) -> None:
        options = chat.stream_options or StreamOptions()
        self._final_usage = bool(options.include_usage)
        self._continuous = bool(options.continuous_usage_stats)
        self._head = (
            b'data: {"id":'
            + msgspec.json.encode(f"chatcmpl-{request_id}")
            + b',"object":"chat.completion.chunk","created":%d,"model":' % created
            + msgspec.json.encode(model)
            + b',"choices":['
        )
        self._delta = self._head + b'{"index":0,"delta":'
        self._text = self._delta + b'{"content":'
        self._no_usage = b',"usage":null}\n\n' if self._final_usage else b"}\n\n"

    @property
    def shows_every_token(self) -> bool:
        """Whether a token without text is sent too, for its usage."""
        return self._continuous

    def role(self, prompt_tokens: int) -> bytes:
        return (
            self._delta
            + b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
            + self._tail(prompt_tokens, 0)
        )

    def text(self, text: str, prompt_tokens: int, completion_tokens: int) -> bytes:
        return (
            self._text
            + msgspec.json.encode(text)
            + b'},"logprobs":null,"finish_reason":null}]'
            + self._tail(prompt_tokens, completion_tokens)
        )

    def finish(self, reason: str, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> bytes:
        """The last chunk of the choice, the usage if it was asked for, and the end."""
        last = (
            self._delta
            + b'{},"logprobs":null,"finish_reason":'
            + msgspec.json.encode(reason)
            + b"}]"
            + self._tail(prompt_tokens, completion_tokens)
        )
        if self._final_usage:
            usage = usage_of(prompt_tokens, completion_tokens, cached_tokens)
            last += self._head + b'],"usage":' + msgspec.json.encode(usage) + b"}\n\n"
        return last + DONE

    def _tail(self, prompt_tokens: int, completion_tokens: int) -> bytes:
        return usage_tail(prompt_tokens, completion_tokens) if self._continuous else self._no_usage


def usage_tail(prompt_tokens: int, completion_tokens: int) -> bytes:
    return b',"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}\n\n' % (
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
    )


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, object]:
    """The usage of a whole answer, streamed or not."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def completion(
    *,
    request_id: str,
    model: str,
    created: int,
    text: str,
    finish_reason: str,
    prompt_tokens: int,
    completion_tokens: int,
    cached_tokens: int,
) -> bytes:
    """The body of an answer that is not streamed."""
    return msgspec.json.encode(
        {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion",
            "created": created,
            "model": model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
                    "logprobs": None,
                    "finish_reason": finish_reason,
                }
            ],
            "usage": usage_of(prompt_tokens, completion_tokens, cached_tokens),
        }
    )


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    """OpenAI's error shape; all four keys, always."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})
