"""Engine arguments of a deployment, from the JSON an operator wrote to checked values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inference.engines import arguments
from inference.engines.memory import QUANTIZATIONS
from inference.engines.tool_forms import FORMS

OFFLOADS = ("cpu", "disk")

CHOICES = {
    "device": arguments.DEVICES,
    "dtype": arguments.DTYPES,
    "quantization": QUANTIZATIONS,
    "offload": OFFLOADS,
    "tool_call_parser": tuple(FORMS),
}
LEAST: dict[str, int] = {
    "context_length": 16,
    "kv_cache_bytes": 1,
    "max_batch_tokens": 16,
    "threads": 1,
    "devices": 1,
    "device_memory_bytes": 1,
    "cpu_memory_bytes": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """None: the engine chooses."""

    device: str = "auto"
    """`auto`: cuda, else mps, else cpu."""
    dtype: str = "auto"
    """`auto`: bfloat16 where the device computes in it, else float16 (mps) or float32."""
    quantization: str | None = None
    """`8bit` or `4bit` (nf4), made by bitsandbytes while the weights are read. None: as `dtype` says."""
    devices: int = 1
    """Accelerators that the weights are split over, evenly: the first so many that the worker sees."""
    device_memory_bytes: int | None = None
    """Most bytes of weights on each accelerator."""
    offload: str | None = None
    """Where weights go that the devices have no room for: `cpu`, the machine's memory, or `disk`, which also
    reads from the model's files what that has no room for. Slow. None: nowhere."""
    cpu_memory_bytes: int | None = None
    """Most bytes of weights in the machine's memory, with `offload`."""
    context_length: int | None = None
    """Lowers the model's own limit."""
    kv_cache_bytes: int | None = None
    """Memory for keys and values. None: 1 GiB on cpu, what is free on an accelerator."""
    max_batch_tokens: int | None = None
    """Most tokens in one step: long prompts are cut into pieces of this size."""
    threads: int | None = None
    """Processor threads of one step."""
    tool_call_parser: str | None = None
    """The form that calls of functions have. None: the one that the chat template shows."""


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """Check `given`. Raises LoadError(BAD_ARGUMENT) that names the argument."""
    return arguments.read(Arguments, given, engine="transformers", choices=CHOICES, least=LEAST)
