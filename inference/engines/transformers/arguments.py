"""Engine arguments of a deployment, from the JSON an operator wrote to checked values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from inference.engines.base import LoadError
from inference.protocol import Cause

CHOICES: dict[str, tuple[str, ...]] = {
    "device": ("auto", "cpu", "cuda", "mps"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}
LEAST: dict[str, int] = {
    "context_length": 16,
    "kv_cache_bytes": 1,
    "max_batch_tokens": 16,
    "threads": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """None: the engine chooses."""

    device: str = "auto"
    """`auto`: cuda, else mps, else cpu."""
    dtype: str = "auto"
    """`auto`: bfloat16 where the device computes in it, else float16 (mps) or float32."""
    context_length: int | None = None
    """Lowers the model's own limit."""
    kv_cache_bytes: int | None = None
    """Memory for keys and values. None: 1 GiB on cpu, what is free on an accelerator."""
    max_batch_tokens: int | None = None
    """Most tokens in one step: long prompts are cut into pieces of this size."""
    threads: int | None = None
    """Processor threads of one step."""


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """Check `given`. Raises LoadError(BAD_ARGUMENT) that names the argument."""
    known = [field.name for field in fields(Arguments)]
    for name, value in given.items():
        if name not in known:
            raise _bad(f"Unknown argument {name!r}. The transformers engine knows: {', '.join(known)}.")
        if value is None:
            continue
        if name in CHOICES:
            if value not in CHOICES[name]:
                raise _bad(f"Argument {name!r} must be one of {', '.join(CHOICES[name])}.")
        elif isinstance(value, bool) or not isinstance(value, int) or value < LEAST[name]:
            raise _bad(f"Argument {name!r} must be a whole number of at least {LEAST[name]}.")
    return Arguments(**{name: value for name, value in given.items() if value is not None})


def _bad(detail: str) -> LoadError:
    return LoadError(Cause.BAD_ARGUMENT, detail)
