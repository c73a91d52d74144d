"""Engine arguments of a vLLM deployment, from the JSON an operator wrote to checked values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from inference.engines.arguments import impossible, read_typed

_Number = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1024)]
_Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
_Gigabytes = Annotated[float, msgspec.Meta(ge=0, le=65536)]
_Name = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")]
_Adapter = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,47}\Z")]
_Folder = Annotated[str, msgspec.Meta(pattern=r"\A/[^\0\n\r]*\Z", max_length=1000)]

Quantization = Literal[
    "awq",
    "awq_marlin",
    "gptq",
    "gptq_marlin",
    "auto_awq",
    "auto_gptq",
    "compressed-tensors",
    "bitsandbytes",
    "fp8",
    "fbgemm_fp8",
    "fp8_per_tensor",
    "fp8_per_block",
    "fp8_per_channel",
    "int8_per_channel_weight_only",
    "experts_int8",
    "moe_wna16",
    "quark",
    "torchao",
    "inc",
    "modelopt",
    "modelopt_fp4",
    "modelopt_mxfp8",
    "mxfp4",
    "mxfp8",
    "gpt_oss_mxfp4",
]


class Speculation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Tokens guessed cheaply and checked together. `ngram` guesses from the prompt and needs no model; the
    others a draft: a folder on the node, checked as the model's is. `mtp` uses the model's own layers."""

    method: Literal["ngram", "suffix", "draft_model", "eagle", "eagle3", "medusa", "mlp_speculator", "mtp"]
    num_speculative_tokens: Annotated[int, msgspec.Meta(ge=1, le=64)]
    model: _Folder | None = None
    prompt_lookup_min: _Count | None = None
    prompt_lookup_max: _Count | None = None
    draft_tensor_parallel_size: _Count | None = None


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's own names; None: vLLM chooses. Only these: others could load code, open ports or name files."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    max_model_len: _Number | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] | None = None
    tensor_parallel_size: _Count | None = None
    pipeline_parallel_size: _Count | None = None
    data_parallel_size: _Count | None = None
    enable_expert_parallel: bool | None = None
    distributed_executor_backend: Literal["mp", "ray"] | None = None
    gpu_memory_utilization: _Share | None = None
    cpu_offload_gb: _Gigabytes | None = None
    """Of the weights, in the machine's memory instead of the device's."""
    kv_offloading_size: _Gigabytes | None = None
    """Gigabytes of the machine's memory for keys and values that the device has no room for."""
    kv_cache_dtype: _Name | None = None
    kv_cache_memory_bytes: _Number | None = None
    block_size: Literal[1, 8, 16, 32, 64, 128, 256] | None = None
    quantization: Quantization | None = None
    enforce_eager: bool | None = None
    disable_custom_all_reduce: bool | None = None
    async_scheduling: bool | None = None
    enable_prefix_caching: bool | None = None
    enable_chunked_prefill: bool | None = None
    max_num_batched_tokens: _Number | None = None
    limit_mm_per_prompt: (
        dict[Literal["image", "video", "audio"], Annotated[int, msgspec.Meta(ge=0, le=1024)]] | None
    ) = None
    speculative_config: Speculation | None = None
    lora_adapters: Annotated[dict[_Adapter, _Folder], msgspec.Meta(min_length=1, max_length=32)] | None = None
    """Adapters on this model: names, and folders on the node. A route answers as `route:name`. So many, and
    names so long, as find room among a worker's capabilities."""
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] | None = None
    max_loras: _Count | None = None
    """How many of them may be in one batch."""
    max_cpu_loras: _Count | None = None
    tool_call_parser: _Name | None = None
    """How this model writes tool calls; without one, requests with `tools` are refused."""
    reasoning_parser: _Name | None = None
    """How this model marks its reasoning."""
    python_environment: Annotated[str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9_]{0,31}\Z")] | None = None
    """Which of the node's vLLM environments to use; see `command.interpreter`."""

    @property
    def devices(self) -> int:
        """How many accelerators one worker takes."""
        sizes = (self.tensor_parallel_size, self.pipeline_parallel_size, self.data_parallel_size)
        product = 1
        for size in sizes:
            product *= size or 1
        return product


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """Check `given`. Null means "not given". Raises LoadError(BAD_ARGUMENT) that names the argument."""
    read = read_typed(Arguments, given, engine="vllm")
    guessed = read.speculative_config
    if guessed is not None:
        if guessed.method in ("ngram", "suffix", "mtp"):
            if guessed.model is not None:
                raise impossible("speculative_config.model", f"{guessed.method} needs no model")
        elif guessed.model is None:
            raise impossible("speculative_config.model", f"{guessed.method} needs the folder of a draft")
    return read
