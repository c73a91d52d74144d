"""OpenAI's objects as clients send them, and what of them is passed on to an engine.

Unknown top-level fields are ignored and not forwarded. `null` means "not given". What would change
the answer is either honoured, or refused by name: `needs` lists the fields that only some engines
honour and that were given a value asking for something.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from openai_api import limits
from openai_api.errors import InvalidRequest
from openai_api.parsing import missing

_Int = Annotated[int, msgspec.Meta(ge=limits.INT64_MIN, le=limits.INT64_MAX)]
_Tokens = Annotated[int, msgspec.Meta(ge=1, le=limits.INT64_MAX)]
_TokenId = Annotated[int, msgspec.Meta(ge=0, le=limits.INT64_MAX)]
_Penalty = Annotated[float, msgspec.Meta(ge=-limits.PENALTY_MAX, le=limits.PENALTY_MAX)]
_StopList = Annotated[list[str], msgspec.Meta(max_length=limits.STOP_STRINGS)]
_ModelName = Annotated[str, msgspec.Meta(max_length=limits.MODEL_NAME_LENGTH)]

NOTHING: frozenset[str] = frozenset()


class Optional:
    """Fields that not every engine honours, each with the values that ask for nothing."""

    def __init__(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        self._neutral = tuple(neutral.items())
        self._values = attrgetter(*neutral)
        self._none_given = (None,) * len(neutral)

    def asked(self, call: Call) -> frozenset[str]:
        values = self._values(call)
        if values == self._none_given:
            return NOTHING
        return frozenset(
            [
                name
                for (name, neutral), value in zip(self._neutral, values, strict=True)
                if value is not None and value not in neutral
            ]
        )


class Call(msgspec.Struct, kw_only=True):
    """What the requests of all endpoints have in common."""

    model: _ModelName | None = None

    def check(self) -> None:
        """Raises InvalidRequest for what the types cannot say."""
        if self.model is None:
            raise missing("model")

    def needs(self) -> frozenset[str]:
        """Fields beyond those that every engine honours, given a value that asks for something."""
        return NOTHING

    def forwarded(self, needs: frozenset[str]) -> bytes:
        """The body for the engine: what it honours of this request, and nothing else."""
        return msgspec.json.encode({"model": self.model})

    @property
    def streamed(self) -> bool:
        return False

    @property
    def shows_usage(self) -> bool:
        """The client of a stream asked for the usage."""
        return False


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Sampled(Call, kw_only=True):
    """What the endpoints that generate text have in common. Absent here, and so ignored: fields that
    change nothing in the answer (`user`, `metadata`, `store`, `service_tier` …) and fields that we do
    not know."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _Tokens | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=limits.TEMPERATURE_MAX)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=limits.TOP_P_MAX)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=limits.N)] | None = None
    stop: str | _StopList | None = None
    seed: _Int | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]],
            msgspec.Meta(max_length=limits.LOGIT_BIAS_ENTRIES),
        ]
        | None
    ) = None
    best_of: _Int | None = None
    echo: bool | None = None
    # The engines' extras.
    top_k: _Int | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] | None = None
    length_penalty: float | None = None
    use_beam_search: bool | None = None
    stop_token_ids: list[_Int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=limits.INT64_MAX)] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: _Int | None = None
    prompt_logprobs: _Int | None = None
    allowed_token_ids: list[_Int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    optional: ClassVar[Optional]

    @property
    def streamed(self) -> bool:
        return bool(self.stream)

    @property
    def shows_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def check(self) -> None:
        Call.check(self)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                param="stream_options",
                code="invalid_value",
            )
        if self.stop is not None:
            _check_stop([self.stop] if isinstance(self.stop, str) else self.stop)

    def needs(self) -> frozenset[str]:
        return self.optional.asked(self)

    def _passed_on(self, needs: frozenset[str]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.top_p is not None:
            body["top_p"] = self.top_p
        if self.stop:
            body["stop"] = self.stop
        for name in needs:
            body[name] = getattr(self, name)
        if self.stream:
            body["stream"] = True
            # Always: what was generated is paid for, whether or not the client wants to see the figure.
            body["stream_options"] = _ALL_USAGE
        return body


_ALL_USAGE = {"include_usage": True, "continuous_usage_stats": True}

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "n": (1,),
    "seed": (),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "best_of": (1,),
}


# -- chat


class ContentPart(msgspec.Struct, omit_defaults=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, omit_defaults=True):
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], msgspec.Meta(max_length=limits.CONTENT_PARTS)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=limits.TOOLS)] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None


class ChatCompletionRequest(Sampled, kw_only=True):
    """`POST /v1/chat/completions`"""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=limits.MESSAGES)] | None = (
        None
    )
    max_completion_tokens: _Tokens | None = None
    modalities: list[str] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    reasoning_effort: str | None = None
    web_search_options: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=limits.TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    function_call: str | dict[str, Any] | None = None
    functions: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=limits.TOOLS)] | None = None
    # The engines' extras.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    optional: ClassVar[Optional] = Optional(
        {
            **_NEUTRAL,
            "modalities": (["text"],),
            "verbosity": ("medium",),
            "reasoning_effort": ("none",),
            "web_search_options": (),
            "response_format": ({"type": "text"},),
            "audio": (),
            "logprobs": (False,),
            "top_logprobs": (0,),
            "tools": ([],),
            "tool_choice": ("none", "auto"),
            "function_call": ("none", "auto"),
            "functions": ([],),
            "echo": (False,),
            "add_generation_prompt": (True,),
            "continue_final_message": (False,),
            "documents": ([],),
            "chat_template": (),
            "chat_template_kwargs": ({},),
        }
    )

    def check(self) -> None:
        Sampled.check(self)
        if self.messages is None:
            raise missing("messages")
        for at, message in enumerate(self.messages):
            _check_message(message, at)
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(
                "'top_logprobs' is only allowed when 'logprobs' is enabled.",
                param="top_logprobs",
                code="invalid_value",
            )
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise InvalidRequest(
                "'tool_choice' is only allowed when 'tools' are specified.",
                param="tool_choice",
                code="invalid_value",
            )

    def forwarded(self, needs: frozenset[str]) -> bytes:
        body = self._passed_on(needs)
        body["messages"] = self.messages
        # The newer name wins; engines all know the older one.
        max_tokens = self.max_completion_tokens or self.max_tokens
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        return msgspec.json.encode(body)


def _check_message(message: ChatMessage, at: int) -> None:
    if message.content is None:
        if message.role != "assistant" or not (message.tool_calls or message.function_call):
            raise missing(f"messages[{at}].content")
    elif not isinstance(message.content, str):
        if not message.content:
            raise InvalidRequest(
                f"Invalid 'messages[{at}].content': empty array. Expected at least one part.",
                param=f"messages[{at}].content",
                code="empty_array",
            )
        for index, part in enumerate(message.content):
            if part.type != "text":
                raise InvalidRequest(
                    f"Invalid value: '{part.type[:100]}'. This model reads text only: "
                    "use content parts of type 'text'.",
                    param=f"messages[{at}].content[{index}].type",
                    code="unsupported_value",
                )
            if part.text is None:
                raise missing(f"messages[{at}].content[{index}].text")
    if message.role == "tool" and message.tool_call_id is None:
        raise missing(f"messages[{at}].tool_call_id")
    for field in ("function_call", "audio"):
        if getattr(message, field) is not None:
            raise InvalidRequest(
                f"'messages[{at}].{field}' is not supported.",
                param=f"messages[{at}].{field}",
                code="unsupported_value",
            )


def _check_stop(stop: list[str]) -> None:
    for text in stop:
        if not text:
            raise InvalidRequest(
                "Invalid 'stop': empty string. Expected at least one character.",
                param="stop",
                code="invalid_value",
            )
        if len(text.encode()) > limits.STOP_STRING_BYTES:
            raise InvalidRequest(
                f"Invalid 'stop': string too long. Expected at most {limits.STOP_STRING_BYTES} bytes.",
                param="stop",
                code="string_above_max_length",
            )


# -- completions

_TokenList = Annotated[list[_TokenId], msgspec.Meta(min_length=1)]


class CompletionRequest(Sampled, kw_only=True):
    """`POST /v1/completions`"""

    prompt: str | Annotated[list[str | _TokenId | _TokenList], msgspec.Meta(min_length=1)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=limits.INT64_MAX)] | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None

    optional: ClassVar[Optional] = Optional(
        {**_NEUTRAL, "logprobs": (), "suffix": ("",), "add_special_tokens": (True,)}
    )

    def check(self) -> None:
        Sampled.check(self)
        if self.prompt is None:
            raise missing("prompt")
        several = _several(self.prompt, "prompt")
        if len(several) > limits.PROMPTS:
            raise _too_many("prompt", limits.PROMPTS)

    def forwarded(self, needs: frozenset[str]) -> bytes:
        body = self._passed_on(needs)
        body["prompt"] = self.prompt
        body["max_tokens"] = COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        if self.echo:
            body["echo"] = True
        return msgspec.json.encode(body)


COMPLETION_TOKENS = 16
"""OpenAI's default for `max_tokens` of this endpoint alone; said to engines, which have others."""


def _several(given: Any, field: str) -> list[str] | list[list[int]]:
    """One text, several, one list of tokens or several: as several. A mixture is refused."""
    if isinstance(given, str):
        return [given]
    kinds = set(map(type, given))
    if kinds == {int}:
        return [given]
    if len(kinds) > 1:
        raise InvalidRequest(
            f"Invalid '{field}': give texts, or token ids, or lists of token ids, not a mixture.",
            param=field,
            code="invalid_type",
        )
    several: list[str] | list[list[int]] = given
    return several


def _too_many(field: str, most: int) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid '{field}': array too long. Expected at most {most} items.",
        param=field,
        code="array_above_max_length",
    )


def _empty(field: str) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid '{field}': empty string. Expected at least one character.",
        param=field,
        code="invalid_value",
    )


# -- embeddings


_Kept = Annotated[int, msgspec.Meta(ge=-1, le=limits.INT64_MAX)]


class EmbeddingRequest(Call, kw_only=True):
    """`POST /v1/embeddings`"""

    input: str | Annotated[list[str | _TokenId | _TokenList], msgspec.Meta(min_length=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=limits.INT64_MAX)] | None = None
    truncate_prompt_tokens: _Kept | None = None
    """Longer inputs are cut to so many tokens, -1: to the model's limit; null: they are refused."""

    def check(self) -> None:
        Call.check(self)
        if self.input is None:
            raise missing("input")
        several = _several(self.input, "input")
        if len(several) > limits.EMBEDDING_INPUTS:
            raise _too_many("input", limits.EMBEDDING_INPUTS)
        if "" in several:
            raise _empty("input")

    def needs(self) -> frozenset[str]:
        return NOTHING if self.dimensions is None else _DIMENSIONS

    def forwarded(self, needs: frozenset[str]) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "input": _several(self.input, "input"),
            "encoding_format": self.encoding_format or "float",
        }
        if needs:
            body["dimensions"] = self.dimensions
        if self.truncate_prompt_tokens is not None:
            body["truncate_prompt_tokens"] = self.truncate_prompt_tokens
        return msgspec.json.encode(body)


_DIMENSIONS = frozenset({"dimensions"})


# -- reranking


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
    truncate_prompt_tokens: _Kept | None = None

    def check(self) -> None:
        Call.check(self)
        if self.query is None:
            raise missing("query")
        if not self.query:
            raise _empty("query")
        if self.documents is None:
            raise missing("documents")

    def forwarded(self, needs: frozenset[str]) -> bytes:
        documents = [one if isinstance(one, str) else one.text for one in self.documents or ()]
        body: dict[str, Any] = {"model": self.model, "query": self.query, "documents": documents}
        if self.top_n is not None:
            body["top_n"] = self.top_n
        if self.return_documents is not None:
            body["return_documents"] = self.return_documents
        if self.truncate_prompt_tokens is not None:
            body["truncate_prompt_tokens"] = self.truncate_prompt_tokens
        return msgspec.json.encode(body)
