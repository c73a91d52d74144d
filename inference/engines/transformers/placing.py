"""Where a model's weights go, and in how many bits: what they are read with, and what became of them."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections import Counter
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from inference.engines.base import LoadError
from inference.engines.transformers.arguments import Arguments
from inference.protocol import Cause

_GIB = 1024**3

_PACKAGES = {
    **{"gptq": ("optimum", "gptqmodel"), "awq": ("gptqmodel",), "aqlm": ("aqlm",), "hqq": ("hqq",)},
    **{"compressed-tensors": ("compressed_tensors",), "auto-round": ("auto_round",), "quark": ("quark",)},
    **{"bitsandbytes": ("bitsandbytes",), "torchao": ("torchao",), "eetq": ("kernels",)},
}
"""What transformers wants for checkpoints that come quantised."""


def options(config: Any, arguments: Arguments, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of `from_pretrained` about bits and places. Raises LoadError for what cannot be."""
    split = arguments.devices > 1 or arguments.offload is not None
    if arguments.devices > 1 and device.type != "cuda":
        raise _bad(f"Argument 'devices' is {arguments.devices}, but the device is {device.type}.")
    if device.type == "cuda" and arguments.devices > torch.cuda.device_count():
        raise _bad(f"Argument 'devices' is {arguments.devices}, but {torch.cuda.device_count()} can be seen.")
    if arguments.device_memory_bytes is not None and device.type == "cpu":
        raise _bad("Argument 'device_memory_bytes' is about accelerators, but the device is cpu.")
    if arguments.cpu_memory_bytes is not None and arguments.offload is None:
        raise _bad("Argument 'cpu_memory_bytes' needs 'offload'.")
    if arguments.offload == "cpu" and device.type == "cpu":
        raise _bad(
            "Argument 'offload' is 'cpu', where the model is already; 'disk' is slower but holds more."
        )
    found: dict[str, Any] = {"device_map": None if device.type == "cpu" else {"": device}}
    if split or arguments.device_memory_bytes is not None:
        found = {"device_map": "balanced", "max_memory": _room(arguments, device)}
    if arguments.quantization is not None:
        found["quantization_config"] = _bits(config, arguments, dtype)
        found["device_map"] = found["device_map"] or {"": "cpu"}
    return found


def _bits(config: Any, arguments: Arguments, dtype: torch.dtype) -> BitsAndBytesConfig:
    if method := quantized_with(config):
        raise _bad(f"Argument 'quantization' is given, but this model comes quantised ({method}).")
    if arguments.offload is not None:
        raise _bad("Argument 'offload' cannot be combined with 'quantization'.")
    # For each layer of each step it would say that it computes in float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if arguments.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _room(arguments: Arguments, device: torch.device) -> dict[int | str, int]:
    """Bytes of weights that each place may have. What has none may have nothing."""
    room: dict[int | str, int] = {}
    if device.type == "cuda":
        for number in range(arguments.devices):
            # A tenth is kept for what a step needs.
            free = torch.cuda.mem_get_info(number)[0] * 9 // 10
            room[number] = min(free, arguments.device_memory_bytes or free)
    elif device.type == "mps":
        room["mps"] = arguments.device_memory_bytes or torch.mps.recommended_max_memory()
    if arguments.offload is not None or device.type == "cpu":
        room["cpu"] = arguments.cpu_memory_bytes or _free_memory()
    return room


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available) * 9 // 10


def quantized_with(config: Any) -> str:
    """The method that a checkpoint says it is quantised with; "" for none."""
    said = getattr(config, "quantization_config", None) or {}
    method = said.get("quant_method", "") if isinstance(said, dict) else getattr(said, "quant_method", "")
    return str(getattr(method, "value", method) or "")


def cannot_read(config: Any, error: Exception, device: torch.device) -> LoadError | None:
    """Why a checkpoint that comes quantised cannot be read here; None when that is not why."""
    method = quantized_with(config)
    text = str(error)
    if not method:
        return None
    says = f"This model is quantised with {method}, which"
    if isinstance(error, ImportError):
        names = [name for name in _PACKAGES.get(method, ()) if not _is_there(name)]
        wanted = f"the package {' and '.join(names)}" if names else f"a package ({text[:100]})"
        return _bad(f"{says} needs {wanted} in the engine's environment.")
    if device.type != "cuda" and ("GPU" in text or "cuda" in text.lower()):
        return _bad(f"{says} needs a GPU; the device here is {device.type}.")
    if "Unknown quantization type" in text:
        return _bad(f"{says} the transformers engine does not know.")
    return None


def _is_there(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def places(model: Any) -> dict[str, int]:
    """Bytes of weights by the place they are at, and so how an accelerated model is split: `cuda:0`, `cpu`,
    or `disk`, where they are read from for each step."""
    found: Counter[str] = Counter()
    for tensor in (*model.parameters(), *model.buffers()):
        place = "disk" if tensor.device.type == "meta" else str(tensor.device)
        found[place] += tensor.numel() * tensor.element_size()
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            found[place] += _scales(state)
    return dict(sorted(found.items()))


def _scales(state: Any) -> int:
    """Of a 4-bit tensor: beside its weights."""
    size = state.absmax.numel() * state.absmax.element_size()
    return int(size + (state.state2.absmax.numel() * 4 if state.nested else 0))


def settle(model: Any) -> None:
    """Give back what reading the weights has left behind, some hundreds of MB."""
    if getattr(model, "is_quantized", False) and model.device.type == "cpu":
        release(model)
    with contextlib.suppress(OSError, AttributeError):  # it is glibc's
        ctypes.CDLL(None).malloc_trim(0)


def release(model: Any) -> None:
    """Let go of the files that weights were read from, once most of them are something else: the few that
    are not lie in the mapped file, and hold the whole of it in memory."""
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter:
            parameter.data = parameter.data.clone()


def is_split(model: Any) -> bool:
    """Whether the weights are not all on the model's own device."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1 or "disk" in places(model)


def first_device(model: Any) -> torch.device:
    """Where a model, split or not, takes its tokens."""
    for place in (getattr(model, "hf_device_map", None) or {}).values():
        if place not in ("cpu", "disk"):
            return torch.device(place)
    return torch.device("cpu") if model.device.type == "meta" else torch.device(model.device)


def check_places(placed: dict[str, int], arguments: Arguments) -> None:
    """Raises LoadError when weights went where nobody let them: there they would be served, at a crawl."""
    allowed = {"cpu": ("cpu", "disk"), "disk": ("disk",)}
    for place, offloads in allowed.items():
        asked = place == "cpu" and (arguments.device == "cpu" or len(placed) == 1)
        if placed.get(place) and arguments.offload not in offloads and not asked:
            raise LoadError(
                Cause.OUT_OF_MEMORY,
                f"The weights do not fit ({shown(placed)}). More 'devices' or 'device_memory_bytes', "
                "a 'quantization', or 'offload' would make room.",
            )


def shown(placed: dict[str, int]) -> str:
    """In a sentence: `cuda:0 1.50 GiB, cpu 0.30 GiB`."""
    return ", ".join(f"{place} {size / _GIB:.2f} GiB" for place, size in placed.items())


def _bad(detail: str) -> LoadError:
    return LoadError(Cause.BAD_ARGUMENT, detail)
