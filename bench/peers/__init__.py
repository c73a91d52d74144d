"""What the same request costs others: FastChat, LiteLLM's proxy, vllm-router, each in its own environment.

`make bench-peers` installs them, in the versions of `requirements-*.txt`, and measures them and us one after
the other, before the same engine on the same machine. One that is not installed is left out, and said so.
They do less for it: none of them keeps accounts here, for which LiteLLM would need a database, and only
LiteLLM looks at a key.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.load import Target, run
from bench.peers.upstream import MODEL, STATUS
from bench.rows import Row
from bench.stage import TOKENS, body, cpu, in_turn, stage
from tests.e2e.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-bench-peers"
START_SECONDS = 120
CONNECTIONS = 8
SLOW_SECONDS = 0.002
"""CPU per plain request."""


@dataclass(frozen=True)
class Running:
    """A peer that answers."""

    url: str
    processes: list[psutil.Process]


@dataclass(frozen=True)
class Figures:
    plain: float
    """CPU seconds per request."""
    token: float
    """CPU seconds per streamed token, by the difference to a plain answer as long."""
    first: float
    """Seconds that it adds to the first token when idle, the median."""


def rows(requests: int) -> list[Row]:
    """`requests`: of us, and of whoever is as quick; of others fewer."""
    found: list[Row] = []
    for name, figures in {"Roundhouse": ours(requests), **theirs(requests)}.items():
        bars = (0.40e-3, 15e-6, 1e-3) if name == "Roundhouse" else (None, None, None)
        found += [
            Row(f"{name}: CPU per plain request", figures.plain, "ms", bars[0]),
            Row(f"{name}: CPU per streamed token", figures.token, "µs", bars[1]),
            Row(f"{name}: added time to first token, p50", figures.first, "ms", bars[2]),
        ]
    return found


def ours(requests: int) -> Figures:
    with stage() as bench:
        bench.deploy(MODEL, arguments={"token_seconds": 0.0})
        bench.load(requests=requests // 4, connections=CONNECTIONS, stream=False)
        _, plain = bench.load(requests=requests, connections=CONNECTIONS, stream=False)
        _, streams = bench.load(requests=requests // 3, connections=CONNECTIONS, stream=True)
        through, direct = bench.first_bytes(rounds=20)
    per_plain = plain / requests
    return Figures(per_plain, (streams / (requests // 3) - per_plain) / TOKENS, through - direct)


def theirs(requests: int) -> dict[str, Figures]:
    found: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="rh-peers-") as folder:
        port = free_port()
        command = [sys.executable, "-m", "bench.peers.upstream", str(port)]
        upstream = f"http://127.0.0.1:{port}"
        with started([command], Path(folder), f"{upstream}/v1/models"):
            for name, start in PEERS.items():
                if not environment(name).exists():
                    print(f"{name} is not installed: `make bench-peers` does it.", flush=True)
                    continue
                with start(upstream, Path(folder)) as peer:
                    found[name] = measured(peer, upstream, requests)
    return found


def measured(peer: Running, upstream: str, requests: int) -> Figures:
    plain = Target(f"{peer.url}/v1", KEY, body(stream=False, model=MODEL))
    stream = Target(f"{peer.url}/v1", KEY, body(stream=True, model=MODEL))

    def spent(target: Target, count: int) -> float:
        before = cpu(*peer.processes)
        tally = asyncio.run(run(target, requests=count, connections=CONNECTIONS))
        if target is stream and tally.events < count * TOKENS:
            raise SystemExit(f"{peer.url} sent {tally.events} events for {count} streams")
        return (cpu(*peer.processes) - before) / count

    if spent(plain, 50) > SLOW_SECONDS:
        requests = max(100, requests // 5)
    per_plain = spent(plain, requests)
    per_token = (spent(stream, requests // 3) - per_plain) / TOKENS
    question = body(stream=True, model=MODEL, tokens=2)
    through, direct = in_turn(
        Target(f"{peer.url}/v1", KEY, question), Target(f"{upstream}/v1", KEY, question), rounds=10
    )
    return Figures(per_plain, per_token, through - direct)


@contextlib.contextmanager
def litellm(upstream: str, folder: Path) -> Iterator[Running]:
    """The proxy with its one key and no database: it keeps no accounts."""
    port = free_port()
    config = {
        "model_list": [
            {
                "model_name": MODEL,
                "litellm_params": {
                    "model": f"openai/{MODEL}",
                    "api_base": f"{upstream}/v1",
                    "api_key": "none",
                },
            }
        ],
        "general_settings": {"master_key": KEY},
        "litellm_settings": {"telemetry": False},
    }
    (folder / "litellm.yaml").write_text(json.dumps(config))  # JSON is YAML
    command = [
        *(str(environment("litellm").parent / "litellm"), "--config", str(folder / "litellm.yaml")),
        *("--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"),
    ]
    url = f"http://127.0.0.1:{port}"
    # Else it fetches a list of prices.
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    with started([command], folder, f"{url}/health/liveliness", offline) as processes:
        yield Running(url, processes)


@contextlib.contextmanager
def vllm_router(upstream: str, folder: Path) -> Iterator[Running]:
    port = free_port()
    command = [
        *(str(environment("vllm-router").parent / "vllm-router"), "--worker-urls", upstream),
        *("--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"),
        *("--prometheus-port", str(free_port()), "--log-level", "warning"),
    ]
    url = f"http://127.0.0.1:{port}"
    with started([command], folder, f"{url}/health") as processes:
        yield Running(url, processes)


@contextlib.contextmanager
def fastchat(upstream: str, folder: Path) -> Iterator[Running]:
    """Controller and API server; the upstream is their worker."""
    python = str(environment("fastchat"))
    ports = free_port(), free_port()
    controller, api = (f"http://127.0.0.1:{port}" for port in ports)
    commands = [
        [python, "-m", "fastchat.serve.controller", "--host", "127.0.0.1", "--port", str(ports[0])],
        [
            *(python, "-m", "fastchat.serve.openai_api_server", "--host", "127.0.0.1"),
            *("--port", str(ports[1]), "--controller-address", controller),
        ],
    ]
    # It writes its log where it stands.
    with started(commands, folder, f"{api}/docs") as processes:
        registration = {"worker_name": upstream, "check_heart_beat": False, "worker_status": STATUS}
        request = urllib.request.Request(
            f"{controller}/register_worker",
            json.dumps(registration).encode(),
            {"Content-Type": "application/json"},
        )
        until(lambda: answers(request), "FastChat's controller takes the worker")
        yield Running(api, processes)


PEERS: dict[str, Callable[[str, Path], contextlib.AbstractContextManager[Running]]] = {
    "fastchat": fastchat,
    "litellm": litellm,
    "vllm-router": vllm_router,
}


def environment(name: str) -> Path:
    """The interpreter of a peer's environment."""
    return ROOT / ".venv-peers" / name / "bin" / "python"


@contextlib.contextmanager
def started(
    commands: list[list[str]], folder: Path, ready_url: str, variables: dict[str, str] | None = None
) -> Iterator[list[psutil.Process]]:
    """Processes that run until the end of the block, with those that they start; they have begun when the
    URL answers."""
    log = folder / "log"
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"} if commands[0][0] == sys.executable else {}
    own = {name: value for name, value in psutil.Process().environ().items() if name != "PYTHONPATH"}
    with log.open("ab") as output:
        children = [
            subprocess.Popen(
                command, cwd=folder, env=own | path | (variables or {}), stdout=output, stderr=output
            )
            for command in commands
        ]
    try:

        def ready() -> bool:
            if any(child.poll() is not None for child in children):
                raise SystemExit(f"{commands} ended:\n{log.read_text(errors='replace')[-3000:]}")
            return answers(urllib.request.Request(ready_url))

        until(ready, f"{ready_url} answers; {log.read_text(errors='replace')[-3000:]}")
        mine = [psutil.Process(child.pid) for child in children]
        yield [*mine, *(one for each in mine for one in each.children(recursive=True))]
    finally:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
                for process in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            child.wait()


def answers(request: urllib.request.Request) -> bool:
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def until(question: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not question():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {START_SECONDS} s: {what}")
        time.sleep(0.1)
