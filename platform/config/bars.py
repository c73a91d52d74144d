"""Progress at a terminal: one line that is written over; in a pipe, a line for each step and each tenth."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Protocol

from inference.protocol import Progress
from inference.words import progress_in_words

BAR_WIDTH = 24


class Stream(Protocol):
    """Where it is written: what Django gives a command."""

    def write(self, msg: str, style_func: Callable[[str], str], ending: str) -> None: ...

    def flush(self) -> None: ...

    def isatty(self) -> bool: ...


class Bar:
    """Shows each `Progress` that it is given. `close` leaves the last one standing."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._step: tuple[str, int] | None = None
        self._began = (0.0, 0)
        self._written = 0

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._step is None or self._step[0] != progress.step:
            self._began = (now, progress.done)
            self.close()
        words = progress_in_words(
            step=progress.step,
            done=progress.done,
            total=progress.total,
            unit=progress.unit,
            files_done=progress.files_done,
            files_total=progress.files_total,
            seconds_left=self._seconds_left(progress, now),
        )
        tenth = 10 * progress.done // progress.total if progress.total else 0
        if self._live:
            self._write_over(f"{_drawn(progress)}{words}")
        elif self._step != (progress.step, tenth):
            self._say(f"{words}\n")
        self._step = (progress.step, tenth)

    def close(self) -> None:
        if self._written:
            self._say("\n")
            self._written = 0

    def _seconds_left(self, progress: Progress, now: float) -> float | None:
        seconds, got = now - self._began[0], progress.done - self._began[1]
        if seconds <= 0 or got <= 0 or progress.done > progress.total:
            return None
        return (progress.total - progress.done) * seconds / got

    def _write_over(self, line: str) -> None:
        # One short of the width: a full line would make the next one scroll.
        line = line[: shutil.get_terminal_size().columns - 1]
        self._say("\r" + line.ljust(self._written))
        self._written = len(line)

    def _say(self, text: str) -> None:
        # Without Django's red for what goes to stderr.
        self._stream.write(text, str, "")
        self._stream.flush()


def _drawn(progress: Progress) -> str:
    if not progress.total:
        return ""
    full = min(BAR_WIDTH, BAR_WIDTH * progress.done // progress.total)
    return f"[{'#' * full}{'.' * (BAR_WIDTH - full)}] "
