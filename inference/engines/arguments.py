"""Engine arguments of a deployment: from the JSON an operator wrote to checked values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from inference.engines.base import LoadError
from inference.protocol import Cause

Arguments = TypeVar("Arguments")

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def read(
    kind: type[Arguments],
    given: Mapping[str, Any],
    *,
    engine: str,
    choices: Mapping[str, tuple[str, ...]],
    least: Mapping[str, int],
) -> Arguments:
    """`given` as the dataclass `kind`, each value one of `choices` or a whole number from `least` on.

    Null means "not given". Raises LoadError(BAD_ARGUMENT) that names the argument.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name, value in given.items():
        if name not in known:
            raise _bad(f"Unknown argument {name!r}. The {engine} engine knows: {', '.join(known)}.")
        if value is None:
            continue
        if name in choices:
            if value not in choices[name]:
                raise _bad(f"Argument {name!r} must be one of {', '.join(choices[name])}.")
        elif isinstance(value, bool) or not isinstance(value, int) or value < least[name]:
            raise _bad(f"Argument {name!r} must be a whole number of at least {least[name]}.")
    return kind(**{name: value for name, value in given.items() if value is not None})


def _bad(detail: str) -> LoadError:
    return LoadError(Cause.BAD_ARGUMENT, detail)
