"""Worker processes of this node: started, adopted, watched and stopped here and nowhere else.

Each worker has a folder `<data>/node/workers/<worker id>-<epoch>/`:

    spec.json      what to run; read by the worker; holds its secret
    process.json   which process it is; written after the start
    worker.log     what the supervisor printed
    state.json, end.json, engine.log   the worker's own
    report.json    how it ended, as the gateway is told; the folder is history from then on
    reported       empty; the gateway has heard it

So an agent that comes back finds everything, and a worker id and epoch is never started twice.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import psutil

import inference
from inference.agent.identity import node_folder, write_private
from inference.engines.vllm.command import PYTHON_VARIABLE
from inference.protocol import LOG_TAIL_LINES, Assignment, Cause, ProcessReport, Wish
from inference.worker.spec import WorkerSpec

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
"""How soon the end of a process is seen."""

SECOND_SIGNAL_SECONDS = 0.3
"""Between the two SIGTERMs of a stop: two that are pending at once would arrive as one."""

STOP_SECONDS = 10.0
"""How long a worker told to stop may take before it is killed with all its children."""

KEPT_FOLDERS = 20
"""How many ended workers keep their logs."""

HELPER_LINE_BYTES = 1024 * 1024

TAIL_BYTES = 64 * 1024
LINE_LENGTH = 500

WORKER_COMMAND = (sys.executable, "-m", "inference.worker")

MARK = "RH_WORKER"
"""In the environment of a worker and of all its children: the worker's folder. The name is short
because engines get no `ROUNDHOUSE_` variables."""

Key = tuple[int, int]
"""Worker id and epoch."""

Helper = asyncio.subprocess.Process

T = TypeVar("T")


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One process for its whole life: a pid alone may belong to another one later."""

    pid: int
    birth: str


@dataclass(slots=True, kw_only=True)
class _Running:
    folder: Path
    record: ProcessRecord
    child: subprocess.Popen[bytes] | None
    """None: adopted, so the child of somebody else."""
    signals: int = 0
    """How many SIGTERMs it got; from the first one it is to end."""
    escalate_at: float = 0.0
    killed: bool = False

    def alive(self) -> bool:
        if self.child is not None:
            return self.child.poll() is None
        return birth_of(self.record.pid) == self.record.birth


class Workers:
    """The workers of one node. Call `adopt` first, `poll` often; nothing here blocks for long."""

    def __init__(self, data: Path, *, command: Sequence[str] = WORKER_COMMAND) -> None:
        self._root = node_folder(data) / "workers"
        self._command = command
        self._running: dict[Key, _Running] = {}
        self._ended: dict[Key, ProcessReport] = {}
        self._unreported: set[Key] = set()

    @property
    def running(self) -> Collection[Key]:
        return self._running.keys()

    @property
    def ended(self) -> Collection[Key]:
        """Those that ended here, or could not be started: they are not started again."""
        return self._ended.keys()

    def adopt(self) -> None:
        """Take over what an earlier agent left: live workers, and ends that were not reported."""
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in self._root.iterdir():
            match = re.fullmatch(r"(\d+)-(\d+)", folder.name)
            if match is None or not folder.is_dir():
                continue
            key = int(match[1]), int(match[2])
            report = _read(folder / "report.json", ProcessReport)
            if report is not None:
                self._ended[key] = report
                if not (folder / "reported").exists():
                    self._unreported.add(key)
                continue
            record = _read(folder / "process.json", ProcessRecord) or _find(folder / "spec.json")
            if record is not None and birth_of(record.pid) == record.birth:
                log.info("Adopted worker %d, epoch %d: process %d.", *key, record.pid)
                self._running[key] = _Running(folder=folder, record=record, child=None)
            else:
                _kill_rest_of(folder)
                self._conclude(key, folder, record, _found_dead(key, folder, record))

    def launch(
        self, assignment: Assignment, *, model_path: str | None, gateway_url: str, listen_host: str
    ) -> None:
        """Start a worker, once per worker id and epoch however often it is asked for."""
        key = assignment.worker_id, assignment.epoch
        if key in self._running or key in self._ended:
            return
        folder = self._folder(key)
        spec = folder / "spec.json"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            content = WorkerSpec(
                assignment=assignment,
                model_path=model_path,
                gateway_url=gateway_url,
                listen_host=listen_host,
                folder=str(folder),
            )
            write_private(spec, msgspec.json.encode(content))
            with open(folder / "worker.log", "ab") as output:
                child = subprocess.Popen(
                    [*self._command, str(spec)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd="/",
                    env=clean_environment() | {MARK: str(folder)},
                    start_new_session=True,
                )
        except OSError as error:
            cause = Cause.DISK if error.errno == errno.ENOSPC else Cause.CRASHED
            self.refuse(key, cause, f"The worker could not be started: {os.strerror(error.errno or 0)}.")
            return
        # A child that ended already is a zombie until polled; it has no birth, and needs none.
        record = ProcessRecord(pid=child.pid, birth=birth_of(child.pid) or "")
        self._running[key] = _Running(folder=folder, record=record, child=child)
        with _logged("note the process of worker %d, epoch %d", *key):
            write_private(folder / "process.json", msgspec.json.encode(record))
        log.info("Started worker %d, epoch %d: process %d.", *key, child.pid)

    def refuse(self, key: Key, cause: Cause, detail: str) -> None:
        """Report that this worker was not started, and why."""
        if key in self._running or key in self._ended:
            return
        report = ProcessReport(worker_id=key[0], epoch=key[1], running=False, cause=cause, detail=detail)
        folder = self._folder(key)
        with _logged("make the folder of worker %d, epoch %d", *key):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._conclude(key, folder, None, report)

    def ask(self, key: Key, wish: Wish, *, drain_seconds: float = 0.0) -> None:
        """Tell a worker to drain or to stop. It cannot be taken back; asking twice does no harm.

        A drain gets one SIGTERM. When `drain_seconds` are over, or for a stop, a second one
        follows, and `STOP_SECONDS` later whatever is left of it is killed.
        """
        worker = self._running.get(key)
        if worker is None or wish is Wish.RUN or not worker.alive():
            return  # one that just ended by itself was not stopped by us
        now = time.monotonic()
        patience = drain_seconds if wish is Wish.DRAIN else SECOND_SIGNAL_SECONDS
        if worker.signals == 0:
            log.info("Asking worker %d, epoch %d to %s.", *key, wish.value)
            self._terminate(worker, now + patience)
        elif worker.signals == 1:
            worker.escalate_at = min(worker.escalate_at, now + patience)

    def poll(self) -> bool:
        """Look at every process once. True when one ended since the last time."""
        now = time.monotonic()
        ended = False
        for key, worker in list(self._running.items()):
            if not worker.alive():
                del self._running[key]
                _kill_rest_of(worker.folder)
                self._conclude(key, worker.folder, worker.record, _how_it_ended(key, worker))
                ended = True
            elif worker.signals and now >= worker.escalate_at:
                self._escalate(key, worker, now)
        return ended

    def reports(self) -> list[ProcessReport]:
        """Every running process, and every end that the gateway has not accepted yet."""
        running = [
            ProcessReport(worker_id=key[0], epoch=key[1], running=True, pid=worker.record.pid)
            for key, worker in self._running.items()
        ]
        return running + [self._ended[key] for key in sorted(self._unreported)]

    def accepted(self, reports: Iterable[ProcessReport]) -> None:
        """The gateway has these: ends among them need not be told again."""
        for report in reports:
            key = report.worker_id, report.epoch
            if not report.running and key in self._unreported:
                self._unreported.discard(key)
                with _logged("note the report of worker %d, epoch %d", *key):
                    (self._folder(key) / "reported").touch()

    def report_again(self, key: Key) -> None:
        """The gateway still asks for a worker that ended: tell it with the next beat."""
        if key in self._ended:
            self._unreported.add(key)

    def prune(self, *, keep: Collection[Key]) -> None:
        """Delete the oldest folders of ended and reported workers, never one of `keep`."""
        old = [key for key in self._ended if key not in self._unreported and key not in keep]
        if len(old) <= KEPT_FOLDERS:
            return
        old.sort(key=lambda key: _modified(self._folder(key) / "report.json"))
        for key in old[:-KEPT_FOLDERS]:
            shutil.rmtree(self._folder(key), ignore_errors=True)
            del self._ended[key]

    def leave(self) -> None:
        """Let every worker run on without this agent."""
        for worker in self._running.values():
            if worker.child is not None and worker.child.poll() is None:
                # It outlives us on purpose; without this Popen warns of a forgotten child.
                worker.child.returncode = 0
        self._running.clear()

    def _folder(self, key: Key) -> Path:
        return self._root / f"{key[0]}-{key[1]}"

    def _terminate(self, worker: _Running, escalate_at: float) -> None:
        worker.signals += 1
        worker.escalate_at = escalate_at
        if worker.alive():
            with suppress(ProcessLookupError):
                os.kill(worker.record.pid, signal.SIGTERM)

    def _escalate(self, key: Key, worker: _Running, now: float) -> None:
        if worker.signals == 1:
            self._terminate(worker, now + STOP_SECONDS)
            return
        log.warning("Worker %d, epoch %d did not end in time and is killed.", *key)
        worker.killed = True
        worker.escalate_at = now + STOP_SECONDS
        with suppress(ProcessLookupError):
            os.killpg(worker.record.pid, signal.SIGKILL)

    def _conclude(self, key: Key, folder: Path, record: ProcessRecord | None, report: ProcessReport) -> None:
        if record is not None:
            log.info("Worker %d, epoch %d ended: %s. %s", *key, report.cause, report.detail)
        else:
            log.warning("Worker %d, epoch %d was not started: %s", *key, report.detail)
        self._ended[key] = report
        self._unreported.add(key)
        with _logged("keep the end of worker %d, epoch %d", *key):
            write_private(folder / "report.json", msgspec.json.encode(report))


def stop_all(data: Path, grace_seconds: float) -> None:
    """Stop every live worker of a data folder whose agent has ended; return when they are gone.

    Each drains for up to `grace_seconds`, all at the same time, and is then stopped.
    The next agent of the folder reports them as stopped.
    """
    workers = Workers(data)
    workers.adopt()
    for key in list(workers.running):
        workers.ask(key, Wish.DRAIN, drain_seconds=grace_seconds)
    while workers.running:
        time.sleep(0.05)
        workers.poll()


def clean_environment() -> dict[str, str]:
    """This process's environment without what only the control plane may know."""
    withheld = ("DJANGO_", "CELERY_", "ROUNDHOUSE_", "PG", "DATABASE_URL", "REDIS_URL")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name == PYTHON_VARIABLE or not name.startswith(withheld)
    }
    # Wherever the child starts, it runs this same code, installed or not.
    root = str(Path(inference.__file__).resolve().parents[1])
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{inherited}" if inherited else root
    return environment


async def start_helper(command: Sequence[str], *, stdin: int = subprocess.DEVNULL) -> Helper:
    """Start a process that belongs to the agent and tells it things on its standard output.

    In a session of its own: Ctrl-C in a terminal reaches the agent, and the agent ends it.
    """
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        cwd="/",
        env=clean_environment(),
        start_new_session=True,
        limit=HELPER_LINE_BYTES,
    )


async def lines_of(helper: Helper) -> AsyncIterator[bytes]:
    """What a helper writes to its standard output, until it closes it. Lines too long are left out."""
    output = helper.stdout
    while output is not None:
        try:
            line = await output.readline()
        except ValueError:
            continue
        if not line:
            return
        yield line


async def end_helper(helper: Helper, *, patience: float = 3.0) -> None:
    """End a helper if it still runs: ask, and when `patience` seconds are over, kill. Reaps it."""
    with suppress(ProcessLookupError):
        if helper.returncode is None and patience > 0:
            helper.terminate()
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await helper.wait()
        if helper.returncode is None:
            os.killpg(helper.pid, signal.SIGKILL)
    await helper.wait()


def birth_of(pid: int) -> str | None:
    """A mark that no other process with this pid ever has; None when it is not alive.

    On Linux that is the boot and the kernel's ticks since then: a wall clock that is set
    must not make a live worker look like another process.
    """
    if sys.platform != "linux":
        try:
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
        except psutil.NoSuchProcess:
            return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the name in parentheses, which may itself hold spaces and parentheses.
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{fields[19].decode()}"


def _find(spec: Path) -> ProcessRecord | None:
    """The process started with this spec: for an agent that was killed before it noted it."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cmdline()[-1:] == [str(spec)] and (birth := birth_of(process.pid)):
                return ProcessRecord(pid=process.pid, birth=birth)
    return None


def _kill_rest_of(folder: Path) -> None:
    """End what an ended supervisor left behind: an orphaned engine keeps its memory and its port.

    They are known by the mark in their environment. Neither pid nor session would do: both are
    given out again, and an unrelated process must never be hit.
    """
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == str(folder):
                process.kill()


def _how_it_ended(key: Key, worker: _Running) -> ProcessReport:
    """The report of a process that ended while it was watched."""
    told = _told(key, worker.folder, worker.record)
    if told is not None:
        return told
    exit_code = worker.child.returncode if worker.child is not None else None
    if worker.signals:
        cause = Cause.STOPPED
        detail = "It did not end in time and was killed." if worker.killed else "It was stopped."
    elif exit_code is None:
        # Adopted, so the exit code went to another parent; by itself it would have written its end.
        cause, detail = Cause.KILLED, "The worker's process was ended from outside."
    elif exit_code < 0:
        cause, detail = Cause.KILLED, f"The worker's process was ended by {_signal_name(-exit_code)}."
    else:
        cause, detail = Cause.CRASHED, f"The worker's process ended with exit code {exit_code}."
    return ProcessReport(
        worker_id=key[0],
        epoch=key[1],
        running=False,
        pid=worker.record.pid,
        exit_code=exit_code,
        cause=cause,
        detail=detail,
        log_tail=log_tail(worker.folder),
    )


def _found_dead(key: Key, folder: Path, record: ProcessRecord | None) -> ProcessReport:
    """The report of a process that ended while no agent watched."""
    return _told(key, folder, record) or ProcessReport(
        worker_id=key[0],
        epoch=key[1],
        running=False,
        pid=record.pid if record is not None else None,
        cause=Cause.VANISHED,
        detail="The worker's process was gone when the agent came back.",
        log_tail=log_tail(folder),
    )


def _told(key: Key, folder: Path, record: ProcessRecord | None) -> ProcessReport | None:
    """What the worker itself wrote about its end."""
    end = _read(folder / "end.json", ProcessReport)
    if end is None:
        return None
    return msgspec.structs.replace(
        end,
        worker_id=key[0],
        epoch=key[1],
        running=False,
        pid=record.pid if record is not None else end.pid,
        log_tail=end.log_tail or log_tail(folder),
    )


def log_tail(folder: Path) -> list[str]:
    """The last lines of the engine's log, or of the supervisor's when the engine said nothing."""
    for name in ("engine.log", "worker.log"):
        try:
            with open(folder / name, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - TAIL_BYTES))
                content = file.read().decode(errors="replace")
        except OSError:
            continue
        lines = [line[:LINE_LENGTH] for line in content.splitlines() if line.strip()]
        if lines:
            return lines[-LOG_TAIL_LINES:]
    return []


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read(path: Path, kind: type[T]) -> T | None:
    """A file that some process wrote; None when it is missing or not whole."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError):
        return None


@contextmanager
def _logged(doing: str, *values: object) -> Iterator[None]:
    """A full or broken disk must not end supervision: memory still has what could not be written."""
    try:
        yield
    except OSError as error:
        log.error("Could not %s: %s.", doing % values, error.strerror)
