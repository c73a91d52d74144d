"""OpenAI's objects as clients send them, in OpenAI's own order, and how bytes become one of them.

Unknown top-level fields are ignored and not forwarded. `null` means "not given". What would change
the answer is either honoured, or refused by name: `ChatCompletionRequest.needs` lists the fields that
only some engines honour and that were given a value asking for something.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec

from openai_api import limits
from openai_api.errors import InvalidRequest

_Int = Annotated[int, msgspec.Meta(ge=limits.INT64_MIN, le=limits.INT64_MAX)]
_Tokens = Annotated[int, msgspec.Meta(ge=1, le=limits.INT64_MAX)]
_Penalty = Annotated[float, msgspec.Meta(ge=-limits.PENALTY_MAX, le=limits.PENALTY_MAX)]
_StopList = Annotated[list[str], msgspec.Meta(max_length=limits.STOP_STRINGS)]


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


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ChatCompletionRequest(msgspec.Struct):
    """`POST /v1/chat/completions`. Absent here, and so ignored: fields that change nothing in the answer
    (`user`, `metadata`, `store`, `service_tier`, `prompt_cache_key` …) and fields that we do not know."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=limits.MESSAGES)] | None = (
        None
    )
    model: Annotated[str, msgspec.Meta(max_length=limits.MODEL_NAME_LENGTH)] | None = None
    modalities: list[str] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    reasoning_effort: str | None = None
    max_completion_tokens: _Tokens | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    web_search_options: dict[str, Any] | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    response_format: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None
    stream: bool | None = None
    stop: str | _StopList | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]],
            msgspec.Meta(max_length=limits.LOGIT_BIAS_ENTRIES),
        ]
        | None
    ) = None
    logprobs: bool | None = None
    max_tokens: _Tokens | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=limits.N)] | None = None
    seed: _Int | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=limits.TEMPERATURE_MAX)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=limits.TOP_P_MAX)] | None = None
    tools: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=limits.TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    function_call: str | dict[str, Any] | None = None
    functions: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=limits.TOOLS)] | None = None
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
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    best_of: _Int | None = None

    def needs(self) -> frozenset[str]:
        """Fields beyond those that every engine honours, given a value that asks for something."""
        return frozenset(
            [
                name
                for name, neutral in _NEUTRAL
                if (value := getattr(self, name)) is not None and value not in neutral
            ]
        )

    def forwarded(self, needs: frozenset[str]) -> bytes:
        """The body for the engine: what it honours of this request, and nothing else."""
        body: dict[str, Any] = {"model": self.model, "messages": self.messages}
        # The newer name wins; engines all know the older one.
        max_tokens = self.max_completion_tokens or self.max_tokens
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
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
        return msgspec.json.encode(body)


_ALL_USAGE = {"include_usage": True, "continuous_usage_stats": True}

_NEUTRAL: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("modalities", (["text"],)),
    ("verbosity", ("medium",)),
    ("reasoning_effort", ("none",)),
    ("frequency_penalty", (0,)),
    ("presence_penalty", (0,)),
    ("web_search_options", ()),
    ("top_logprobs", (0,)),
    ("response_format", ({"type": "text"},)),
    ("audio", ()),
    ("logit_bias", ({},)),
    ("logprobs", (False,)),
    ("n", (1,)),
    ("seed", ()),
    ("tools", ([],)),
    ("tool_choice", ("none", "auto")),
    ("function_call", ("none", "auto")),
    ("functions", ([],)),
    ("top_k", (0, -1)),
    ("min_p", (0,)),
    ("repetition_penalty", (1,)),
    ("length_penalty", (1,)),
    ("use_beam_search", (False,)),
    ("stop_token_ids", ([],)),
    ("include_stop_str_in_output", (False,)),
    ("ignore_eos", (False,)),
    ("min_tokens", (0,)),
    ("skip_special_tokens", (True,)),
    ("spaces_between_special_tokens", (True,)),
    ("truncate_prompt_tokens", ()),
    ("prompt_logprobs", ()),
    ("allowed_token_ids", ()),
    ("bad_words", ([],)),
    ("echo", (False,)),
    ("add_generation_prompt", (True,)),
    ("continue_final_message", (False,)),
    ("documents", ([],)),
    ("chat_template", ()),
    ("chat_template_kwargs", ({},)),
    ("structured_outputs", ()),
    ("guided_json", ()),
    ("guided_regex", ()),
    ("guided_choice", ()),
    ("guided_grammar", ()),
    ("best_of", (1,)),
)
"""Fields that not every engine honours, each with the values that ask for nothing."""

_decode = msgspec.json.Decoder(ChatCompletionRequest).decode
_decode_any = msgspec.json.Decoder().decode

NOT_JSON = (
    "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your "
    "HTTP library correctly. The API expects a JSON payload, but what was sent was not valid JSON.)"
)


def parse_chat(body: bytes) -> ChatCompletionRequest:
    """Read and check a body. Raises InvalidRequest naming the field."""
    try:
        chat = _decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidRequest(NOT_JSON) from None
    except RecursionError:
        raise _too_deep() from None
    _check_depth(body)
    if b"\\u0000" in body:
        _refuse_nul(_decode_any(body), "")
    _check(chat)
    return chat


def _check(chat: ChatCompletionRequest) -> None:
    """What the types cannot say."""
    if chat.model is None:
        raise _missing("model")
    if chat.messages is None:
        raise _missing("messages")
    for at, message in enumerate(chat.messages):
        _check_message(message, at)
    if chat.stream_options is not None and not chat.stream:
        raise InvalidRequest(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
            param="stream_options",
            code="invalid_value",
        )
    if chat.stop is not None:
        _check_stop([chat.stop] if isinstance(chat.stop, str) else chat.stop)
    if chat.top_logprobs and not chat.logprobs:
        raise InvalidRequest(
            "'top_logprobs' is only allowed when 'logprobs' is enabled.",
            param="top_logprobs",
            code="invalid_value",
        )
    if chat.tool_choice not in (None, "none", "auto") and not chat.tools:
        raise InvalidRequest(
            "'tool_choice' is only allowed when 'tools' are specified.",
            param="tool_choice",
            code="invalid_value",
        )


def _check_message(message: ChatMessage, at: int) -> None:
    if message.content is None:
        if message.role != "assistant" or not (message.tool_calls or message.function_call):
            raise _missing(f"messages[{at}].content")
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
                raise _missing(f"messages[{at}].content[{index}].text")
    if message.role == "tool" and message.tool_call_id is None:
        raise _missing(f"messages[{at}].tool_call_id")
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


def unsupported(field: str, model: str) -> InvalidRequest:
    """This model's engines do not honour `field`."""
    return InvalidRequest(
        f"Unsupported value: '{field}' is not supported with the model `{model}`. Leave it out.",
        param=field,
        code="unsupported_value",
    )


def _missing(param: str) -> InvalidRequest:
    return InvalidRequest(
        f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
    )


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"The JSON body is nested deeper than {limits.JSON_DEPTH} levels.")


def _check_depth(body: bytes) -> None:
    """Refuse nesting beyond the bound. `body` is valid JSON. All steps run in C: a body of many small
    brackets costs milliseconds."""
    if body.count(b"[") + body.count(b"{") <= limits.JSON_DEPTH:
        return
    # Without escaped quotes, every second piece between quotes is inside a string.
    outside = b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    brackets = outside.translate(_TO_ROUND, _NO_BRACKETS)
    for _ in range(limits.JSON_DEPTH):
        # One innermost level less each time.
        brackets = brackets.replace(b"()", b"")
        if not brackets:
            return
    raise _too_deep()


_TO_ROUND = bytes.maketrans(b"[]{}", b"()()")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _refuse_nul(value: Any, path: str) -> None:
    """PostgreSQL's text cannot hold NUL, nor does a prompt need one."""
    if isinstance(value, str):
        if "\x00" in value:
            raise InvalidRequest(
                f"Invalid '{path}': the text has a NUL character.", param=path, code="invalid_value"
            )
    elif isinstance(value, list):
        for at, item in enumerate(value):
            _refuse_nul(item, f"{path}[{at}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if "\x00" in key:
                raise InvalidRequest(
                    "A key of the JSON body has a NUL character.", param=path or None, code="invalid_value"
                )
            _refuse_nul(item, f"{path}.{key}" if path else key)


# -- msgspec's sentences, in OpenAI's words

_LOCATED = re.compile(r"^(?P<said>.*?)(?: - at `(?:key in )?\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING_FIELD = re.compile(r"^Object missing required field `(.+)`$")
_WRONG_TYPE = re.compile(r"^Expected `(?P<expected>[^`]+)`, got `(?P<got>[^`]+)`$")
_RANGE = re.compile(
    r"^Expected `(?P<type>int|float|str|array|object)`(?P<length> of length)? "
    r"(?P<sign><=|>=|<|>) (?P<bound>\S+)$"
)
_NAMES = {"str": "a string", "int": "an integer", "float": "a decimal", "bool": "a boolean", "null": "null"}


def _explain(problem: str) -> InvalidRequest:
    located = _LOCATED.match(problem)
    said, path = (located["said"], located["path"] or "") if located else (problem, "")
    if missing := _MISSING_FIELD.match(said):
        return _missing(f"{path}.{missing[1]}" if path else missing[1])
    where = f"'{path}'" if path else "the body"
    if wrong := _WRONG_TYPE.match(said):
        expected = [
            _NAMES.get(name, f"an {name}") for name in wrong["expected"].split(" | ") if name != "null"
        ]
        got = _NAMES.get(wrong["got"], f"an {wrong['got']}")
        return InvalidRequest(
            f"Invalid type for {where}: expected {' or '.join(expected)}, but got {got} instead.",
            param=path or None,
            code="invalid_type",
        )
    if bound := _RANGE.match(said):
        return InvalidRequest(
            f"Invalid {where}: expected {'a length' if bound['length'] else 'a value'} "
            f"{bound['sign']} {bound['bound']}.",
            param=path or None,
            code=_range_code(bound["type"], upper=bound["sign"].startswith("<")),
        )
    if said == "Number out of range":
        return InvalidRequest(
            f"Invalid {where}: the number is out of range.", param=path or None, code="invalid_value"
        )
    return InvalidRequest(
        f"Invalid value for {where}: {said[:200]}.", param=path or None, code="invalid_value"
    )


def _range_code(kind: str, *, upper: bool) -> str:
    match kind:
        case "int":
            return "integer_above_max_value" if upper else "integer_below_min_value"
        case "float":
            return "decimal_above_max_value" if upper else "decimal_below_min_value"
        case "str":
            return "string_above_max_length" if upper else "string_below_min_length"
        case "array":
            return "array_above_max_length" if upper else "empty_array"
        case _:
            return "object_above_max_properties" if upper else "invalid_value"
