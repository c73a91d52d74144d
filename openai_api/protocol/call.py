"""What the requests of all endpoints have in common: types, bounds, and how fields that only some engines
honour are found."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Annotated, Any, NamedTuple

import msgspec

from openai_api import limits
from openai_api.errors import InvalidRequest
from openai_api.parsing import missing

Int = Annotated[int, msgspec.Meta(ge=limits.INT64_MIN, le=limits.INT64_MAX)]
Tokens = Annotated[int, msgspec.Meta(ge=1, le=limits.INT64_MAX)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=limits.TOKEN_ID_MAX)]
TokenIds = Annotated[list[TokenId], msgspec.Meta(max_length=limits.LISTED_TOKENS)]
Penalty = Annotated[float, msgspec.Meta(ge=-limits.PENALTY_MAX, le=limits.PENALTY_MAX)]
StopList = Annotated[list[str], msgspec.Meta(max_length=limits.STOP_STRINGS)]
Session = Annotated[str, msgspec.Meta(max_length=limits.SESSION_BYTES)]
ModelName = Annotated[str, msgspec.Meta(max_length=limits.MODEL_NAME_LENGTH)]
TokenList = Annotated[list[TokenId], msgspec.Meta(min_length=1)]
Kept = Annotated[int, msgspec.Meta(ge=-1, le=limits.INT64_MAX)]

NOTHING: frozenset[str] = frozenset()
PAIR_TOKENS = 16
"""What an engine may put around two texts that it reads together."""


class Size(NamedTuple):
    """What a request may use at most, as far as can be told without a tokenizer."""

    prompt_tokens: int
    """Never less than the engine counts."""
    prompts: int = 1
    """Each of them is within the model's context."""
    answers: int = 0
    """Texts that are written."""
    most_tokens: int | None = 0
    """Of each answer; None: what the context leaves."""


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

    model: ModelName | None = None

    def check(self) -> None:
        """Raises InvalidRequest for what the types cannot say."""
        if self.model is None:
            raise missing("model")

    def needs(self) -> frozenset[str]:
        """Fields beyond those that every engine honours, given a value that asks for something."""
        return NOTHING

    def given_as(self, need: str) -> str:
        """The client's own name of what it `needs`."""
        return need

    @property
    def session(self) -> str | None:
        """Requests that name the same one build on one another."""
        return None

    @property
    def samples(self) -> int:
        """How many answers to each prompt are asked for."""
        return 1

    def forwarded(self, needs: frozenset[str]) -> bytes:
        """The body for the engine: what it honours of this request, and nothing else."""
        return msgspec.json.encode({"model": self.model})

    def size(self, forwarded_bytes: int) -> Size:
        """What it may use at most; its body for the engine has so many bytes."""
        return Size(forwarded_bytes + limits.TEMPLATE_TOKENS)

    @property
    def streamed(self) -> bool:
        return False

    @property
    def shows_usage(self) -> bool:
        """The client of a stream asked for the usage."""
        return False


def several(given: Any, field: str) -> list[str] | list[list[int]]:
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


def too_many(field: str, most: int) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid '{field}': array too long. Expected at most {most} items.",
        param=field,
        code="array_above_max_length",
    )


def empty_string(field: str) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid '{field}': empty string. Expected at least one character.",
        param=field,
        code="invalid_value",
    )
