"""From what a request asks of its tokens to a `Choice`: every value checked once more, whoever calls,
because the batching thread must never see a bad one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from inference.engines.base import BadRequest, Sampling, check_token_ids
from inference.engines.transformers.sampling import Choice

LEAST_TEMPERATURE = 0.01
"""Below it, dividing by the temperature overflows, and all that is left is the likeliest token."""
MOST_TEMPERATURE = 100.0
LEAST_REPETITION = 0.01
"""Likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a choice depends on besides its request."""

    size: int
    """Tokens have ids below."""
    eos: frozenset[int]
    """The tokens that end an answer."""
    encode: Callable[[str], list[int]]
    """The ids of a text, without special ones."""

    def of(
        self, sampling: Sampling, *, sample: int = 0, top_logprobs: int | None = None, least_tokens: int = 1
    ) -> Choice:
        """Raises BadRequest that names the field."""
        most = sampling.max_tokens
        if most is not None:
            _whole(most, "max_tokens", least=least_tokens)
        _texts(sampling.stop, "stop")
        temperature = _number(sampling.temperature, "temperature", 0.0, math.inf)
        if temperature > 0:
            temperature = min(max(temperature, LEAST_TEMPERATURE), MOST_TEMPERATURE)
        repetition = _number(sampling.repetition_penalty, "repetition_penalty", 0.0, 10.0)
        if top_logprobs is not None:
            _whole(top_logprobs, "top_logprobs", least=0)
        return Choice(
            temperature=temperature,
            top_p=_number(sampling.top_p, "top_p", 0.0, 1.0),
            top_k=_whole(sampling.top_k, "top_k", least=0, most=2**31 - 1),
            min_p=_number(sampling.min_p, "min_p", 0.0, 1.0),
            presence_penalty=_number(sampling.presence_penalty, "presence_penalty", -2.0, 2.0),
            frequency_penalty=_number(sampling.frequency_penalty, "frequency_penalty", -2.0, 2.0),
            repetition_penalty=max(repetition, LEAST_REPETITION),
            logit_bias=self._bias(sampling.logit_bias),
            allowed=self._allowed(sampling.allowed_token_ids),
            bad_words=self._bad_words(sampling.bad_words),
            min_tokens=_whole(sampling.min_tokens, "min_tokens", least=0),
            ends=tuple(sorted(self.ends(sampling))),
            seed=_seed(sampling.seed, sample),
            top_logprobs=top_logprobs,
        )

    def ends(self, sampling: Sampling) -> frozenset[int]:
        """The tokens that end this answer. Raises BadRequest."""
        self._check_ids(sampling.stop_token_ids, "stop_token_ids")
        return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self.eos)

    def _bias(self, bias: dict[int, float]) -> tuple[tuple[int, float], ...]:
        if not isinstance(bias, dict):
            raise BadRequest("logit_bias must be a value for each of some tokens.", param="logit_bias")
        self._check_ids(tuple(bias), "logit_bias")
        return tuple((token, _number(value, "logit_bias", -100.0, 100.0)) for token, value in bias.items())

    def _allowed(self, allowed: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if allowed is None:
            return None
        self._check_ids(allowed, "allowed_token_ids")
        if not allowed:
            raise BadRequest("allowed_token_ids must not be empty.", param="allowed_token_ids")
        return allowed

    def _bad_words(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """As vLLM has it: a word as it is spelled at the beginning of a text and, where a space makes one
        other token of it, as it is spelled after others."""
        found: list[tuple[int, ...]] = []
        for word in _texts(words, "bad_words"):
            first = tuple(self.encode(word.lstrip()))
            later = tuple(self.encode(" " + word.lstrip()))
            if first:
                found.append(first)
            if later and (not first or (later[0] != first[0] and len(later) == len(first))):
                found.append(later)
        return tuple(found)

    def _check_ids(self, tokens: tuple[int, ...], param: str) -> None:
        if not isinstance(tokens, tuple):
            raise BadRequest(f"{param} must be token ids.", param=param)
        for token in tokens:
            _whole(token, param, least=0)
        check_token_ids(list(tokens), self.size, param=param)


def _seed(seed: int | None, sample: int) -> int | None:
    if seed is None:
        return None
    if not _is_int(seed):
        raise BadRequest("seed must be a whole number.", param="seed")
    return seed + sample


def _texts(texts: tuple[str, ...], name: str) -> tuple[str, ...]:
    if not isinstance(texts, tuple) or not all(isinstance(text, str) and text for text in texts):
        raise BadRequest(f"{name} must be strings that are not empty.", param=name)
    return texts


def _number(value: float, name: str, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRequest(f"{name} must be a finite number.", param=name)
    if not least <= value <= most:
        upto = f"at least {least:g}" if math.isinf(most) else f"between {least:g} and {most:g}"
        raise BadRequest(f"{name} must be {upto}.", param=name)
    return float(value)


def _whole(value: int, name: str, *, least: int, most: int | None = None) -> int:
    if not _is_int(value) or value < least or (most is not None and value > most):
        raise BadRequest(f"{name} must be a whole number of at least {least}.", param=name)
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
