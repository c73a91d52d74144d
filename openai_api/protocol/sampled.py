"""What the endpoints that generate text have in common."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec

from openai_api import limits
from openai_api.errors import InvalidRequest
from openai_api.protocol.call import Call, Int, Optional, Penalty, StopList, Tokens


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Sampled(Call, kw_only=True):
    """What the endpoints that generate text have in common. Absent here, and so ignored: fields that
    change nothing in the answer (`user`, `metadata`, `store`, `service_tier` …) and fields that we do
    not know."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=limits.TEMPERATURE_MAX)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=limits.TOP_P_MAX)] | None = None
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
    best_of: Int | None = None
    echo: bool | None = None
    # The engines' extras.
    top_k: Int | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] | None = None
    length_penalty: float | None = None
    use_beam_search: bool | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=limits.INT64_MAX)] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: Int | None = None
    prompt_logprobs: Int | None = None
    allowed_token_ids: list[Int] | None = None
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
