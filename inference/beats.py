"""What workers say of themselves: heard in memory, written to the database in batches.

A beat costs its sender no database round trip, so a slow or absent database delays nobody: the
newest beat of each worker waits here. Loads are written together every half second; what changes
a worker's state is written at once. Each round also says that this gateway is there to hear.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
from django.db import DatabaseError, InterfaceError, OperationalError, transaction

from inference.protocol import LOG_TAIL_LINES, Beat, Cause, Load, Progress, WorkerPhase
from registry.actions.gateways import forget_gateway, note_gateway
from registry.actions.language_models import note_context_length
from registry.actions.workers import move_worker, record_loads
from registry.errors import InvalidTransition
from registry.models import Worker
from registry.querysets import database_now
from registry.states import WORKER_STARTING, WORKER_TERMINAL, WORKER_TRANSITIONS, WorkerState
from registry.threads import in_database

if TYPE_CHECKING:
    from inference.dispatch.fleet import Fleet

log = logging.getLogger("roundhouse.beats")

WRITE_SECONDS = 0.5
"""Loads are at most this old in the database, a beat's own interval aside."""

PRESENCE_SECONDS = 1.0
"""The gateway says this often that it listens."""

PRESENCE_BREAK_SECONDS = 3.0
"""A longer pause between two such words, and its presence begins anew."""

AWAY_SECONDS = 1.0
"""Pause after a write that failed."""

FORGET_SECONDS = 60.0
"""A worker not heard for this long has its measured speed forgotten here; the database keeps it."""

SPEED_WEIGHT = 0.3
"""Of the newest measurement in a worker's speed: some ten seconds count."""

LINE_LENGTH = 500
MOST = 2**31 - 1
URL = re.compile(r"https?://[A-Za-z0-9.:\[\]-]{1,180}")

LOAD_FIELDS = [
    *("heartbeat_at", "url", "pid", "engine_pid", "running", "waiting", "kv_use", "steps", "tokens"),
    *("tokens_per_second", "progress_step", "progress_done", "progress_total", "progress_unit"),
]


@dataclass(slots=True)
class _Speed:
    """Tokens per second of one worker, measured between beats that both found it busy."""

    tokens: int
    at: float
    busy: bool
    value: float | None = None

    def measure(self, load: Load, now: float) -> None:
        elapsed = now - self.at
        made = load.tokens - self.tokens
        busy = load.running > 0
        if busy and self.busy and made >= 0 and elapsed > 0:
            measured = made / elapsed
            self.value = (
                measured if self.value is None else SPEED_WEIGHT * measured + (1 - SPEED_WEIGHT) * self.value
            )
        self.tokens, self.at, self.busy = load.tokens, now, busy


class BeatBook:
    """The beats that one gateway hears. `hear` is for the event loop, and never waits."""

    def __init__(self, fleet: Fleet, *, name: str | None = None) -> None:
        self._fleet = fleet
        self._name = name or f"{socket.gethostname()[:50]}-{os.getpid()}-{secrets.token_hex(3)}"
        self._newest: dict[int, Beat] = {}
        self._phases: dict[int, tuple[int, WorkerPhase]] = {}
        self._speeds: dict[int, _Speed] = {}
        self._urgent = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._noted_at: float | None = None
        self._away = False

    async def start(self) -> None:
        """Begin to write. The database may be away: then beats wait in memory."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="beat book")

    async def stop(self) -> None:
        """Write what is left, as far as the database takes it, and say good-bye."""
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None
        try:
            await in_database(write_beats, self._take(), self._measured())
            await in_database(forget_gateway, name=self._name)
        except (DatabaseError, InterfaceError):
            log.warning("the last beats could not be written", extra={"event": "beats_unwritten"})

    def hear(self, beat: Beat) -> None:
        """Take a beat of a worker that has proved itself."""
        beat = clean(beat)
        now = time.monotonic()
        self._fleet.note_load(beat.worker_id, beat.load)
        speed = self._speeds.get(beat.worker_id)
        if speed is None:
            self._speeds[beat.worker_id] = _Speed(beat.load.tokens, now, beat.load.running > 0)
        else:
            speed.measure(beat.load, now)
        waiting = self._newest.get(beat.worker_id)
        if waiting is not None and waiting.epoch == beat.epoch and not beat.log_tail:
            # Lines come with few beats; the next beat must not take them away.
            beat = msgspec.structs.replace(beat, log_tail=waiting.log_tail)
        self._newest[beat.worker_id] = beat
        if self._phases.get(beat.worker_id) != (beat.epoch, beat.phase):
            self._phases[beat.worker_id] = (beat.epoch, beat.phase)
            self._urgent.set()

    async def _run(self) -> None:
        while True:
            if await self._write():
                # Not `wait_for`: on Python 3.11 it swallows a cancellation that comes with the event.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(WRITE_SECONDS):
                        await self._urgent.wait()
            else:
                await asyncio.sleep(AWAY_SECONDS)

    async def _write(self) -> bool:
        """One round: beats, then presence. False when the database did not take it."""
        self._urgent.clear()
        batch = self._take()
        try:
            if batch:
                await in_database(write_beats, batch, self._measured())
            await self._note_presence()
        except (DatabaseError, InterfaceError) as error:
            self._keep(batch)
            self._noted_at = None
            if not self._away:
                log.warning(
                    "the database takes no beats (%s); they wait",
                    type(error).__name__,
                    extra={"event": "beats_wait"},
                )
            self._away = True
            return False
        except asyncio.CancelledError:
            # Perhaps written, perhaps not: writing a beat twice changes nothing.
            self._keep(batch)
            raise
        except Exception:
            # A fault of ours must not end the book; these beats are dropped, lest they do it again.
            log.exception("beats could not be written", extra={"event": "beats_dropped"})
            self._noted_at = None
            return False
        if self._away:
            log.info("the database takes beats again", extra={"event": "beats_written"})
        self._away = False
        self._forget_silent()
        return True

    async def _note_presence(self) -> None:
        now = time.monotonic()
        if self._noted_at is not None and now - self._noted_at < PRESENCE_SECONDS:
            return
        unbroken = self._noted_at is not None and now - self._noted_at < PRESENCE_BREAK_SECONDS
        await in_database(note_gateway, name=self._name, unbroken=unbroken)
        self._noted_at = now

    def _take(self) -> list[Beat]:
        batch, self._newest = list(self._newest.values()), {}
        return batch

    def _keep(self, batch: Iterable[Beat]) -> None:
        for beat in batch:
            # One heard meanwhile is newer.
            self._newest.setdefault(beat.worker_id, beat)

    def _measured(self) -> dict[int, float]:
        return {
            worker_id: speed.value for worker_id, speed in self._speeds.items() if speed.value is not None
        }

    def _forget_silent(self) -> None:
        horizon = time.monotonic() - FORGET_SECONDS
        for worker_id in [id_ for id_, speed in self._speeds.items() if speed.at < horizon]:
            del self._speeds[worker_id]
            self._phases.pop(worker_id, None)


# -- What a beat may write.


def clean_text(text: str, length: int) -> str:
    """Text as every database takes it."""
    return text.replace("\x00", "")[:length]


def clean_lines(lines: list[str]) -> list[str]:
    return [clean_text(line, LINE_LENGTH) for line in lines[-LOG_TAIL_LINES:]]


def clean_exit_code(code: int | None) -> int | None:
    return None if code is None else _bounded(code, least=-MOST)


def _bounded(number: int, *, least: int = 0, most: int = MOST) -> int:
    return max(least, min(number, most))


def clean(beat: Beat) -> Beat:
    """The same beat within the bounds of its columns: one worker's nonsense must not fail a batch."""
    load, progress = beat.load, beat.progress
    return msgspec.structs.replace(
        beat,
        url=beat.url if URL.fullmatch(beat.url) else "",
        pid=_bounded(beat.pid),
        engine_pid=_bounded(beat.engine_pid),
        load=Load(
            running=_bounded(load.running),
            waiting=_bounded(load.waiting),
            kv_use=max(0.0, min(load.kv_use, 1.0)),
            steps=_bounded(load.steps, most=2**62),
            tokens=_bounded(load.tokens, most=2**62),
        ),
        progress=Progress(
            step=clean_text(progress.step, 100),
            done=_bounded(progress.done, most=2**62),
            total=_bounded(progress.total, most=2**62),
            unit=clean_text(progress.unit, 16),
        )
        if progress is not None
        else None,
        capabilities=sorted({clean_text(name, 64) for name in beat.capabilities[:100]}),
        context_length=_bounded(beat.context_length),
        detail=clean_text(beat.detail, LINE_LENGTH),
        exit_code=clean_exit_code(beat.exit_code),
        log_tail=clean_lines(beat.log_tail),
    )


# -- Writing. From here on in a database thread.


def write_beats(beats: Iterable[Beat], speeds: Mapping[int, float]) -> None:
    """Write what workers said: states first, then everybody's load in one statement.

    A beat that the database cannot take for its own sake is dropped; the others are written.
    Raises OperationalError or InterfaceError when the database is away.
    """
    beats = sorted(beats, key=lambda beat: beat.worker_id)
    try:
        _write(beats, speeds)
    except (OperationalError, InterfaceError):
        raise
    except DatabaseError:
        for beat in beats:
            try:
                _write([beat], speeds)
            except (OperationalError, InterfaceError):
                raise
            except DatabaseError:
                log.exception(
                    "a beat was dropped", extra={"event": "beat_dropped", "worker_id": beat.worker_id}
                )


@transaction.atomic
def _write(beats: list[Beat], speeds: Mapping[int, float]) -> None:
    now = database_now()
    # Without the log: it may be long, and is only ever replaced.
    known = Worker.objects.select_related("revision").defer("log_tail")
    workers = known.in_bulk([beat.worker_id for beat in beats])
    alive, talkative = [], []
    for beat in beats:
        worker = workers.get(beat.worker_id)
        if worker is None or worker.epoch != beat.epoch or worker.state in WORKER_TERMINAL:
            continue
        to = _next_state(WorkerState(worker.state), beat.phase)
        if to is not None:
            _move(worker, to, beat, now)
        if worker.state in WORKER_TERMINAL:
            continue
        _take_over(worker, beat, now, speeds.get(worker.pk))
        alive.append(worker)
        if beat.log_tail:
            worker.log_tail = "\n".join(beat.log_tail)
            talkative.append(worker)
    if alive:
        record_loads(alive, fields=LOAD_FIELDS)
    if talkative:
        record_loads(talkative, fields=["log_tail"])


def _next_state(state: WorkerState, phase: WorkerPhase) -> WorkerState | None:
    """The state that a worker in `state` moves to when it says `phase`; None: it stays."""
    to = WorkerState(phase.value)
    if to == state or to not in WORKER_TRANSITIONS[state]:
        return None
    if to == WorkerState.LOADING and state not in WORKER_STARTING | {WorkerState.LOST}:
        return None
    return to


def _move(worker: Worker, to: WorkerState, beat: Beat, now: datetime) -> None:
    facts: dict[str, Any] = {
        "heartbeat_at": now,
        "url": beat.url or worker.url,
        "pid": beat.pid or worker.pid,
        "engine_pid": beat.engine_pid or worker.engine_pid,
    }
    if to == WorkerState.READY:
        facts["capabilities"] = beat.capabilities
        if beat.context_length:
            note_context_length(
                language_model_id=worker.revision.language_model_id, context_length=beat.context_length
            )
    if to in WORKER_TERMINAL:
        facts |= {
            "cause": (beat.cause or _default_cause(to)).value,
            "exit_code": beat.exit_code,
            "log_tail": "\n".join(beat.log_tail),
        }
    try:
        move_worker(
            worker=worker,
            to=to,
            reason=beat.detail or _REASONS[to](worker),
            by=f"worker {worker.name}",
            facts=facts,
        )
    except InvalidTransition:
        # The reaper, reconcile or another gateway moved it in this moment; the next beat tells.
        worker.refresh_from_db()


def _default_cause(to: WorkerState) -> Cause:
    return Cause.STOPPED if to == WorkerState.STOPPED else Cause.CRASHED


def _ready_again(worker: Worker) -> str:
    if worker.state == WorkerState.LOST:
        return "came back before it was replaced"
    if worker.state == WorkerState.SUSPECT:
        return "heard again"
    return "the engine is ready"


_REASONS: Mapping[WorkerState, Callable[[Worker], str]] = {
    WorkerState.LOADING: lambda worker: "the engine loads",
    WorkerState.READY: _ready_again,
    WorkerState.DRAINING: lambda worker: "it was told to finish",
    WorkerState.STOPPED: lambda worker: "it was stopped",
    WorkerState.FAILED: lambda worker: "it ended",
}


def _take_over(worker: Worker, beat: Beat, now: datetime, speed: float | None) -> None:
    """Set the columns of LOAD_FIELDS."""
    worker.heartbeat_at = now
    worker.url = beat.url or worker.url
    worker.pid = beat.pid or worker.pid
    worker.engine_pid = beat.engine_pid or worker.engine_pid
    worker.running = beat.load.running
    worker.waiting = beat.load.waiting
    worker.kv_use = beat.load.kv_use
    worker.steps = beat.load.steps
    worker.tokens = beat.load.tokens
    if speed is not None:
        worker.tokens_per_second = speed
    progress = beat.progress or Progress(step="")
    worker.progress_step = progress.step
    worker.progress_done = progress.done
    worker.progress_total = progress.total
    worker.progress_unit = progress.unit
