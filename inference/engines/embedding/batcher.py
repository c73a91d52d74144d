"""Dynamic batching: the threads that run the model, one step each at a time, and the queue in front of them.

Requests that come within two milliseconds, or while a step runs, share the next steps. A request of
many inputs gives a few to each round, so that a single one never waits behind two thousand others.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inference.engines.base import EngineError
from inference.engines.embedding.loading import Encode
from inference.engines.embedding.tokens import Piece
from inference.protocol import Load

logger = logging.getLogger("roundhouse.engine")

COLLECT_SECONDS = 0.002
"""How long a first request waits for others to share its step."""
TURN = 8
"""Inputs of one request that go before the next request's."""
FAILURES = 3
"""So many failed steps in a row mean that none will succeed any more."""

Row = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(slots=True, eq=False)
class _Job:
    """One request's pieces and what became of them."""

    pieces: Sequence[Piece]
    future: asyncio.Future[Row]
    rows: list[Row | None]
    arrived: float
    next: int = 0
    """The first piece that was not taken yet."""
    left: int = 0
    """Pieces without a row."""


@dataclass(slots=True, eq=False)
class _Taken:
    job: _Job
    at: int
    piece: Piece = field(init=False)

    def __post_init__(self) -> None:
        self.piece = self.job.pieces[self.at]


class Batcher:
    """Runs pieces through `encode`. Made and asked on one event loop; `start` begins its threads.

    `lanes`: how many steps run at a time. `padded`: a step costs as if all its pieces were as long as the
    longest.
    """

    def __init__(
        self,
        encode: Encode,
        *,
        batch_tokens: int,
        loop: asyncio.AbstractEventLoop,
        padded: bool = True,
        lanes: int = 1,
    ) -> None:
        self._encode = encode
        self._batch_tokens = batch_tokens
        self._padded = padded
        self._loop = loop
        self._wake = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._open = 0
        self._in_step: list[set[_Job]] = [set() for _ in range(lanes)]
        self._steps = 0
        self._tokens = 0
        self._failures = 0
        """Failed steps in a row."""
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._run, args=(in_step,), name="engine", daemon=True)
            for in_step in self._in_step
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    async def run(self, pieces: Sequence[Piece]) -> Row:
        """One row per piece. A caller that goes away takes what was not begun out of the queue.

        Raises EngineError when the step failed.
        """
        job = _Job(
            pieces=pieces,
            future=self._loop.create_future(),
            rows=[None] * len(pieces),
            arrived=time.monotonic(),
            left=len(pieces),
        )
        with self._wake:
            if self._stopping or not self.alive():
                raise EngineError("The engine is stopping.")
            self._jobs.append(job)
            self._open += 1
            self._wake.notify()
        try:
            return await job.future
        finally:
            with self._wake:
                self._open -= 1
                if job in self._jobs:
                    self._jobs.remove(job)

    def report(self) -> Load:
        with self._wake:
            running = min(len(set().union(*self._in_step)), self._open)
            return Load(running=running, waiting=self._open - running, steps=self._steps, tokens=self._tokens)

    def alive(self) -> bool:
        """False once one of the threads has ended."""
        return all(thread.is_alive() for thread in self._threads)

    def stop(self, timeout: float) -> None:
        until = time.monotonic() + timeout
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    # -- the threads

    def _run(self, in_step: set[_Job]) -> None:
        while self._failures < FAILURES and (taken := self._collect(in_step)) is not None:
            for step in steps(taken, self._batch_tokens, padded=self._padded):
                try:
                    rows = self._encode([each.piece for each in step])
                except Exception as error:
                    logger.exception("A step of %d inputs failed.", len(step))
                    self._tell(step, None, error)
                    continue
                self._tell(step, rows, None)
            with self._wake:
                in_step.clear()
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
            left = list(self._jobs)
            self._jobs.clear()
        self._call(self._fail, left)

    def _collect(self, in_step: set[_Job]) -> list[_Taken] | None:
        """The next inputs to run, at most one step's tokens of them; None when it is time to end."""
        with self._wake:
            while not self._jobs and not self._stopping:
                self._wake.wait()
            if self._stopping:
                return None
            deadline = self._jobs[0].arrived + COLLECT_SECONDS
            while self._waiting_tokens() < self._batch_tokens:
                left = deadline - time.monotonic()
                if left <= 0 or self._stopping:
                    break
                self._wake.wait(left)
            taken: list[_Taken] = []
            tokens = 0
            full = False
            while self._jobs and not full:
                job = self._jobs.popleft()
                first = job.next
                for at in range(first, min(first + TURN, len(job.pieces))):
                    tokens += len(job.pieces[at].ids)
                    full = tokens > self._batch_tokens
                    if full and taken:
                        break
                    taken.append(_Taken(job, at))
                    job.next = at + 1
                if job.next == first:
                    self._jobs.appendleft(job)  # the next step begins with what found no room in this
                elif job.next < len(job.pieces):
                    self._jobs.append(job)
            in_step.update(each.job for each in taken)
            if self._jobs:
                self._wake.notify()  # they may all have woken this thread
            return taken

    def _waiting_tokens(self) -> int:
        tokens = 0
        for job in self._jobs:
            for piece in job.pieces[job.next :]:
                tokens += len(piece.ids)
                if tokens >= self._batch_tokens:
                    return tokens
        return tokens

    def _tell(self, step: list[_Taken], rows: Row | None, error: Exception | None) -> None:
        with self._wake:
            self._steps += 1
            self._failures = self._failures + 1 if rows is None else 0
            if rows is not None:
                self._tokens += sum(len(each.piece.ids) for each in step)
        self._call(self._deliver, step, rows, error)

    def _call(self, callback: Any, *about: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *about)
        except RuntimeError:
            logger.debug("The event loop closed before the engine did.")

    # -- on the event loop

    def _deliver(self, step: list[_Taken], rows: Row | None, error: Exception | None) -> None:
        for place, each in enumerate(step):
            job = each.job
            if job.future.done():
                continue
            if rows is None:
                job.future.set_exception(EngineError(f"A step failed: {type(error).__name__}."))
                continue
            job.rows[each.at] = rows[place]
            job.left -= 1
            if job.left == 0:
                job.future.set_result(np.stack([row for row in job.rows if row is not None]))

    def _fail(self, jobs: list[_Job]) -> None:
        for job in jobs:
            if not job.future.done():
                job.future.set_exception(EngineError("The engine ended."))


def steps(taken: list[_Taken], batch_tokens: int, *, padded: bool) -> list[list[_Taken]]:
    """Cut into steps of like lengths, longest first, none of more than `batch_tokens` with its padding, if
    there is any."""
    made: list[list[_Taken]] = []
    tokens = 0
    for each in sorted(taken, key=lambda each: (each.piece.prompt_tokens, -len(each.piece.ids))):
        first = made[-1][0].piece if made else each.piece
        tokens += len(first.ids if padded else each.piece.ids)
        if not made or tokens > batch_tokens or first.prompt_tokens != each.piece.prompt_tokens:
            made.append([])
            tokens = len(each.piece.ids)
        made[-1].append(each)
    return made
