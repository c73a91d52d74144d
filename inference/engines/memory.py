"""How much memory a model will take, from its config and the headers of its weights: no torch, no weights
read, milliseconds.

What is counted is what the transformers engine does: every tensor in the data type that it is loaded in,
the linear layers of a quantised model in fewer bits, keys and values of each token of the context.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from inference.sources.check import check_folder, read_object
from inference.sources.headers import BITS, Gguf, Tensor, read_gguf, read_safetensors

MIB = 1024**2

ITEM_BYTES = {"auto": 2, "float32": 4, "bfloat16": 2, "float16": 2}
"""By the engine's argument `dtype`. `auto` is two bytes but on processors that compute only in float32."""

QUANTIZATIONS = ("8bit", "4bit")
"""Values of the engine's argument `quantization`."""

BLOCK = 64
"""Weights of a 4-bit layer that share one scale."""
SCALES = 256
"""Scales that share one scale of their own."""

PROCESS_BYTES = 448 * MIB
"""An engine process before it has loaded anything: Python, torch and transformers. In the machine's memory,
whatever the device is."""
BITSANDBYTES_BYTES = 48 * MIB
"""Of its libraries, likewise."""
STEP_BYTES = 64 * MIB
"""What a step needs beside weights and cache: scores, masks, buffers."""
DEVICE_BYTES = 512 * MIB
"""What a GPU's driver and its libraries keep on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes on the device that the model is on, and what they follow from."""

    weights: int
    cache_per_token: int
    """Keys and values of one token of prompt or answer."""
    cache: int
    overhead: int
    """Beside both, in the machine's memory (cpu) or on the device."""
    parameters: int
    context_length: int | None
    """The model's own limit; None: it does not say."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.overhead

    def tokens_in(self, memory: int) -> int:
        """How many tokens of context fit beside weights and overhead, for all users together."""
        return max(0, memory - self.weights - self.overhead) // max(self.cache_per_token, 1)


def estimate(
    folder: Path,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    kv_cache_bytes: int | None = None,
    tokens: int = 0,
    device: str = "cpu",
) -> Estimate:
    """What the model in `folder` (safetensors, or one GGUF file) takes once loaded.

    The cache is `kv_cache_bytes`, or else that of `tokens` of all requests together. Raises SourceError
    for a folder that `check_folder` refuses.
    """
    gguf = check_folder(folder)
    item = ITEM_BYTES[dtype]
    if gguf is not None:
        header = read_gguf(gguf)
        config, tensors = _config_of(header), header.tensors
    else:
        config = read_object(folder / "config.json")
        tensors = [
            tensor for file in sorted(folder.glob("*.safetensors")) for tensor in read_safetensors(file)
        ]
    per_token = cache_per_token(config, item)
    overhead = STEP_BYTES + (PROCESS_BYTES if device == "cpu" else DEVICE_BYTES)
    if quantization is not None and device == "cpu":
        overhead += BITSANDBYTES_BYTES
    return Estimate(
        weights=weight_bytes(tensors, config, item, quantization),
        cache_per_token=per_token,
        cache=tokens * per_token if kv_cache_bytes is None else kv_cache_bytes,
        overhead=overhead,
        parameters=sum(tensor.elements for tensor in tensors),
        context_length=_first(
            _of_text(config), "max_position_embeddings", "n_positions", "n_ctx", "seq_length"
        ),
    )


# -- weights

_KEPT = (
    "wte",
    "wpe",
    "shared",
    "lm_head",
    "embed_out",
    "output_projection",
    "relative_attention_bias",
    "router",
)
_KEPT_WITHIN = {"wo": ("DenseReluDense",), "gate": ("mlp", "moe")}

_HEAD = re.compile(r"(^|[.])(lm_head|embed_out)[.]weight$")
_GGUF_NOT_LINEAR = frozenset({"token_embd.weight", "output.weight", "position_embd.weight"})


def weight_bytes(
    tensors: Iterable[Tensor], config: Mapping[str, Any], item: int, quantization: str | None
) -> int:
    """Of all weights in memory, `item` bytes an element where nothing else is said."""
    tied = bool(_first(_of_text(config), "tie_word_embeddings")) or bool(config.get("tie_word_embeddings"))
    ready_made = config.get("quantization_config") is not None
    total = 0
    for tensor in tensors:
        if tied and _HEAD.search(tensor.name):
            continue  # the embedding once more
        if ready_made and not _is_float(tensor):
            total += tensor.bytes
        elif quantization is not None and _is_linear(tensor):
            total += _quantized(tensor, quantization)
        elif _is_float(tensor) or tensor.kind not in BITS:
            total += tensor.elements * item
        else:
            total += tensor.bytes
    return total


def _is_float(tensor: Tensor) -> bool:
    return tensor.kind in ("F64", "F32", "F16", "BF16")


def _is_linear(tensor: Tensor) -> bool:
    return (
        len(tensor.shape) == 2
        and tensor.name.endswith(".weight")
        and tensor.name not in _GGUF_NOT_LINEAR
        and not _stays(tensor.name.split(".")[:-1])
    )


def _stays(path: list[str]) -> bool:
    """Matrices that are not quantised: embeddings, norms, the head, whose scores are the answer, what T5
    wants to be exact, and experts, which transformers stacks into tensors of three dimensions."""
    *above, module = path or [""]
    words = module.split("_")
    return (
        "experts" in above
        or "norm" in module
        or "ln" in words[:-1]
        or any(word.startswith("embed") for word in words)
        or any(module == one or module.endswith(f"_{one}") for one in _KEPT)
        or (bool(above) and above[-1] in _KEPT_WITHIN.get(module, ()))
    )


def _quantized(tensor: Tensor, quantization: str) -> int:
    """As bitsandbytes keeps a matrix."""
    elements = tensor.elements
    if quantization == "8bit":
        return elements + 4 * tensor.shape[0]
    blocks = ceil(elements / BLOCK)
    return ceil(elements / 2) + blocks + 4 * ceil(blocks / SCALES)


# -- cache


def cache_per_token(config: Mapping[str, Any], item: int) -> int:
    """Keys and values of all layers for one token, by a model's `config.json`; 0 where it does not say."""
    text = _of_text(config)
    layers = _first(text, "num_decoder_layers", "num_hidden_layers", "n_layer", "num_layers", "n_layers") or 0
    heads = _first(text, "num_attention_heads", "n_head", "num_heads", "n_heads") or 0
    width = _first(text, "hidden_size", "n_embd", "d_model") or 0
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        # What has a state of its own, whatever the length, keeps nothing of a token.
        layers = sum("attention" in str(kind) and "linear" not in str(kind) for kind in kinds)
    if not (layers and heads):
        return 0
    if _first(text, "kv_lora_rank"):
        key = (_first(text, "qk_nope_head_dim") or 0) + (_first(text, "qk_rope_head_dim") or 0)
        return int(layers * heads * (key + (_first(text, "v_head_dim") or key)) * item)
    per_head = _first(text, "head_dim", "d_kv") or width // heads
    of_keys = _first(text, "num_key_value_heads", "num_kv_heads") or (1 if text.get("multi_query") else heads)
    return int(2 * layers * of_keys * per_head * item)


def _of_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a model with several that says how its text is made."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


_LARGEST = 1e12
"""Beyond this a number is no model's: what is computed with it would be none that can be told."""


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of them that is a number: libraries call the same thing by many names."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int | float) and 0 < value < _LARGEST:
            return int(value)
    return None


def _config_of(header: Gguf) -> dict[str, Any]:
    """What a GGUF file says, by the names of `config.json`."""
    kind = header.values.get("general.architecture", "")
    tied = all(tensor.name != "output.weight" for tensor in header.tensors)
    names = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
    }
    said = {name: header.values.get(f"{kind}.{key}") for key, name in names.items()}
    return {**said, "tie_word_embeddings": tied}
