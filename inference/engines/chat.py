"""OpenAI's chat format on an engine's port: a body in, what the engine is asked out. `chat_answers` is the
way back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec

from inference.engines.base import BadRequest, GenerationRequest, Sampling, Structured, Template
from inference.engines.structured import ResponseFormat, StructuredOutputs, of_format, of_outputs, of_some
from inference.engines.tools import Tool, tools_of

T = TypeVar("T")

MAX_BODY_BYTES = 32 * 1024 * 1024
"""Gateways hold clients to less; this only keeps a broken gateway from filling the engine's memory."""

DONE = b"data: [DONE]\n\n"
MOST_TOP_LOGPROBS = 20

_StopText = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_Tokens = Annotated[int, msgspec.Meta(ge=1)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_TokenIds = Annotated[list[TokenId], msgspec.Meta(max_length=1024)]
_Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]


class _Part(msgspec.Struct):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, omit_defaults=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[_Part] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


TemplateValues = Annotated[dict[str, str | int | float | bool | None], msgspec.Meta(max_length=1024)]


class Templated(Protocol):
    """What chat and tokenization alike tell the template."""

    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None


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
    logit_bias: Annotated[dict[TokenId, _Bias], msgspec.Meta(max_length=1024)] | None = None
    stop_token_ids: _TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    bad_words: Annotated[list[_StopText], msgspec.Meta(max_length=128)] | None = None
    allowed_token_ids: _TokenIds | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    continue_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=2**20)] | None = None
    """The answer's first tokens, which were told already: it goes on after them. For gateways."""

    @property
    def samples(self) -> int:
        return self.n or 1


class ChatRequest(SampledRequest, kw_only=True):
    """The fields this server reads; null means "not given", unknown ones are ignored."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=100_000)]
    max_completion_tokens: _Tokens | None = None
    max_tokens: _Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], msgspec.Meta(max_length=1024)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateValues | None = None


_NEUTRAL: dict[str, object] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "min_p": 0,
    "logit_bias": {},
    "stop_token_ids": [],
    "include_stop_str_in_output": False,
    "min_tokens": 0,
    "bad_words": [],
    "allowed_token_ids": None,
}
"""Fields of `Sampling` that only some engines have, and the value that asks for nothing. Others refuse any
other value, because a silently ignored one is a wrong answer. `seed` is not among them: elsewhere it is
best effort, as OpenAI describes it."""


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


def to_generations(
    chat: ChatRequest, request_id: str, capabilities: frozenset[str]
) -> list[GenerationRequest]:
    """What the engine is asked, one request for each choice. Raises BadRequest for what it cannot honour."""
    if chat.top_logprobs and not chat.logprobs:
        raise BadRequest(
            "'top_logprobs' is only allowed when 'logprobs' is enabled.",
            param="top_logprobs",
            code="invalid_value",
        )
    tools = tools_of(chat.tools, chat.tool_choice, chat.parallel_tool_calls)
    structured = structured_of(
        chat, None if chat.response_format is None else of_format(chat.response_format)
    )
    refuse_unsupported(
        capabilities,
        logprobs=chat.logprobs,
        tools=tools,
        response_format=chat.response_format is not None and chat.response_format.type != "text",
        reasoning_effort=chat.reasoning_effort not in (None, "none"),
        add_generation_prompt=chat.add_generation_prompt is False,
        **template_fields(chat),
        **asked_of(chat),
    )
    wanted = GenerationRequest(
        request_id=request_id,
        messages=plain_messages(chat.messages),
        template=template_of(chat),
        sampling=sampling_of(chat, chat.max_completion_tokens or chat.max_tokens),
        top_logprobs=chat.top_logprobs or 0 if chat.logprobs else None,
        token_ids=bool(chat.return_token_ids),
        prompt_logprobs=chat.prompt_logprobs,
        begun=tuple(chat.continue_token_ids or ()),
        tools=tools,
        structured=structured,
        reasoning_effort=chat.reasoning_effort,
    )
    return samples_of(wanted, chat.samples)


def samples_of(wanted: GenerationRequest, samples: int) -> list[GenerationRequest]:
    """The same request so many times, each with an id of its own."""
    if samples == 1:
        return [wanted]
    return [
        replace(wanted, request_id=f"{wanted.request_id}.{sample}", sample=sample)
        for sample in range(samples)
    ]


def structured_of(asked: SampledRequest, by_format: Structured | None = None) -> Structured | None:
    """The form that `structured_outputs` wants, or `by_format`. Raises BadRequest for both."""
    structured = None if asked.structured_outputs is None else of_outputs(asked.structured_outputs)
    if structured is not None and by_format is not None:
        raise BadRequest(
            "Use either 'structured_outputs' or 'response_format', not both.",
            param="structured_outputs",
            code="invalid_value",
        )
    return structured or by_format


def asked_of(asked: SampledRequest) -> dict[str, object]:
    """What chat and completions alike can ask for that only some engines have."""
    return {
        **{name: getattr(asked, name) not in (None, neutral) for name, neutral in _NEUTRAL.items()},
        "n": asked.samples > 1,
        "structured_outputs": structured_of(asked),
        **of_some(asked.structured_outputs),
        "return_token_ids": asked.return_token_ids,
        "prompt_logprobs": asked.prompt_logprobs is not None,
        "continue_token_ids": asked.continue_token_ids,
    }


def template_fields(asked: Templated) -> dict[str, object]:
    """What both can ask of the template that only some engines honour."""
    return {
        "continue_final_message": asked.continue_final_message,
        "chat_template_kwargs": asked.chat_template_kwargs,
    }


def template_of(asked: Templated) -> Template:
    """Raises BadRequest for both an open message and a new one after it."""
    continued = bool(asked.continue_final_message)
    if continued and asked.add_generation_prompt:
        raise BadRequest(
            "'continue_final_message' cannot be used together with 'add_generation_prompt'.",
            param="continue_final_message",
            code="invalid_value",
        )
    return Template(
        generation_prompt=not continued and asked.add_generation_prompt is not False,
        continued=continued,
        values=asked.chat_template_kwargs or {},
    )


def refuse_unsupported(capabilities: frozenset[str], **asked: object) -> None:
    """Raises BadRequest for the first field that asks for something and is no capability."""
    for field, wanted in asked.items():
        if wanted and field not in capabilities:
            raise unsupported(field)


def sampling_of(asked: SampledRequest, max_tokens: int | None) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(0, asked.top_k or 0),
        min_p=asked.min_p or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        repetition_penalty=asked.repetition_penalty or 1.0,
        logit_bias=asked.logit_bias or {},
        seed=asked.seed,
        stop=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
        include_stop=bool(asked.include_stop_str_in_output),
        stop_token_ids=tuple(asked.stop_token_ids or ()),
        ignore_eos=bool(asked.ignore_eos),
        min_tokens=asked.min_tokens or 0,
        bad_words=tuple(asked.bad_words or ()),
        allowed_token_ids=None if asked.allowed_token_ids is None else tuple(asked.allowed_token_ids),
    )


def unsupported(field: str) -> BadRequest:
    return BadRequest(f"This model does not support '{field}'.", param=field, code="unsupported_parameter")


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """As chat templates expect them. Raises BadRequest for parts that are no text."""
    return [_plain(message, at) for at, message in enumerate(messages)]


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
_LOCATED = re.compile(r"^(.*?)(?: - at (?:`key` in )?`\$\.?(.*)`)?$", re.DOTALL)


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


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    """OpenAI's error shape; all four keys, always."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})
