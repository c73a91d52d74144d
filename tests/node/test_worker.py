"""Whole workers: a supervisor and its engine as real processes, and a small gateway that listens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import aiohttp
import msgspec
import psutil
import pytest
import pytest_asyncio
from aiohttp import web

from inference.agent.processes import MARK
from inference.protocol import Assignment, Beat, BeatOrder, BeatReply, Cause, ModelSpec, ProcessReport, Wish
from inference.protocol import WorkerPhase as Phase
from inference.worker.endings import classify_end
from inference.worker.engine_process import engine_environment
from inference.worker.files import EngineLog
from inference.worker.spec import EngineFailed, ProcessState, WorkerSpec
from tests.node.engine_tools import (
    AUTH,
    SECRET,
    child_environment,
    events_of,
    load_of,
    question,
    text_of,
    until,
)

CHAT = "/v1/chat/completions"


class Gateway:
    """`/fleet/worker`, and nothing else."""

    def __init__(self) -> None:
        self.url = ""
        self.beats: list[tuple[float, Beat]] = []
        self.credentials: set[str] = set()
        self.status = 200
        self.order = BeatOrder.CONTINUE
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/fleet/worker", self._beat)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        await web.SockSite(self._runner, listener).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _beat(self, request: web.Request) -> web.Response:
        if self.status != 200:
            return web.Response(status=self.status)
        self.credentials.add(request.headers["Authorization"])
        self.beats.append((time.monotonic(), msgspec.json.decode(await request.read(), type=Beat)))
        return web.Response(body=msgspec.json.encode(BeatReply(order=self.order)))

    def last(self) -> Beat | None:
        return self.beats[-1][1] if self.beats else None

    def heard(self, phase: Phase) -> Callable[[], bool]:
        return lambda: any(beat.phase is phase for _, beat in self.beats)


class Worker:
    def __init__(self, process: subprocess.Popen[bytes], spec: WorkerSpec, gateway: Gateway) -> None:
        self.process = process
        self.spec = spec
        self.folder = Path(spec.folder)
        self._gateway = gateway
        self.session: aiohttp.ClientSession

    def state(self) -> ProcessState:
        return msgspec.json.decode((self.folder / "state.json").read_bytes(), type=ProcessState)

    def end(self) -> ProcessReport:
        return msgspec.json.decode((self.folder / "end.json").read_bytes(), type=ProcessReport)

    async def exit_code(self) -> int:
        await until(lambda: self.process.poll() is not None, "the supervisor has ended")
        return self.process.wait()

    async def final_beat(self, phase: Phase) -> Beat:
        await until(self._gateway.heard(phase), f"a beat says {phase}")
        return next(beat for _, beat in self._gateway.beats if beat.phase is phase)

    def post(self, content: str, **fields: Any) -> Any:
        return self.session.post(self.state().url + CHAT, json=question(content, **fields))

    async def load(self) -> dict[str, Any]:
        return await load_of(self.session, self.state().url)

    async def runs(self, number: int) -> bool:
        return bool((await self.load())["running"] == number)


def launch(spec: WorkerSpec) -> subprocess.Popen[bytes]:
    path = Path(spec.folder) / "spec.json"
    path.write_bytes(msgspec.json.encode(spec))
    with open(path.with_name("worker.log"), "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "inference.worker", str(path)],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=child_environment(DATABASE_URL="x", ROUNDHOUSE_SECRET_KEY="x"),
        )


@pytest_asyncio.fixture
async def gateway() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    await gateway.start()
    yield gateway
    await gateway.stop()


@pytest_asyncio.fixture
async def run(gateway: Gateway) -> AsyncIterator[Callable[[WorkerSpec], Worker]]:
    """`run(spec)` starts a worker as a process; it ends with the test."""
    workers: list[Worker] = []

    def run(spec: WorkerSpec) -> Worker:
        worker = Worker(launch(spec), spec, gateway)
        worker.session = aiohttp.ClientSession(headers=AUTH)
        workers.append(worker)
        return worker

    yield run
    for worker in workers:
        await worker.session.close()
        if worker.process.poll() is None:
            worker.process.kill()
        worker.process.wait()


@pytest.fixture
def start(
    run: Callable[[WorkerSpec], Worker], gateway: Gateway, tmp_path: Path
) -> Callable[..., Awaitable[Worker]]:
    """`await start(**arguments)` gives a ready worker; `wait=False` one that only was started."""

    async def start(
        *,
        wait: bool = True,
        engine: str = "simulated",
        drain_seconds: float = 5.0,
        environment: dict[str, str] | None = None,
        beat_seconds: float = 0.2,
        fence_seconds: float = 60.0,
        hung_seconds: float = 60.0,
        port: int = 0,
        gateway_url: str = "",
        **arguments: Any,
    ) -> Worker:
        assignment = Assignment(
            worker_id=7,
            epoch=3,
            name="w",
            wish=Wish.RUN,
            engine=engine,
            model=ModelSpec(id=1, name="m", source="/nowhere"),
            slots=4,
            secret=SECRET,
            served_name="served",
            arguments=arguments,
            environment=environment or {},
            drain_seconds=drain_seconds,
        )
        spec = WorkerSpec(
            assignment=assignment,
            gateway_url=gateway_url or gateway.url,
            folder=mkdtemp(dir=tmp_path),
            port=port,
            beat_seconds=beat_seconds,
            fence_seconds=fence_seconds,
            hung_seconds=hung_seconds,
        )
        worker = run(spec)
        if wait:
            await until(gateway.heard(Phase.READY), "the worker is ready")
        return worker

    return start


Start = Callable[..., Any]


async def test_a_worker_says_what_it_is_and_goes_on_saying_it(start: Start, gateway: Gateway) -> None:
    worker = await start(load_seconds=1.0, context_length=500)
    loading = [beat for _, beat in gateway.beats if beat.phase is Phase.LOADING]
    assert any(beat.progress is not None and 0 < beat.progress.done < 20 for beat in loading)
    before = len(gateway.beats)
    await until(lambda: len(gateway.beats) >= before + 5, "five more beats")
    gaps = [later - sooner for (sooner, _), (later, _) in pairwise(gateway.beats)]
    assert max(gaps) < 1
    beat = gateway.last()
    assert beat is not None
    assert (beat.worker_id, beat.epoch, beat.phase) == (7, 3, Phase.READY)
    assert beat.context_length == 500
    assert {"temperature", "stop"} <= set(beat.capabilities)
    assert gateway.credentials == {f"Bearer 7.3.{SECRET}"}
    state = worker.state()
    assert (state.worker_id, state.epoch, state.phase) == (7, 3, Phase.READY)
    assert (state.pid, state.engine_pid, state.url) == (beat.pid, beat.engine_pid, beat.url)
    assert state.pid == worker.process.pid
    assert state.started == psutil.Process(state.pid).create_time()
    assert psutil.Process(state.engine_pid).ppid() == state.pid


async def test_being_ready_is_told_at_once(start: Start, gateway: Gateway) -> None:
    worker = await start(beat_seconds=60.0, load_seconds=0.2, wait=False)

    async def loaded() -> bool:
        with contextlib.suppress(OSError, aiohttp.ClientError):
            async with worker.session.get(worker.state().url + "/health") as reply:
                return bool(reply.status == 200)
        return False

    # How long a process takes to begin is this machine's affair.
    await until(loaded, "the engine is ready")
    assert await until(gateway.heard(Phase.READY), "the worker is ready") < 5
    assert worker.process.poll() is None


async def test_a_ready_worker_streams_at_the_engines_pace(start: Start, gateway: Gateway) -> None:
    worker = await start(token_seconds=0.05)
    async with worker.post("hello", stream=True, max_tokens=8) as reply:
        events = await events_of(reply)
    assert len(text_of(events).split()) == 8
    tokens = [at for at, event in events if '"content":" ' in event]
    gaps = sorted(later - sooner for sooner, later in pairwise(tokens))
    # On a busy machine one may be read late, and the next one then comes right behind it.
    assert gaps[1] >= 0.03
    assert sum(gaps) >= len(gaps) * 0.045


async def test_beats_carry_the_load_and_a_lost_client_leaves_none(start: Start, gateway: Gateway) -> None:
    worker = await start(token_seconds=0.02)
    async with worker.post("!tokens 5000", stream=True) as reply:
        await reply.content.readuntil(b"\n\n")
        await until(
            lambda: (b := gateway.last()) is not None and b.load.running == 1, "a beat shows the load"
        )
        reply.close()
    assert await until(lambda: worker.runs(0), "nothing runs") < 1
    await until(lambda: (b := gateway.last()) is not None and b.load.running == 0, "a beat shows the rest")


async def test_the_port_is_guarded(start: Start, gateway: Gateway) -> None:
    worker = await start()
    async with aiohttp.ClientSession() as stranger, stranger.get(worker.state().url + "/load") as reply:
        assert reply.status == 401


async def test_a_killed_engine_is_reported_within_a_second(start: Start, gateway: Gateway) -> None:
    worker = await start(beat_seconds=30.0, token_seconds=0.02)
    async with worker.post("!tokens 5000", stream=True) as reply:
        await reply.content.readuntil(b"\n\n")
        os.kill(worker.state().engine_pid, signal.SIGKILL)
        assert await until(gateway.heard(Phase.FAILED), "the end is told") < 1
        with pytest.raises(aiohttp.ClientError):
            await reply.read()
    beat = await worker.final_beat(Phase.FAILED)
    assert beat.cause is Cause.KILLED
    assert beat.exit_code == -signal.SIGKILL
    assert "SIGKILL" in beat.detail
    assert await worker.exit_code() == 1
    end = worker.end()
    assert (end.cause, end.detail, end.exit_code) == (beat.cause, beat.detail, beat.exit_code)
    assert worker.state().phase is Phase.FAILED
    with pytest.raises(aiohttp.ClientConnectorError):
        await worker.load()


async def test_a_live_worker_tells_its_last_log_lines_now_and_then(start: Start, gateway: Gateway) -> None:
    await start()
    await until(lambda: any(beat.log_tail for _, beat in gateway.beats), "a beat brings log lines")
    seen = len(gateway.beats)
    await until(lambda: len(gateway.beats) >= seen + 4, "more beats come")
    talkative = [at for at, beat in gateway.beats if beat.log_tail]
    assert all(later - earlier >= 5 for earlier, later in pairwise(talkative)), "not with every beat"


@pytest.mark.parametrize(
    ("command", "cause", "exit_code"),
    [("!crash", Cause.CRASHED, 13), ("!oom", Cause.OUT_OF_MEMORY, 1), ("!sick", Cause.CRASHED, 70)],
)
async def test_the_cause_of_an_engines_end_is_named(
    start: Start, gateway: Gateway, command: str, cause: Cause, exit_code: int
) -> None:
    worker = await start()
    try:
        async with worker.post(command) as reply:
            assert reply.status == 500
    except aiohttp.ClientError:
        assert command != "!sick"
    beat = await worker.final_beat(Phase.FAILED)
    assert (beat.cause, beat.exit_code) == (cause, exit_code)
    assert beat.log_tail
    assert await worker.exit_code() == 1


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"no_such_argument": 1}, Cause.BAD_ARGUMENT),
        ({"engine": "no_such_engine"}, Cause.BAD_ARGUMENT),
        ({"fail_load": "missing_file", "load_seconds": 0.1}, Cause.MISSING_FILE),
    ],
)
async def test_a_load_error_keeps_its_cause(
    start: Start, gateway: Gateway, arguments: dict[str, Any], cause: Cause
) -> None:
    worker = await start(wait=False, **arguments)
    beat = await worker.final_beat(Phase.FAILED)
    assert beat.cause is cause
    assert any(str(name) in beat.detail for name in (*arguments, *arguments.values()))
    assert worker.end().cause is cause
    assert await worker.exit_code() == 1


async def test_a_taken_port_is_said_at_once(start: Start, gateway: Gateway) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        worker = await start(wait=False, port=taken.getsockname()[1])
        beat = await worker.final_beat(Phase.FAILED)
    assert beat.cause is Cause.PORT
    assert beat.engine_pid == 0
    assert await worker.exit_code() == 1


@pytest.mark.parametrize("stop", [False, True])
async def test_a_hung_engine_is_ended_whatever_it_answers(start: Start, gateway: Gateway, stop: bool) -> None:
    worker = await start(hung_seconds=1.0)
    engine = worker.state().engine_pid
    if stop:
        os.kill(engine, signal.SIGSTOP)
        beat = await worker.final_beat(Phase.FAILED)
    else:
        asked = asyncio.ensure_future(worker.post("!hang").__aenter__())
        await until(lambda: worker.runs(1), "the request runs")
        beat = await worker.final_beat(Phase.FAILED)
        with pytest.raises(aiohttp.ClientError):
            await asked
    assert beat.cause is Cause.HUNG
    assert not psutil.pid_exists(engine)


async def test_a_busy_engine_is_not_hung(start: Start, gateway: Gateway) -> None:
    worker = await start(hung_seconds=1.0, token_seconds=0.1)
    async with worker.post("!tokens 20") as reply:
        assert reply.status == 200
    assert worker.process.poll() is None


async def drains(worker: Worker, gateway: Gateway, begin: Callable[[], object]) -> None:
    async with worker.post("!slow 0.05 !tokens 20", stream=True) as reply:
        await reply.content.readuntil(b"\n\n")
        begin()
        await until(gateway.heard(Phase.DRAINING), "the drain is told")

        async def refuses() -> bool:
            async with worker.post("hello") as refused:
                return bool(refused.status == 503)

        await until(refuses, "new requests are refused", seconds=0.5)
        events = await events_of(reply)
    assert events[-1][1] == "[DONE]"
    beat = await worker.final_beat(Phase.STOPPED)
    assert beat.cause is Cause.STOPPED
    assert await worker.exit_code() == 0
    assert (worker.end().cause, worker.end().exit_code) == (Cause.STOPPED, 0)


async def test_a_told_drain_finishes_what_runs_and_refuses_the_rest(start: Start, gateway: Gateway) -> None:
    await drains(await start(), gateway, lambda: setattr(gateway, "order", BeatOrder.DRAIN))


async def test_sigterm_drains(start: Start, gateway: Gateway) -> None:
    worker = await start()
    await drains(worker, gateway, worker.process.terminate)


async def test_a_drain_ends_at_its_limit(start: Start, gateway: Gateway) -> None:
    worker = await start(drain_seconds=0.3)
    async with worker.post("!slow 0.05 !tokens 5000", stream=True) as reply:
        await reply.content.readuntil(b"\n\n")
        worker.process.terminate()
        assert await until(gateway.heard(Phase.STOPPED), "the worker has stopped") < 5
        with pytest.raises(aiohttp.ClientError):
            await reply.read()
    assert await worker.exit_code() == 0


async def test_a_second_sigterm_ends_at_once(start: Start, gateway: Gateway) -> None:
    worker = await start(drain_seconds=60)
    async with worker.post("!slow 0.05 !tokens 5000", stream=True) as reply:
        await reply.content.readuntil(b"\n\n")
        worker.process.terminate()
        await until(gateway.heard(Phase.DRAINING), "the drain is told")
        worker.process.terminate()
        assert await until(gateway.heard(Phase.STOPPED), "the worker has stopped") < 4
        reply.close()
    assert await worker.exit_code() == 0


@pytest.mark.parametrize("gone", [False, True])
async def test_an_epoch_that_is_over_ends_the_worker(start: Start, gateway: Gateway, gone: bool) -> None:
    worker = await start()
    engine = worker.state().engine_pid
    if gone:
        gateway.status = 410
    else:
        gateway.order = BeatOrder.EXIT
    assert await worker.exit_code() == 0
    assert not psutil.pid_exists(engine)
    assert worker.end().cause is Cause.STOPPED


async def test_a_worker_that_nobody_hears_accepts_nothing_new(start: Start, gateway: Gateway) -> None:
    worker = await start(fence_seconds=1.0)

    async def accepted() -> bool:
        async with worker.post("hello") as reply:
            return bool(reply.status == 200)

    async def refused() -> bool:
        return not await accepted()

    assert await accepted()
    async with worker.post("!slow 0.05 !tokens 60", stream=True) as running:
        gateway.status = 401
        assert await until(refused, "new requests are refused") > 0.5
        gateway.status = 200
        await until(accepted, "requests are taken again")
        assert (await events_of(running))[-1][1] == "[DONE]"
    assert worker.process.poll() is None


async def test_neither_worker_nor_engine_leaves_its_memory_on_a_disk(start: Start, gateway: Gateway) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard == 0:
        pytest.skip("nothing leaves any here")
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        worker = await start()
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    state = worker.state()
    for pid in (state.pid, state.engine_pid):
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)


async def test_an_engine_does_not_outlive_its_supervisor(start: Start, gateway: Gateway) -> None:
    worker = await start()
    engine = worker.state().engine_pid
    os.kill(worker.process.pid, signal.SIGKILL)
    await until(
        lambda: not psutil.pid_exists(engine) or psutil.Process(engine).status() == "zombie",
        "the engine ended",
    )


async def test_a_worker_without_a_gateway_ends_and_leaves_its_reason(start: Start, gateway: Gateway) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    worker = await start(wait=False, fail_load="checksum", gateway_url=url)
    await until(lambda: (worker.folder / "end.json").exists(), "the end is written")
    assert worker.end().cause is Cause.CHECKSUM
    assert await worker.exit_code() == 1


async def test_no_prompt_and_no_secret_is_written_anywhere(start: Start, gateway: Gateway) -> None:
    worker = await start()
    for content in ("a-very-private-thing", "!error a-very-private-thing"):
        async with worker.post(content) as reply:
            await reply.read()
    worker.process.terminate()
    assert await worker.exit_code() == 0
    for name in ("worker.log", "engine.log", "state.json", "end.json"):
        written = (worker.folder / name).read_text()
        assert "a-very-private-thing" not in written
        assert SECRET not in written
    for name in ("engine.log", "state.json", "end.json"):
        assert (worker.folder / name).stat().st_mode & 0o077 == 0


def test_a_worker_without_a_usable_spec_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "spec.json"
    broken.write_text("{}")
    for arguments in ([], [str(broken)], [str(tmp_path / "none.json")]):
        done = subprocess.run(
            [sys.executable, "-m", "inference.worker", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=child_environment(),
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1


def test_an_engine_sees_nothing_of_the_control_plane() -> None:
    base = {
        "PATH": "/bin",
        "DATABASE_URL": "x",
        "REDIS_URL": "x",
        "PGPASSWORD": "x",
        "DJANGO_SETTINGS_MODULE": "x",
        "ROUNDHOUSE_SECRET_KEY": "x",
        MARK: "/folder",
    }
    extra = {"OMP_NUM_THREADS": "1", "ROUNDHOUSE_WORKER_SECRET": "other"}
    assert engine_environment(base, extra, "s") == {
        "PATH": "/bin",
        MARK: "/folder",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "ROUNDHOUSE_WORKER_SECRET": "s",
    }


def test_ends_are_classified_by_evidence() -> None:
    def cause(
        exit_code: int, *, tail: str = "", told: EngineFailed | None = None, oom: bool = False
    ) -> Cause:
        return classify_end(told=told, exit_code=exit_code, log_tail=[tail], killed_for_memory=oom)[0]

    crashed = EngineFailed(cause=Cause.CRASHED, detail="d")
    assert cause(-9) is Cause.KILLED
    assert cause(-9, oom=True) is Cause.OUT_OF_MEMORY
    assert cause(-15) is cause(143) is Cause.KILLED
    assert cause(-11) is Cause.CRASHED
    assert cause(1) is Cause.CRASHED
    assert cause(1, tail="torch.OutOfMemoryError: CUDA out of memory.") is Cause.OUT_OF_MEMORY
    assert cause(1, tail="OSError: [Errno 98] Address already in use") is Cause.PORT
    assert cause(70, told=crashed) is Cause.CRASHED
    assert cause(70, told=crashed, tail="CUDA out of memory") is Cause.OUT_OF_MEMORY
    assert (
        cause(78, told=EngineFailed(cause=Cause.CHECKSUM, detail="d"), tail="out of memory") is Cause.CHECKSUM
    )


def test_an_engines_log_is_bounded_and_its_last_lines_kept(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    log = EngineLog(path, hide="hush", limit_bytes=1000)
    for number in range(300):
        log.write(f"line {number} hush\nha".encode())
        log.write(b"lf ")
    assert path.stat().st_size <= 1000
    assert (tmp_path / "engine.log.1").stat().st_size <= 1000
    tail = log.tail()
    log.close()
    assert len(tail) == 40
    assert tail[-2:] == ["half line 299 ***", "half"]
    log_json = json.dumps(tail)
    assert "hush" not in log_json
