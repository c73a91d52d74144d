"""Engine arguments of an embedding deployment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inference.engines import arguments

CHOICES = {"device": arguments.DEVICES, "dtype": arguments.DTYPES}
LEAST = {"context_length": 8, "max_batch_tokens": 16, "threads": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """None: the engine chooses."""

    device: str = "auto"
    """`auto`: cuda, else mps, else cpu."""
    dtype: str = "auto"
    """`auto`: float32, on every device: vectors of two workers must fit together in one index."""
    context_length: int | None = None
    """Lowers the model's own limit of tokens per input."""
    max_batch_tokens: int | None = None
    """Most tokens in one step, padding counted. None: 512 on cpu, 16384 on an accelerator."""
    threads: int | None = None
    """Processor threads in all; on cpu, two steps run at a time with half of them each."""


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """Check `given`. Raises LoadError(BAD_ARGUMENT) that names the argument."""
    return arguments.read(Arguments, given, engine="embedding", choices=CHOICES, least=LEAST)
