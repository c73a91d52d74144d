"""Engine arguments of a deployment: from the JSON an operator wrote to checked values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import msgspec

from inference.engines.base import LoadError
from inference.protocol import Cause

Arguments = TypeVar("Arguments")
Typed = TypeVar("Typed", bound=msgspec.Struct)

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
    _check_names(given, known, engine)
    for name, value in given.items():
        if value is None:
            continue
        if name in choices:
            if value not in choices[name]:
                raise _bad(f"Argument {name!r} must be one of {', '.join(choices[name])}.")
        elif isinstance(value, bool) or not isinstance(value, int) or value < least[name]:
            raise _bad(f"Argument {name!r} must be a whole number of at least {least[name]}.")
    return kind(**{name: value for name, value in given.items() if value is not None})


def read_typed(kind: type[Typed], given: Mapping[str, Any], *, engine: str) -> Typed:
    """`given` as the struct `kind`, whose annotations say what each value may be. Otherwise as `read`."""
    _check_names(given, kind.__struct_fields__, engine)
    try:
        return msgspec.convert({name: value for name, value in given.items() if value is not None}, kind)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).rpartition(" - at `")
        path = path.removesuffix("`").removeprefix("key` in `").removeprefix("$").removeprefix(".")
        raise impossible(path.partition("[")[0], problem) from None


def impossible(argument: str, problem: str) -> LoadError:
    """A refusal of one argument's value."""
    return _bad(f"Argument {argument!r} is not possible: {problem}.")


def _check_names(given: Mapping[str, Any], known: Sequence[str], engine: str) -> None:
    for name in given:
        if name not in known:
            raise _bad(f"Unknown argument {name[:100]!r}. The {engine} engine knows: {', '.join(known)}.")


def _bad(detail: str) -> LoadError:
    return LoadError(Cause.BAD_ARGUMENT, detail)
