"""What a preparation and its conversion say of themselves, a few times per second at most."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from inference.protocol import Cause, CopyPhase, CopyReport, Progress

_INTERVAL = 0.2


class Preparation(CopyReport, frozen=True, kw_only=True, omit_defaults=True):
    """One line of output: a `CopyReport`, and where the model lies once it is ready."""

    path: str = ""


class Step(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """So many of the tensors are done, or the last part (`save`) has begun."""

    step: str
    done: int = 0
    total: int = 0


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The last line of a conversion that exits 1."""

    cause: Cause
    detail: str


Line = Step | Failed


class Reporter:
    """Turns steps into `CopyReport`s. A new step is reported at once, the rest at most 5 times a second."""

    def __init__(self, report: Callable[[CopyReport], None], model_id: int) -> None:
        self._report = report
        self._model_id = model_id
        self._step = ""
        self._sent_at = 0.0

    def progress(
        self,
        phase: CopyPhase,
        step: str,
        done: int = 0,
        total: int = 0,
        *,
        unit: str = "bytes",
        files_done: int = 0,
        files_total: int = 0,
    ) -> None:
        now = time.monotonic()
        finished = total > 0 and done >= total
        if step == self._step and not finished and now - self._sent_at < _INTERVAL:
            return
        self._step, self._sent_at = step, now
        progress = Progress(
            step=step, done=done, total=total, unit=unit, files_done=files_done, files_total=files_total
        )
        self._report(CopyReport(model_id=self._model_id, phase=phase, progress=progress))

    def ready(self, *, size_bytes: int, sha256: str) -> None:
        self._report(
            CopyReport(model_id=self._model_id, phase=CopyPhase.READY, size_bytes=size_bytes, sha256=sha256)
        )
