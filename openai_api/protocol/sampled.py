"""What the endpoints that generate text have in common."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec

from openai_api import limits
from openai_api.errors import InvalidRequest
from openai_api.parsing import invalid
from openai_api.protocol.call import (
    Call,
    Int,
    Kept,
    Optional,
    Penalty,
    Session,
    Size,
    StopList,
    TokenIds,
    Tokens,
)
from openai_api.protocol.structured import GUIDED, KINDS_OF_SOME, check_kind, check_outputs


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Sampled(Call, kw_only=True):
    """What the endpoints that generate text have in common. Absent here, and so not passed on: the fields
    of `IGNORED` and `OWNED`, and those that we do not know."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=limits.TEMPERATURE_MAX)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=limits.TOP_P_MAX)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=limits.N)] | None = None
    stop: str | StopList | None = None
    seed: Int | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]],
            msgspec.Meta(max_length=limits.LOGIT_BIAS_ENTRIES),
        ]
        | None
    ) = None
    best_of: Annotated[int, msgspec.Meta(ge=0, le=limits.N)] | None = None
    echo: bool | None = None
    # The engines' extras.
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=limits.TOP_K_MAX)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=limits.REPETITION_PENALTY_MAX)] | None = None
    length_penalty: (
        Annotated[float, msgspec.Meta(ge=-limits.LENGTH_PENALTY_MAX, le=limits.LENGTH_PENALTY_MAX)] | None
    ) = None
    use_beam_search: bool | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=limits.INT64_MAX)] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Kept | None = None
    truncation_side: Literal["left", "right"] | None = None
    prompt_logprobs: Annotated[int, msgspec.Meta(ge=-1, le=limits.TOP_LOGPROBS)] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[list[str], msgspec.Meta(max_length=limits.BAD_WORDS)] | None = None
    logprob_token_ids: TokenIds | None = None
    thinking_token_budget: Annotated[int, msgspec.Meta(ge=0, le=limits.INT64_MAX)] | None = None
    repetition_detection: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_prompt_text: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    prompt_cache_key: Session | None = None

    optional: ClassVar[Optional]

    @property
    def streamed(self) -> bool:
        return bool(self.stream)

    @property
    def shows_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of one answer; None: what the context leaves."""
        return self.max_tokens

    def size(self, forwarded_bytes: int) -> Size:
        return Size(forwarded_bytes + limits.TEMPLATE_TOKENS, 1, self.n or 1, self.most_tokens)

    def check(self) -> None:
        Call.check(self)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                param="stream_options",
                code="invalid_value",
            )
        if self.stop is not None:
            _check_texts([self.stop] if isinstance(self.stop, str) else self.stop, "stop")
        if self.best_of is not None and self.best_of > (self.n or 1):
            raise InvalidRequest(
                "Unsupported value: 'best_of' above 'n' is not supported.",
                param="best_of",
                code="unsupported_value",
            )
        if asked := self.optional.asked(self):
            self.check_asked(asked)

    def check_asked(self, asked: frozenset[str]) -> None:
        """Raises InvalidRequest for what the types cannot say of the optional fields, those that ask for
        something: a plain request has none."""
        if "logit_bias" in asked:
            _check_bias(self.logit_bias or {})
        if "bad_words" in asked:
            _check_texts(self.bad_words or [], "bad_words")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise invalid("allowed_token_ids", "empty array. Expected at least one token.", "empty_array")
        if "min_tokens" in asked and self.most_tokens is not None:
            least = self.min_tokens or 0
            if least > self.most_tokens:
                raise invalid("min_tokens", f"it is above the {self.most_tokens} tokens that are allowed.")
        if "prompt_logprobs" in asked and self.stream:
            raise invalid("prompt_logprobs", "it is not available when 'stream' is enabled.")
        forms = [name for name in _FORMS if name in asked]
        if len(forms) > 1:
            raise invalid(forms[1], f"it cannot be used together with '{forms[0]}'.")
        if self.structured_outputs is not None:
            check_outputs(self.structured_outputs)
        for name, kind in GUIDED.items():
            if name in asked:
                check_kind(kind, getattr(self, name), name)

    def needs(self) -> frozenset[str]:
        asked = self.optional.asked(self)
        if not asked or _STRUCTURED.isdisjoint(asked):
            return asked
        # Not every engine that has structured outputs has all kinds of them.
        kinds = self._kinds() & KINDS_OF_SOME
        return asked - _GUIDED | {"structured_outputs"} | {f"structured_outputs.{kind}" for kind in kinds}

    def given_as(self, need: str) -> str:
        if need.startswith("structured_outputs") and self.structured_outputs is None:
            return next(name for name in GUIDED if getattr(self, name) is not None)
        return need

    @property
    def session(self) -> str | None:
        return self.prompt_cache_key or None

    @property
    def samples(self) -> int:
        return self.n or 1

    def _kinds(self) -> frozenset[str]:
        """Of structured outputs, by whichever name."""
        given = self.structured_outputs or {}
        guided = {kind for name, kind in GUIDED.items() if getattr(self, name) is not None}
        return frozenset(guided | {kind for kind, value in given.items() if value is not None})

    def _passed_on(self, needs: frozenset[str]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.top_p is not None:
            body["top_p"] = self.top_p
        if self.stop:
            body["stop"] = self.stop
        for name in needs:
            if "." not in name:
                body[name] = getattr(self, name)
        if needs:
            self._reword(body, needs)
        if self.stream:
            body["stream"] = True
            # Always: what was generated is paid for, whether or not the client wants to see the figure.
            body["stream_options"] = _ALL_USAGE
        return body

    def _reword(self, body: dict[str, Any], needs: frozenset[str]) -> None:
        """What engines know under other words."""
        if "structured_outputs" in needs and self.structured_outputs is None:
            kinds = {kind: getattr(self, name) for name, kind in GUIDED.items()}
            body["structured_outputs"] = {kind: given for kind, given in kinds.items() if given is not None}
        if "n" in needs and self.temperature == 0 and not self.use_beam_search:
            # vLLM refuses several answers at 0; see docs/decisions/0010.
            body["temperature"], body["top_k"] = 1.0, 1


_ALL_USAGE = {"include_usage": True, "continuous_usage_stats": True}
_GUIDED = frozenset(GUIDED)
_STRUCTURED = _GUIDED | {"structured_outputs"}
_FORMS = ("response_format", "structured_outputs", *GUIDED)
"""Each says what form the answer has: one of them at a time."""

# Which field goes where. What is in none of the three tables is unknown to us, and ignored as well.

NEUTRAL: dict[str, tuple[Any, ...]] = {
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
    "truncation_side": (),
    "prompt_logprobs": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logprob_token_ids": ([],),
    "thinking_token_budget": (),
    "repetition_detection": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_prompt_text": (False,),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
"""Honoured where the engine announces the field, refused by name elsewhere; with each the values that ask
for nothing. Chat and completions add their own."""

OWNED = frozenset(
    {
        "request_id",
        "priority",
        "cache_salt",
        "kv_transfer_params",
        "ec_transfer_params",
        "vllm_xargs",
        "mm_processor_kwargs",
        "media_io_kwargs",
    }
)
"""Never passed on from a client: they reach into the engine, or into what other clients have there."""

IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "prediction",
        "safety_identifier",
        "prompt_cache_options",
        "prompt_cache_retention",
        "moderation",
        "stream_interval",
        "stream_options.include_obfuscation",
        "stream_options.continuous_usage_stats",
    }
)
"""They change nothing in the answer, or have no meaning here. (`prompt_cache_key` says which requests go
to the same worker.)"""


def _check_texts(texts: list[str], field: str) -> None:
    for text in texts:
        if not text:
            raise invalid(field, "empty string. Expected at least one character.")
        if len(text.encode()) > limits.STOP_STRING_BYTES:
            raise invalid(
                field,
                f"string too long. Expected at most {limits.STOP_STRING_BYTES} bytes.",
                "string_above_max_length",
            )


def _check_bias(bias: dict[str, float]) -> None:
    for token in bias:
        if not (token.isascii() and token.isdigit() and len(token) <= 10) or int(token) > limits.TOKEN_ID_MAX:
            raise invalid("logit_bias", f"'{token[:20]}' is not a token's id.")
