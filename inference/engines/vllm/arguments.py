"""Engine arguments of a vLLM deployment, from the JSON an operator wrote to checked values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from inference.engines.base import LoadError
from inference.protocol import Cause

_Number = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
_Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
_Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's own names; None: vLLM chooses. Only these: others could load code, open ports or name files."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    max_model_len: _Number | None = None
    tensor_parallel_size: _Number | None = None
    pipeline_parallel_size: _Number | None = None
    distributed_executor_backend: Literal["mp", "ray"] | None = None
    gpu_memory_utilization: _Share | None = None
    kv_cache_dtype: _Name | None = None
    kv_cache_memory_bytes: _Number | None = None
    quantization: _Name | None = None
    enforce_eager: bool | None = None
    enable_prefix_caching: bool | None = None
    max_num_batched_tokens: _Number | None = None
    tool_call_parser: _Name | None = None
    """How this model writes tool calls; without one, requests with `tools` are refused."""
    reasoning_parser: _Name | None = None
    """How this model marks its reasoning."""


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """Check `given`. Null means "not given". Raises LoadError(BAD_ARGUMENT) that names the argument."""
    known = Arguments.__struct_fields__
    for name in given:
        if name not in known:
            raise LoadError(
                Cause.BAD_ARGUMENT,
                f"Unknown argument {name[:100]!r}. The vllm engine knows: {', '.join(known)}.",
            )
    try:
        return msgspec.convert(dict(given), Arguments)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).rpartition(" - at `$.")
        raise LoadError(
            Cause.BAD_ARGUMENT, f"Argument {path.removesuffix('`')!r} is not possible: {problem}."
        ) from None
