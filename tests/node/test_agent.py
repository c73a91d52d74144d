"""The node's agent against a gateway in this process, a Redis of its own, and real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
import pytest
from aiohttp import web
from celery import Celery

from inference.agent import processes
from inference.agent.command import JoinError, ensure_joined
from inference.agent.identity import Identity, read_identity, write_identity
from inference.agent.loop import Agent
from inference.agent.processes import Workers, birth_of, clean_environment, log_tail, stop_all
from inference.protocol import (
    Assignment,
    Cause,
    CopyPhase,
    CopyReport,
    JoinReply,
    JoinRequest,
    ModelSpec,
    NodeOrders,
    NodeReport,
    ProcessReport,
    UnwantedCopy,
    Wish,
    WorkerPhase,
)
from inference.sources import parse_source
from inference.sources.cache import write_manifest
from inference.sources.prepare import slot_of
from inference.worker.spec import ProcessState

SECRET = "s3cret-of-the-node"
PACKAGE = f"package:tiny-weights==1.0#sha256={'5' * 64}"
ROOT = Path(__file__).resolve().parents[2]

# Stands in for `python -m inference.worker` where a test needs a behaviour that a well worker
# does not have. What it does is named by the assignment's `arguments`.
STAND_IN = r"""
import json, os, pathlib, signal, subprocess, sys, time
spec = json.load(open(sys.argv[1]))
folder = pathlib.Path(spec["folder"])
arguments = spec["assignment"].get("arguments", {})
(folder / "environment").write_text(json.dumps(dict(os.environ)))
signals = 0
def terminated(*_):
    global signals
    signals += 1
    (folder / "signals").write_text(str(signals))
signal.signal(signal.SIGTERM, terminated)
if arguments.get("child"):
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (folder / "child").write_text(str(child.pid))
print("a line of the log", flush=True)
(folder / "started").touch()
if "exit" in arguments:
    sys.exit(arguments["exit"])
while signals < arguments.get("ends_after", 1):
    time.sleep(0.02)
(folder / "end.json").write_text(json.dumps(
    {"worker_id": 0, "epoch": 0, "running": False, "cause": "stopped", "detail": "Told to.", "exit_code": 0}
))
"""

# Stands in for `python -m inference.sources`: the source text says what happens.
SOURCES = r"""
import argparse, json, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("--model-id", "--model", "--source", "--cache"):
    parser.add_argument(name)
a = parser.parse_args()
runs = pathlib.Path(a.cache) / "runs"
with runs.open("a") as file:
    file.write(a.source + "\n")
attempts = runs.read_text().count(a.source + "\n")
def say(**line):
    print(json.dumps({"model_id": int(a.model_id), **line}), flush=True)
say(phase="fetching", progress={"step": "download", "done": 1, "total": 2})
if a.source == "/broken" and attempts == 1:
    say(phase="failed", cause="checksum", detail="The file is not the pinned one.")
    sys.exit(1)
if a.source == "/silent":
    sys.exit(7)
while a.source == "/slow" and not (pathlib.Path(a.cache) / "go").exists():
    time.sleep(0.02)
say(phase="ready", size_bytes=5, sha256="ab", path=a.cache)
"""


class Gateway:
    """`/fleet/join` and `/fleet/node`, as the agent knows them."""

    def __init__(self) -> None:
        self.url = ""
        self.orders = NodeOrders()
        self.reports: list[NodeReport] = []
        self.joins: list[tuple[str, JoinRequest]] = []
        self.status = 200
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/fleet/join", self._join)
        app.router.add_post("/fleet/node", self._node)
        app.router.add_post("/fleet/worker", self._worker)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        port = int(self.url.rpartition(":")[2]) if self.url else 0
        site = web.TCPSite(self._runner, "127.0.0.1", port, reuse_address=True)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def order(self, *assignments: Assignment) -> None:
        self.orders = NodeOrders(assignments=list(assignments))

    def latest(self, worker_id: int, epoch: int = 1) -> ProcessReport | None:
        """What the newest report that names this worker says of it."""
        for report in reversed(self.reports):
            for process in report.processes:
                if (process.worker_id, process.epoch) == (worker_id, epoch):
                    return process
        return None

    def ends(self, worker_id: int, epoch: int = 1) -> list[ProcessReport]:
        return [
            process
            for report in self.reports
            for process in report.processes
            if (process.worker_id, process.epoch, process.running) == (worker_id, epoch, False)
        ]

    def running_pid(self, worker_id: int, epoch: int = 1) -> int | None:
        latest = self.latest(worker_id, epoch)
        return latest.pid if latest is not None and latest.running else None

    async def _join(self, request: web.Request) -> web.Response:
        token = request.headers["authorization"].removeprefix("Bearer ")
        self.joins.append((token, msgspec.json.decode(await request.read(), type=JoinRequest)))
        if token != "good":
            body = {
                "error": {"message": "This join token is used up.", "type": "x", "param": None, "code": "x"}
            }
            return web.json_response(body, status=401)
        return _json(JoinReply(node_id=7, secret=SECRET, broker_url="redis://:pw@127.0.0.1:1/0"))

    async def _node(self, request: web.Request) -> web.Response:
        assert request.headers["authorization"] == f"Bearer 7.{SECRET}"
        report = msgspec.json.decode(await request.read(), type=NodeReport)
        if self.status != 200:
            return web.json_response({"error": {"message": "no"}}, status=self.status)
        self.reports.append(report)
        return _json(self.orders)

    async def _worker(self, request: web.Request) -> web.Response:
        return web.json_response({"order": "continue"})


def _json(message: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(message), content_type="application/json")


def assignment(worker_id: int = 1, epoch: int = 1, **changes: Any) -> Assignment:
    values: dict[str, Any] = {
        "worker_id": worker_id,
        "epoch": epoch,
        "name": f"sim-{worker_id}",
        "wish": Wish.RUN,
        "engine": "simulated",
        "model": ModelSpec(id=1, name="tiny", source=""),
        "slots": 2,
        "secret": "w0rker-secret",
        "served_name": "tiny",
        "drain_seconds": 5.0,
    }
    return Assignment(**(values | changes))


async def until(true: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.02)
    return value


def processes_with(*arguments: str) -> list[psutil.Process]:
    """Live processes that have all of these among their arguments."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if set(arguments) <= set(process.cmdline()):
                found.append(process)
    return found


def ready(folder: Path) -> ProcessState | None:
    """The state of a real worker, once it is ready."""
    try:
        state = msgspec.json.decode((folder / "state.json").read_bytes(), type=ProcessState)
    except FileNotFoundError:
        return None
    return state if state.phase is WorkerPhase.READY else None


async def answers(state: ProcessState) -> bool:
    headers = {"authorization": "Bearer w0rker-secret"}
    async with aiohttp.ClientSession() as session, session.get(f"{state.url}/load", headers=headers) as reply:
        return reply.status == 200


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    await gateway.start()
    yield gateway
    await gateway.stop()


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    """A data folder; what still runs in it at the end is killed."""
    folder = tmp_path / "data"
    yield folder
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(folder) in process.environ().get(processes.MARK, ""):
                process.kill()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


class Redis:
    """A redis-server of the test's own, on a socket whose path is short enough."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rh-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._folder}/s?db=3"
        self.celery_url = f"redis+socket://{self._folder}/s?virtual_host=3"

    def start(self) -> None:
        self._process = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", str(self._folder / "s"), "--save", ""],
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
        )

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)


@pytest.fixture
def redis() -> Iterator[Redis]:
    server = Redis()
    server.start()
    yield server
    server.remove()


def identity(gateway: Gateway, broker_url: str | None = None) -> Identity:
    return Identity(
        url=gateway.url, node_id=7, name="n1", address="127.0.0.1", secret=SECRET, broker_url=broker_url
    )


Start = Callable[[], asyncio.Task[None]]


@pytest.fixture
async def start(gateway: Gateway, data: Path, cache: Path) -> AsyncIterator[Start]:
    """Starts an agent in this process, with the stand-ins."""
    running: list[asyncio.Task[None]] = []

    def start_agent() -> asyncio.Task[None]:
        agent = Agent(
            identity(gateway),
            data=data,
            cache=cache,
            worker_command=(sys.executable, "-c", STAND_IN),
            sources_command=(sys.executable, "-c", SOURCES),
            beat_seconds=0.2,
        )
        running.append(asyncio.create_task(agent.run()))
        return running[-1]

    yield start_agent
    for task in running:
        await end(task)


async def end(agent: asyncio.Task[None]) -> None:
    agent.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await agent


class AgentProcess:
    """`python -m inference.agent`, with real workers."""

    def __init__(self, data: Path, cache: Path) -> None:
        self.log = data / "agent.log"
        with open(self.log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "inference.agent", "--data", str(data), "--cache", str(cache)],
                cwd=ROOT,
                stderr=output,
                env=clean_environment(),
            )
        self.pid = self._process.pid

    def end(self, number: int = signal.SIGTERM) -> int:
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self._process.wait(timeout=10)


StartProcess = Callable[..., AgentProcess]


@pytest.fixture
def start_process(gateway: Gateway, data: Path, cache: Path) -> Iterator[StartProcess]:
    started: list[AgentProcess] = []

    def start_agent(broker_url: str | None = None) -> AgentProcess:
        write_identity(data, identity(gateway, broker_url))
        started.append(AgentProcess(data, cache))
        return started[-1]

    yield start_agent
    for agent in started:
        agent.end()


def test_the_agent_runs_without_django_and_without_torch() -> None:
    code = """
import sys
for name in ("django", "rest_framework", "channels", "torch", "transformers", "registry", "config"):
    sys.modules[name] = None
import inference.agent.__main__, inference.agent.app, inference.agent.command
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=clean_environment(), check=True)


# -- launching


async def test_an_ordered_worker_is_started_once_however_often_it_is_ordered(
    gateway: Gateway, start: Start, data: Path
) -> None:
    gateway.order(assignment(), assignment(), assignment(2))
    start()
    pid = await until(lambda: gateway.running_pid(1))
    beats = len(gateway.reports)
    await until(lambda: len(gateway.reports) >= beats + 2)
    assert gateway.running_pid(1) == pid
    assert sorted(p.worker_id for p in gateway.reports[-1].processes) == [1, 2]
    assert sorted(folder.name for folder in (data / "node" / "workers").iterdir()) == ["1-1", "2-1"]
    report = gateway.reports[-1]
    assert report.agent_pid == os.getpid()
    assert report.cores > 0
    assert report.memory_bytes > report.memory_free_bytes > 0


async def test_a_worker_gets_its_spec_privately_and_nothing_of_the_control_plane(
    gateway: Gateway, start: Start, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    withheld = ("DJANGO_SETTINGS_MODULE", "DATABASE_URL", "REDIS_URL", "ROUNDHOUSE_SECRET_KEY", "PGPASSWORD")
    for name in withheld:
        monkeypatch.setenv(name, "canary")
    gateway.order(assignment())
    start()
    folder = data / "node" / "workers" / "1-1"
    await until((folder / "started").exists)
    assert "canary" not in (folder / "environment").read_text()
    spec = msgspec.json.decode((folder / "spec.json").read_bytes())
    assert spec["gateway_url"] == gateway.url
    assert spec["assignment"]["secret"] == "w0rker-secret"
    assert (folder / "spec.json").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o077 == 0


async def test_a_command_that_is_not_there_is_reported_and_the_agent_goes_on(
    gateway: Gateway, data: Path, cache: Path
) -> None:
    gateway.order(assignment())
    agent = Agent(
        identity(gateway), data=data, cache=cache, worker_command=("/no/such/program",), beat_seconds=0.2
    )
    task = asyncio.create_task(agent.run())
    (ended,) = await until(lambda: gateway.ends(1))
    assert ended.cause is Cause.CRASHED
    assert ended.detail == "The worker could not be started: No such file or directory."
    await next_beat(gateway)
    await end(task)


# -- ends


async def test_a_killed_worker_is_reported_within_a_second_and_once(gateway: Gateway, start: Start) -> None:
    gateway.order(assignment())
    start()
    pid = await until(lambda: gateway.running_pid(1))
    os.kill(pid, signal.SIGKILL)
    gateway.order()
    (ended,) = await until(lambda: gateway.ends(1), seconds=1.0)
    assert (ended.cause, ended.exit_code, ended.pid) == (Cause.KILLED, -9, pid)
    assert "SIGKILL" in ended.detail
    assert not psutil.pid_exists(pid)  # reaped
    beats = len(gateway.reports)
    await until(lambda: len(gateway.reports) >= beats + 2)
    assert len(gateway.ends(1)) == 1


async def test_a_worker_that_fails_is_reported_with_its_exit_code_and_log(
    gateway: Gateway, start: Start
) -> None:
    gateway.order(assignment(arguments={"exit": 3}))
    start()
    ended = (await until(lambda: gateway.ends(1)))[0]
    assert (ended.cause, ended.exit_code) == (Cause.CRASHED, 3)
    assert ended.log_tail == ["a line of the log"]


async def test_an_ended_epoch_is_not_started_again_but_told_again(
    gateway: Gateway, start: Start, data: Path
) -> None:
    gateway.order(assignment(arguments={"exit": 3}))
    start()
    await until(lambda: len(gateway.ends(1)) >= 3)
    gateway.order(assignment(epoch=2))
    await until(lambda: gateway.running_pid(1, epoch=2))
    assert sorted(folder.name for folder in (data / "node" / "workers").iterdir()) == ["1-1", "1-2"]


async def test_an_end_is_told_until_the_gateway_has_taken_it(gateway: Gateway, start: Start) -> None:
    gateway.order(assignment())
    start()
    pid = await until(lambda: gateway.running_pid(1))
    gateway.order()
    await gateway.stop()
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not psutil.pid_exists(pid))
    await gateway.start()
    (ended,) = await until(lambda: gateway.ends(1))
    assert ended.cause is Cause.KILLED


async def test_the_children_of_a_killed_worker_do_not_outlive_it(
    gateway: Gateway, start: Start, data: Path
) -> None:
    gateway.order(assignment(arguments={"child": True}))
    start()
    pid = await until(lambda: gateway.running_pid(1))
    folder = data / "node" / "workers" / "1-1"
    await until((folder / "started").exists)
    child = int((folder / "child").read_text())
    assert birth_of(child)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: birth_of(child) is None, seconds=2.0)


# -- stopping


async def test_a_drained_worker_gets_one_signal_and_the_time_it_needs(
    gateway: Gateway, start: Start, data: Path
) -> None:
    gateway.order(assignment(arguments={"ends_after": 2}))
    start()
    pid = await until(lambda: gateway.running_pid(1))
    folder = data / "node" / "workers" / "1-1"
    await until((folder / "started").exists)
    gateway.order(assignment(wish=Wish.DRAIN, arguments={"ends_after": 2}))
    await until((folder / "signals").exists)
    beats = len(gateway.reports)
    await until(lambda: len(gateway.reports) >= beats + 2)
    assert (folder / "signals").read_text() == "1"
    assert gateway.running_pid(1) == pid
    gateway.order(assignment(wish=Wish.STOP, arguments={"ends_after": 2}))
    ended = (await until(lambda: gateway.ends(1)))[0]
    assert (folder / "signals").read_text() == "2"
    assert (ended.cause, ended.detail, ended.exit_code) == (Cause.STOPPED, "Told to.", 0)


async def test_a_worker_that_does_not_stop_is_killed(
    gateway: Gateway, start: Start, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.3)
    gateway.order(assignment(arguments={"ends_after": 99, "child": True}))
    start()
    folder = data / "node" / "workers" / "1-1"
    await until((folder / "started").exists)
    gateway.order(assignment(wish=Wish.STOP, arguments={"ends_after": 99, "child": True}))
    ended = (await until(lambda: gateway.ends(1)))[0]
    assert (folder / "signals").read_text() == "2"
    assert (ended.cause, ended.exit_code) == (Cause.STOPPED, -9)
    assert birth_of(int((folder / "child").read_text())) is None


async def test_a_worker_that_is_not_ordered_any_more_is_stopped(gateway: Gateway, start: Start) -> None:
    gateway.order(assignment(), assignment(2))
    start()
    await until(lambda: gateway.running_pid(1) and gateway.running_pid(2))
    gateway.order(assignment(2))
    await until(lambda: gateway.ends(1))
    assert gateway.running_pid(2)


async def test_a_worker_stopped_before_it_was_started_counts_as_stopped(
    gateway: Gateway, start: Start
) -> None:
    gateway.order(assignment(wish=Wish.STOP))
    start()
    ended = (await until(lambda: gateway.ends(1)))[0]
    assert ended.cause is Cause.STOPPED


async def test_stop_all_returns_when_every_worker_is_gone(gateway: Gateway, start: Start, data: Path) -> None:
    gateway.order(assignment(), assignment(2, arguments={"ends_after": 2}))
    agent = start()
    pids = [await until(lambda n=n: gateway.running_pid(n)) for n in (1, 2)]
    for name in ("1-1", "2-1"):
        await until((data / "node" / "workers" / name / "started").exists)
    await end(agent)
    await asyncio.to_thread(stop_all, data, 0.5)
    assert [birth_of(pid) for pid in pids] == [None, None]
    start()
    await until(lambda: gateway.ends(1) and gateway.ends(2))
    assert gateway.ends(1)[0].cause is gateway.ends(2)[0].cause is Cause.STOPPED


# -- adoption


async def test_a_worker_outlives_its_killed_agent_and_is_adopted_by_the_next(
    gateway: Gateway, start_process: StartProcess, data: Path
) -> None:
    gateway.order(assignment())
    first = start_process()
    pid = await until(lambda: gateway.running_pid(1))
    state = await until(lambda: ready(data / "node" / "workers" / "1-1"))
    first.end(signal.SIGKILL)
    assert await answers(state)
    del gateway.reports[:]
    second = start_process()
    await until(lambda: gateway.reports)
    assert gateway.reports[0].agent_pid == second.pid
    assert gateway.running_pid(1) == pid
    assert await answers(state)
    # The new agent is not the parent: it still sees the end at once, and leaves no engine behind.
    os.kill(pid, signal.SIGKILL)
    gateway.order()
    (ended,) = await until(lambda: gateway.ends(1), seconds=1.0)
    assert (ended.cause, ended.pid) == (Cause.KILLED, pid)
    assert birth_of(state.engine_pid) is None


async def test_a_stopped_worker_and_its_engine_end_in_order(
    gateway: Gateway, start_process: StartProcess, data: Path
) -> None:
    gateway.order(assignment(), assignment(2))
    start_process()
    folders = [data / "node" / "workers" / name for name in ("1-1", "2-1")]
    states = [await until(lambda folder=folder: ready(folder)) for folder in folders]
    gateway.order(assignment(wish=Wish.STOP), assignment(2, wish=Wish.DRAIN))
    ends = [(await until(lambda n=n: gateway.ends(n)))[0] for n in (1, 2)]
    assert [end.cause for end in ends] == [Cause.STOPPED, Cause.STOPPED]
    assert [birth_of(state.engine_pid) for state in states] == [None, None]


async def test_an_engine_that_fails_to_load_is_reported_with_the_workers_own_words(
    gateway: Gateway, start_process: StartProcess
) -> None:
    gateway.order(assignment(arguments={"fail_load": "out_of_memory"}))
    start_process()
    ended = (await until(lambda: gateway.ends(1)))[0]
    assert ended.cause is Cause.OUT_OF_MEMORY
    assert ended.detail


async def test_sigterm_ends_the_agent_and_leaves_its_workers(
    gateway: Gateway, start_process: StartProcess
) -> None:
    gateway.order(assignment())
    agent = start_process()
    pid = await until(lambda: gateway.running_pid(1))
    assert agent.end() == 0
    assert birth_of(pid)


async def test_an_adopted_worker_can_be_stopped(gateway: Gateway, start: Start) -> None:
    gateway.order(assignment())
    agent = start()
    pid = await until(lambda: gateway.running_pid(1))
    await end(agent)
    gateway.order(assignment(wish=Wish.STOP))
    start()
    await until(lambda: gateway.ends(1))
    assert birth_of(pid) is None


async def test_a_worker_that_ended_unseen_is_reported_once(
    gateway: Gateway, start: Start, data: Path
) -> None:
    gateway.order(assignment(), assignment(2))
    agent = start()
    silent, told = [await until(lambda n=n: gateway.running_pid(n)) for n in (1, 2)]
    await until((data / "node" / "workers" / "2-1" / "started").exists)
    await end(agent)
    os.kill(silent, signal.SIGKILL)
    os.kill(told, signal.SIGTERM)
    await until(lambda: birth_of(silent) is None and birth_of(told) is None)
    gateway.order()
    again = start()
    await until(lambda: gateway.ends(1) and gateway.ends(2))
    assert gateway.ends(1)[0].cause is Cause.VANISHED
    assert gateway.ends(2)[0].cause is Cause.STOPPED
    await end(again)
    beats = len(gateway.reports)
    start()
    await until(lambda: len(gateway.reports) > beats)
    assert [len(gateway.ends(1)), len(gateway.ends(2))] == [1, 1]


def test_another_process_with_the_same_pid_is_not_adopted(data: Path) -> None:
    folder = data / "node" / "workers" / "4-2"
    folder.mkdir(parents=True)
    (folder / "process.json").write_text(f'{{"pid": {os.getpid()}, "birth": "another boot:1"}}')
    workers = Workers(data)
    workers.adopt()
    assert not workers.running
    (report,) = workers.reports()
    assert (report.worker_id, report.epoch, report.cause) == (4, 2, Cause.VANISHED)


def test_a_worker_whose_agent_died_before_noting_it_is_found(data: Path) -> None:
    command = (sys.executable, "-c", STAND_IN)
    first = Workers(data, command=command)
    first.adopt()
    first.launch(assignment(), model_path=None, gateway_url="http://127.0.0.1:1", listen_host="127.0.0.1")
    first.leave()
    (data / "node" / "workers" / "1-1" / "process.json").unlink()
    second = Workers(data, command=command)
    second.adopt()
    assert list(second.running) == [(1, 1)]


def test_only_the_newest_ended_workers_keep_their_folders(data: Path) -> None:
    workers = Workers(data)
    workers.adopt()
    for number in range(1, 31):
        workers.refuse((number, 1), Cause.FETCH, "Out of reach.")
        os.utime(data / "node" / "workers" / f"{number}-1" / "report.json", (number, number))
    workers.prune(keep=[])
    assert len(workers.reports()) == 30
    workers.accepted(workers.reports())
    workers.prune(keep=[(1, 1)])
    kept = {int(folder.name.partition("-")[0]) for folder in (data / "node" / "workers").iterdir()}
    assert kept == {1, *range(11, 31)}


def test_the_log_tail_is_the_engines_last_lines(tmp_path: Path) -> None:
    (tmp_path / "worker.log").write_text("supervisor\n")
    (tmp_path / "engine.log").write_text("")
    assert log_tail(tmp_path) == ["supervisor"]
    (tmp_path / "engine.log").write_text("\n".join(f"line {n} " + "x" * 5000 for n in range(100)))
    tail = log_tail(tmp_path)
    assert tail[-1].startswith("line 99")
    assert max(map(len, tail)) == 500


# -- copies


def copies_of(gateway: Gateway) -> list[CopyReport]:
    return gateway.reports[-1].copies if gateway.reports else []


async def test_a_model_is_made_ready_once_before_its_workers_start(
    gateway: Gateway, start: Start, data: Path, cache: Path
) -> None:
    model = ModelSpec(id=5, name="real", source="/slow")
    gateway.order(*(assignment(n, engine="transformers", model=model) for n in (1, 2)))
    start()
    fetching = await until(lambda: [copy for copy in copies_of(gateway) if copy.progress])
    assert (fetching[0].model_id, fetching[0].phase) == (5, CopyPhase.FETCHING)
    assert not gateway.reports[-1].processes
    (cache / "go").touch()
    await until(lambda: gateway.running_pid(1) and gateway.running_pid(2))
    assert (cache / "runs").read_text() == "/slow\n"
    (ready,) = copies_of(gateway)
    assert (ready.phase, ready.size_bytes) == (CopyPhase.READY, 5)
    assert str(cache) not in msgspec.json.encode(gateway.reports[-1]).decode()
    spec = msgspec.json.decode((data / "node" / "workers" / "1-1" / "spec.json").read_bytes())
    assert spec["model_path"] == str(cache)


async def test_a_failed_copy_fails_the_worker_and_a_new_epoch_tries_again(
    gateway: Gateway, start: Start
) -> None:
    model = ModelSpec(id=5, name="real", source="/broken")
    gateway.order(assignment(engine="transformers", model=model))
    start()
    ended = (await until(lambda: gateway.ends(1)))[0]
    assert (ended.cause, ended.detail) == (Cause.CHECKSUM, "The file is not the pinned one.")
    assert copies_of(gateway)[0].phase is CopyPhase.FAILED
    gateway.order(assignment(epoch=2, engine="transformers", model=model))
    await until(lambda: gateway.running_pid(1, epoch=2))


async def test_a_copy_that_ends_without_a_word_is_a_failure(gateway: Gateway, start: Start) -> None:
    model = ModelSpec(id=5, name="real", source="/silent")
    gateway.order(assignment(engine="transformers", model=model))
    start()
    ended = (await until(lambda: gateway.ends(1)))[0]
    assert (ended.cause, ended.detail) == (Cause.FETCH, "The fetching ended with exit code 7.")


async def test_a_copy_that_nobody_wants_any_more_is_ended(
    gateway: Gateway, start: Start, cache: Path
) -> None:
    model = ModelSpec(id=5, name="real", source="/slow")
    gateway.order(assignment(engine="transformers", model=model))
    start()

    def fetchers() -> list[psutil.Process]:
        return processes_with("/slow")

    await until(fetchers)
    gateway.order()
    await until(lambda: not fetchers())
    await until(lambda: not copies_of(gateway))


def fetched(cache: Path, name: str, source: str) -> Path:
    """A prepared copy of 7 bytes, and a download that was interrupted."""
    place = slot_of(name, parse_source(source), cache)  # type: ignore[arg-type]
    place.path.mkdir(parents=True)
    place.partial.mkdir()
    (place.path / "config.json").write_text("{a: 1}\n")
    write_manifest(place.path, key=place.key, source=source, sha256="")
    return place.path


async def test_an_unwanted_copy_is_deleted_from_the_cache_and_nothing_else(
    gateway: Gateway, start: Start, cache: Path, tmp_path: Path
) -> None:
    gone, kept = (fetched(cache, name, PACKAGE) for name in ("tiny", "other"))
    given = tmp_path / "given"
    given.mkdir()
    hostile = [PACKAGE, str(given), f"{cache}/models", "package:../..==1#sha256=" + "0" * 64, "", "/"]
    unwanted = [UnwantedCopy(name="tiny", source=source) for source in hostile]
    unwanted += [UnwantedCopy(name=name, source=PACKAGE) for name in ("../given", "never-there")]
    gateway.orders = NodeOrders(unwanted=unwanted)
    start()
    await until(lambda: gateway.reports and len(gateway.reports[-1].deleted) == len(unwanted))
    told = {(copy.name, copy.source): copy.freed_bytes for copy in gateway.reports[-1].deleted}
    assert told.pop(("tiny", PACKAGE)) == 7
    assert set(told.values()) == {0}
    assert not gone.exists()
    left = {path for path in (cache / "models").iterdir() if path.suffix != ".lock"}
    assert left == {kept, kept.with_name(f".{kept.name}.part")}
    assert given.is_dir()
    assert (kept / "config.json").is_file()
    gateway.orders = NodeOrders()
    await until(lambda: not gateway.reports[-1].deleted)


async def test_a_copy_that_a_worker_here_is_to_load_stays_until_it_is_not(
    gateway: Gateway, start: Start, cache: Path
) -> None:
    path = fetched(cache, "tiny", PACKAGE)
    used = assignment(engine="transformers", model=ModelSpec(id=5, name="tiny", source=PACKAGE))
    unwanted = [UnwantedCopy(name="tiny", source=PACKAGE)]
    gateway.orders = NodeOrders(assignments=[used], unwanted=unwanted)
    start()
    await until(lambda: gateway.running_pid(1))
    beats = len(gateway.reports)
    await until(lambda: len(gateway.reports) > beats + 2)
    assert path.is_dir()
    gateway.orders = NodeOrders(unwanted=unwanted)
    await until(lambda: not path.exists())


async def test_a_copy_that_somebody_prepares_is_deleted_afterwards(
    gateway: Gateway, start: Start, cache: Path
) -> None:
    path = fetched(cache, "tiny", PACKAGE)
    gateway.orders = NodeOrders(unwanted=[UnwantedCopy(name="tiny", source=PACKAGE)])
    with slot_of("tiny", parse_source(PACKAGE), cache).locked():  # type: ignore[arg-type]
        start()
        await until(lambda: len(gateway.reports) > 3)
        assert path.is_dir()
        assert not any(report.deleted for report in gateway.reports)
    await until(lambda: not path.exists())


# -- the gateway and the broker away


async def test_trouble_with_the_gateway_is_logged_once_and_stops_nothing(
    gateway: Gateway, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    gateway.order(assignment())
    start()
    pid = await until(lambda: gateway.running_pid(1))
    gateway.status = 503
    await until(lambda: "does not answer" in caplog.text)
    beats = len(gateway.reports)
    gateway.status = 200
    await until(lambda: len(gateway.reports) > beats)
    assert gateway.running_pid(1) == pid
    await until(lambda: "answers again" in caplog.text)
    assert caplog.text.count("does not answer") == 1


async def test_an_unknown_node_says_what_to_do_and_keeps_its_workers(
    gateway: Gateway, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.order(assignment())
    start()
    pid = await until(lambda: gateway.running_pid(1))
    gateway.status = 401
    await until(lambda: "does not know this node any more" in caplog.text)
    assert birth_of(pid)
    assert SECRET not in caplog.text


def control_app(redis: Redis) -> Celery:
    return Celery("control", broker=redis.celery_url, set_as_current=False)


def nudge(app: Celery, generation: int) -> None:
    """As the control plane does it."""
    app.send_task("inference.agent.nudge", args=[generation], queue="node.n1", ignore_result=True, expires=30)


async def nudged(app: Celery, gateway: Gateway) -> None:
    """Wait until one nudge, sent just after a beat, brings the next one long before its time."""
    deadline = time.monotonic() + 60
    while True:
        await next_beat(gateway)
        nudge(app, 1)
        with contextlib.suppress(AssertionError):
            return await next_beat(gateway, seconds=1)
        assert time.monotonic() < deadline, "no nudge was heard"


async def next_beat(gateway: Gateway, seconds: float = 30) -> None:
    beats = len(gateway.reports)
    await until(lambda: len(gateway.reports) > beats, seconds)


async def test_a_nudge_is_answered_at_once_also_after_redis_was_away(
    gateway: Gateway, start_process: StartProcess, redis: Redis, data: Path
) -> None:
    gateway.order(assignment())
    agent = start_process(redis.url)
    pid = await until(lambda: gateway.running_pid(1))
    with control_app(redis) as app:
        await nudged(app, gateway)
    redis.stop()
    beats = len(gateway.reports)
    await until(lambda: len(gateway.reports) >= beats + 2)
    assert gateway.running_pid(1) == pid
    redis.start()
    with control_app(redis) as app:
        await nudged(app, gateway)
    assert agent.end() == 0
    assert processes_with("inference.agent.app", str(data)) == []


async def test_an_agent_starts_and_goes_on_without_its_redis(
    gateway: Gateway, start_process: StartProcess
) -> None:
    gateway.order(assignment())
    agent = start_process("redis://:pa55word@127.0.0.1:1/0")
    await until(lambda: gateway.running_pid(1))
    await until(lambda: "Cannot connect to redis" in agent.log.read_text())
    await next_beat(gateway)
    assert agent.log.read_text().count("Cannot connect to redis") == 1
    assert "pa55word" not in agent.log.read_text()


async def test_a_message_that_is_no_nudge_does_no_harm(
    gateway: Gateway, start_process: StartProcess, redis: Redis
) -> None:
    start_process(redis.url)
    with control_app(redis) as app:
        await nudged(app, gateway)
        send = partial(app.send_task, queue="node.n1", ignore_result=True)
        send("inference.agent.nudge", args=["x; rm"])
        send("inference.agent.nudge", args=[])
        send("os.system", args=["true"])
        app.conf.accept_content = ["pickle"]
        send("inference.agent.nudge", args=[3], serializer="pickle")
        await nudged(app, gateway)


async def test_the_listener_ends_with_a_killed_agent(
    gateway: Gateway, start_process: StartProcess, redis: Redis, data: Path
) -> None:
    agent = start_process(redis.url)
    with control_app(redis) as app:
        # One that still begins does not look after its agent yet.
        await nudged(app, gateway)
    agent.end(signal.SIGKILL)
    await until(lambda: not processes_with("inference.agent.app", str(data)), seconds=3.0)


async def test_a_killed_listener_is_started_again(
    gateway: Gateway, start_process: StartProcess, redis: Redis, data: Path
) -> None:
    start_process(redis.url)
    (first,) = await until(lambda: processes_with("inference.agent.app", str(data)))
    first.kill()
    await until(lambda: {p.pid for p in processes_with("inference.agent.app", str(data))} - {first.pid})


# -- joining


async def test_joining_stores_a_private_identity_and_needs_no_token_again(
    gateway: Gateway, data: Path
) -> None:
    first = await asyncio.to_thread(ensure_joined, data=data, url=gateway.url + "/", token="good", name="n1")
    assert first == read_identity(data)
    assert (first.node_id, first.name, first.address, first.url) == (7, "n1", "127.0.0.1", gateway.url)
    assert (data / "node" / "identity.json").stat().st_mode & 0o777 == 0o600
    assert (data / "node").stat().st_mode & 0o077 == 0
    again = await asyncio.to_thread(ensure_joined, data=data, url=gateway.url, token=None)
    assert again == first
    assert len(gateway.joins) == 1


async def test_a_refused_join_repeats_the_gateways_reason(gateway: Gateway, data: Path) -> None:
    with pytest.raises(JoinError) as caught:
        await asyncio.to_thread(ensure_joined, data=data, url=gateway.url, token="used")
    assert str(caught.value).endswith("refused this node: This join token is used up.")
    assert read_identity(data) is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"url": "http://127.0.0.1:1", "token": "t"}, "cannot be reached"),
        ({"url": "http://127.0.0.1:1", "token": None}, "give --join TOKEN"),
        ({"url": None, "token": "t"}, "Which gateway?"),
        ({"url": "ftp://host", "token": "t"}, "--url must be like"),
        ({"url": "http://127.0.0.1:1", "token": "t", "address": "here"}, "--address must be an IP address"),
    ],
)
def test_a_join_that_cannot_be_says_why(data: Path, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(JoinError, match=sentence):
        ensure_joined(data=data, **arguments)


def test_a_data_folder_that_cannot_be_written_does_not_spend_the_token(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(JoinError, match="cannot be written"):
        ensure_joined(data=file / "data", url="http://127.0.0.1:1", token="t")


def test_a_node_belongs_to_one_gateway(data: Path) -> None:
    write_identity(
        data, Identity(url="http://127.0.0.1:2", node_id=1, name="n1", address="127.0.0.1", secret="s")
    )
    with pytest.raises(JoinError, match=r"belongs to http://127\.0\.0\.1:2"):
        ensure_joined(data=data, url="http://127.0.0.1:1", token=None)


async def test_the_node_command_joins_and_becomes_the_agent(
    gateway: Gateway, data: Path, cache: Path
) -> None:
    environment = os.environ | {"DJANGO_SETTINGS_MODULE": "config.settings.test", "PYTHONPATH": str(ROOT)}
    code = "import sys; from inference.agent.command import main; sys.exit(main(sys.argv[1:]))"
    options = ("--join", "good", "--url", gateway.url, "--data", str(data), "--cache", str(cache))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *options, env=environment, stderr=subprocess.DEVNULL
    )
    await until(lambda: gateway.reports)
    assert gateway.reports[0].agent_pid == process.pid
    assert "DJANGO_SETTINGS_MODULE" not in psutil.Process(process.pid).environ()
    process.terminate()
    assert await process.wait() == 0


async def test_a_second_agent_on_the_same_data_folder_is_refused(
    gateway: Gateway, start_process: StartProcess, data: Path
) -> None:
    start_process()
    await until(lambda: gateway.reports)
    second = start_process()
    assert await asyncio.to_thread(second.end, 0) == 1
    assert second.log.read_text().splitlines()[-1].startswith("Another agent already runs on the data folder")


def test_an_agent_that_never_joined_says_so(data: Path, cache: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "inference.agent", "--data", str(data), "--cache", str(cache)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("No node has joined from ")
    assert len(result.stderr.splitlines()) == 1
