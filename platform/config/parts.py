"""The processes that `manage.py up` keeps running: start, watch, restart, stop, one class for all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import psutil

LOG_LIMIT_BYTES = 16 * 1024 * 1024
STEADY_SECONDS = 10.0
"""A part that lived this long had started well: its next restart is immediate again."""
MAX_PAUSE_SECONDS = 30.0


@dataclass(slots=True)
class Part:
    """One process: its command, its log, its pid record.

    It gets a session of its own, so that Ctrl-C in the terminal reaches only `up`, which then stops
    the parts in order. The record (`run/<name>.json`: pid and start time) lets a later `up` find
    what a killed one left behind, and never mistakes a stranger with the same pid for it.
    """

    name: str
    command: list[str]
    folder: Path
    environment: dict[str, str]
    stop_seconds: float = 10.0
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    started: float = 0.0
    not_before: float = 0.0
    log: Path = field(init=False)
    record: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.folder / "log" / f"{self.name}.log"
        self.record = self.folder / "run" / f"{self.name}.json"

    def start(self) -> None:
        self.log.parent.mkdir(mode=0o700, exist_ok=True)
        self.record.parent.mkdir(mode=0o700, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > LOG_LIMIT_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        with open(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        self.started = time.monotonic()
        started_at = psutil.Process(self.process.pid).create_time()
        self.record.write_text(json.dumps({"pid": self.process.pid, "started_at": started_at}))

    def ended(self) -> int | None:
        """The exit code once it has ended, None while it runs."""
        return self.process.poll() if self.process else None

    def keep_alive(self) -> bool:
        """Restart it if it ended, after a pause that grows while it keeps ending at once.

        Returns True when it was found ended just now.
        """
        now = time.monotonic()
        if self.process is not None and self.ended() is not None:
            self.process = None
            self.failures = 0 if now - self.started > STEADY_SECONDS else self.failures + 1
            pause = 0.0 if self.failures == 0 else min(2.0 ** (self.failures - 1), MAX_PAUSE_SECONDS)
            self.not_before = now + pause
            return True
        if self.process is None and now >= self.not_before:
            self.start()
        return False

    def stop(self) -> None:
        """Ask, wait, kill, wait."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(self.stop_seconds)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self.process = None
        self.record.unlink(missing_ok=True)

    def last_lines(self, count: int = 15) -> list[str]:
        """The end of its log, for people."""
        try:
            with open(self.log, encoding="utf-8", errors="replace") as log:
                return [line.rstrip("\n") for line in deque(log, maxlen=count)]
        except FileNotFoundError:
            return []


def recorded_process(record: Path) -> psutil.Process | None:
    """The process that a record names, if that very process still runs."""
    try:
        facts = json.loads(record.read_text())
        process = psutil.Process(facts["pid"])
        # A pid is used again; a pid with the same start time is the same process.
        return process if abs(process.create_time() - facts["started_at"]) < 1 else None
    except (FileNotFoundError, json.JSONDecodeError, KeyError, psutil.NoSuchProcess):
        return None


def stop_recorded(record: Path, seconds: float = 10.0) -> bool:
    """Stop what a killed `up` left running; True if there was something."""
    process = recorded_process(record)
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
            try:
                process.wait(seconds)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait(5)
    record.unlink(missing_ok=True)
    return process is not None
