"""One worker: starts its engine, keeps the gateway informed, and sees to an orderly end.

    loading ──ready──► ready ──drain, SIGTERM──► draining ──► stopped
       └──────────────────┴── load error, crash, hang ──► failed

The supervisor decides by its own clock alone: fenced after `fence_seconds` without a gateway, hung
after `hung_seconds` with requests and no engine step. It never touches a request.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from inference.protocol import Beat, BeatOrder, Cause, Load, ProcessReport, Progress, WorkerPhase
from inference.worker.endings import classify_end
from inference.worker.engine_process import EngineProcess, PortTaken
from inference.worker.events import EventLog
from inference.worker.files import write_message
from inference.worker.heartbeat import Heartbeat
from inference.worker.spec import (
    END_FILE,
    STATE_FILE,
    EngineProgress,
    EngineReady,
    ProcessState,
    WorkerSpec,
)
from inference.worker.vllm_process import VllmProcess

_WATCH_SECONDS = 0.5
_DRAIN_POLL_SECONDS = 0.1
_TAIL_SECONDS = 5.0
"""New log lines travel with a beat this often at most."""
_SAME_TAIL_SECONDS = 60.0
"""Lines that were told already are told again after this long: their beat may have been lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    cause: Cause
    detail: str = ""
    exit_code: int | None = None


class Supervisor:
    """Runs one worker from start to end: `await Supervisor(spec).run()`."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._who = spec.assignment
        self._folder = Path(spec.folder)
        self._log = EventLog(self._who.worker_id, self._who.epoch)
        self._started = psutil.Process().create_time()
        self._phase = WorkerPhase.LOADING
        self._load = Load()
        self._progress: Progress | None = None
        self._capabilities: list[str] = []
        self._context_length = 0
        self._fenced = False
        self._tail: list[str] = []
        self._tail_at = float("-inf")
        self._asked: asyncio.Future[_End] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._engine: EngineProcess
        self._heartbeat: Heartbeat

    async def run(self) -> int:
        """The process's exit code: 0 when it ended because it was told to, 1 when it failed."""
        timeout = aiohttp.ClientTimeout(total=10)
        async with aiohttp.ClientSession(trust_env=False, timeout=timeout) as session:
            process = VllmProcess if self._who.engine == "vllm" else EngineProcess
            self._engine = process(
                self._spec, session, on_progress=self._on_progress, on_ready=self._on_ready
            )
            self._heartbeat = Heartbeat(
                self._spec, session, self._log, make=self._beat, on_order=self._on_order
            )
            try:
                end = await self._live()
            finally:
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                if self._engine.pid:  # whatever happened above, no engine outlives its supervisor
                    await self._engine.stop(at_once=True)
            return await self._conclude(end)

    async def _live(self) -> _End:
        """From the start of the engine until it has ended."""
        self._listen_to_signals()
        self._log("starting", engine=self._who.engine, slots=self._who.slots)
        try:
            await self._engine.start()
        except PortTaken as taken:
            return _End(cause=Cause.PORT, detail=str(taken))
        self._write_state()
        self._spawn(self._heartbeat.run())
        self._spawn(self._watch())
        ends: set[asyncio.Future[Any]] = {self._engine.exited, self._asked}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not self._asked.done():
            return await self._explain_exit()
        end = self._asked.result()
        hung = end.cause is Cause.HUNG
        code = await self._engine.stop(at_once=hung)
        # An engine that ended because we asked has ended well, whatever its code.
        return _End(cause=end.cause, detail=end.detail, exit_code=code if hung else 0)

    async def _explain_exit(self) -> _End:
        code = self._engine.exited.result()
        tail = await self._engine.last_words()
        cause, detail = classify_end(
            told=self._engine.told,
            exit_code=code,
            log_tail=tail,
            killed_for_memory=self._engine.killed_for_memory(),
        )
        return _End(cause=cause, detail=detail, exit_code=code)

    async def _conclude(self, end: _End) -> int:
        stopped = end.cause is Cause.STOPPED
        self._phase = WorkerPhase.STOPPED if stopped else WorkerPhase.FAILED
        self._load = Load()
        tail = await self._engine.last_words()
        report = ProcessReport(
            worker_id=self._who.worker_id,
            epoch=self._who.epoch,
            running=False,
            pid=os.getpid(),
            exit_code=end.exit_code,
            cause=end.cause,
            detail=end.detail,
            log_tail=tail,
        )
        # The file first: it is there however long the gateway cannot be reached.
        write_message(self._folder / END_FILE, report)
        self._write_state()
        self._log("ended", cause=end.cause, detail=end.detail, exit_code=end.exit_code)
        await self._heartbeat.say_last(self._beat(end, tail))
        return 0 if stopped else 1

    # -- what others say

    def _on_progress(self, message: EngineProgress) -> None:
        self._progress = message.progress

    def _on_ready(self, message: EngineReady) -> None:
        self._capabilities = message.capabilities
        self._context_length = message.context_length
        self._progress = None
        if self._phase is WorkerPhase.LOADING:
            self._enter(WorkerPhase.READY)

    def _on_order(self, order: BeatOrder) -> None:
        if order is BeatOrder.DRAIN:
            self._begin_drain("The gateway asked to drain.")
        elif order is BeatOrder.EXIT:
            self._ask_end(_End(cause=Cause.STOPPED, detail="The gateway said that this epoch is over."))

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        """The first asks for a drain, the second ends at once."""
        detail = "The worker was told to stop."
        if self._phase is WorkerPhase.DRAINING:
            self._ask_end(_End(cause=Cause.STOPPED, detail=detail))
        else:
            self._begin_drain(detail)

    # -- what follows from it

    def _begin_drain(self, detail: str) -> None:
        if self._phase is WorkerPhase.LOADING:
            self._ask_end(_End(cause=Cause.STOPPED, detail=detail))
        elif self._phase is WorkerPhase.READY:
            self._enter(WorkerPhase.DRAINING)
            self._spawn(self._drain(detail))

    async def _drain(self, detail: str) -> None:
        deadline = time.monotonic() + self._who.drain_seconds
        await self._engine.admit(False)
        while time.monotonic() < deadline:
            load = await self._engine.read_load()
            if load is not None and load.running + load.waiting == 0:
                break
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        self._ask_end(_End(cause=Cause.STOPPED, detail=detail))

    async def _watch(self) -> None:
        """Keep the load fresh, fence when no gateway hears us, end an engine that hangs."""
        hung_seconds = self._spec.hung_seconds
        still = silent = 0.0
        at = time.monotonic()
        while True:
            await asyncio.sleep(min(_WATCH_SECONDS, hung_seconds / 4))
            load = await self._engine.read_load()
            # A pause of ours (a stopped process, a sleeping laptop) is not the engine's fault: one
            # round counts for a few seconds at most.
            at, passed = time.monotonic(), min(time.monotonic() - at, 3.0)
            await self._keep_fence()
            if load is None:
                silent += passed
            else:
                moved = load.steps != self._load.steps or load.running == 0
                still = 0.0 if moved else still + passed
                silent = 0.0
                self._load = load
            if self._phase is WorkerPhase.LOADING:
                # Loading may keep the interpreter busy for long; only what serves can hang.
                still = silent = 0.0
            if still >= hung_seconds:
                self._hang(f"Requests were running and the engine made no step for {still:.0f} s.")
            elif silent >= hung_seconds:
                self._hang(f"The engine did not answer for {silent:.0f} s.")

    async def _keep_fence(self) -> None:
        fenced = self._heartbeat.silence_seconds() > self._spec.fence_seconds
        if fenced != self._fenced:
            self._fenced = fenced
            self._log("fenced" if fenced else "unfenced")
        # Said again each time: an order that a busy engine did not confirm is a no-op here.
        await self._engine.admit(not self._fenced and self._phase is not WorkerPhase.DRAINING)

    def _hang(self, detail: str) -> None:
        self._ask_end(_End(cause=Cause.HUNG, detail=detail))

    def _ask_end(self, end: _End) -> None:
        if not self._asked.done():
            self._asked.set_result(end)

    def _enter(self, phase: WorkerPhase) -> None:
        self._phase = phase
        self._log("phase", phase=phase)
        self._write_state()
        self._heartbeat.soon()

    # -- what we say

    def _beat(self, end: _End | None = None, log_tail: list[str] | None = None) -> Beat:
        return Beat(
            worker_id=self._who.worker_id,
            epoch=self._who.epoch,
            phase=self._phase,
            url=self._engine.url,
            pid=os.getpid(),
            engine_pid=self._engine.pid,
            load=self._load,
            progress=self._progress,
            capabilities=self._capabilities,
            context_length=self._context_length,
            cause=end.cause if end else None,
            detail=end.detail if end else "",
            exit_code=end.exit_code if end else None,
            log_tail=self._new_lines() if log_tail is None else log_tail,
        )

    def _new_lines(self) -> list[str]:
        """The last log lines for a beat; empty while they were told a moment ago, or are none."""
        now = time.monotonic()
        if now - self._tail_at < _TAIL_SECONDS:
            return []
        tail = self._engine.log_tail()
        if tail == self._tail and now - self._tail_at < _SAME_TAIL_SECONDS:
            return []
        self._tail, self._tail_at = tail, now
        return tail

    def _write_state(self) -> None:
        state = ProcessState(
            worker_id=self._who.worker_id,
            epoch=self._who.epoch,
            pid=os.getpid(),
            started=self._started,
            phase=self._phase,
            engine_pid=self._engine.pid,
            url=self._engine.url,
        )
        with suppress(OSError):  # a full disk must not end a worker that serves
            write_message(self._folder / STATE_FILE, state)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run beside the rest. A failure of ours ends the worker, loudly: half a supervisor is none."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self._asked.done():
            self._asked.set_exception(error)
