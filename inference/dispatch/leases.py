"""Slots held by requests. All of it belongs to one event loop, so there are no locks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from inference.dispatch.breaker import Breaker
from inference.dispatch.explanations import Choice
from inference.dispatch.prefixes import Prefixes
from inference.dispatch.views import WorkerView
from inference.protocol import Load

FRESH_SECONDS = 2.0
"""A report counts in full for this long."""
FADE_SECONDS = 6.0
"""After that it loses weight, and none is left this much later."""
KV_FULL = 0.95
"""KV cache in use from which a worker takes nothing new."""
DELAY_SECONDS = 1.0
"""A report may be this much older than its time stamp says: beats are written in batches."""
SAMPLES = 24
"""Peaks of own leases kept, one per refresh (0.5 s)."""
SAMPLE_SECONDS = 0.4
"""Refreshes that come sooner (`Fleet.look`) are no reason to forget older peaks, which reports may still have
in them."""
USUAL_WORK = 1000.0
"""Taken for another gateway's request (`Demand.work`) while there is none of our own to compare with."""


class Tally:
    """What this process knows of one worker's load: its own leases exactly, the others' from reports.

    A report counts our own requests too. Those that may be in it are taken off again, the most we had
    since it was made: to believe in too much load would leave a worker idle until its next beat, too
    little only makes the worker queue a request for a moment.
    """

    __slots__ = (
        "_kv_use",
        "_peak",
        "_peaks",
        "_reported",
        "_reported_at",
        "_unreachable_at",
        "_work",
        "breaker",
        "given",
        "leases",
        "others",
        "prefixes",
        "speed",
        "turn",
        "usable",
        "worker",
    )

    def __init__(self, worker: WorkerView) -> None:
        self.worker = worker
        self.leases = 0
        self.given = 0
        """Leases since the beginning."""
        self.others = 0.0
        self.speed = worker.speed
        self.usable = True
        """False while it is unreachable or its KV cache is full."""
        self.breaker: Breaker | None = None
        """None until it fails for the first time."""
        self.prefixes = Prefixes()
        self.turn = 0.0
        self._work = 0
        self._peak = 0
        self._peaks: deque[tuple[float, int]] = deque(maxlen=SAMPLES)
        self._reported = 0
        self._reported_at = float("-inf")
        self._kv_use = 0.0
        self._unreachable_at: float | None = None

    @property
    def load(self) -> float:
        return self.leases + self.others

    @property
    def trusted(self) -> bool:
        """False while it fails so often that others are asked, if there are any."""
        return self.breaker is None or self.breaker.lets(self.leases)

    @property
    def breaker_closed(self) -> bool:
        return self.breaker is None or self.breaker.closed

    @property
    def work(self) -> float:
        """What our leases cost it (`Demand.work`), and others' requests as much as ours do on average."""
        if not self.others:
            return self._work
        return self._work + self.others * (self._work / self.leases if self.leases else USUAL_WORK)

    @property
    def slots(self) -> int:
        return self.worker.slots

    @property
    def kv_use(self) -> float:
        return self._kv_use

    @property
    def reachable(self) -> bool:
        return self._unreachable_at is None

    @property
    def free(self) -> bool:
        """True when it may get one more request: a whole slot is left."""
        return self.usable and self.leases + self.others <= self.worker.slots - 1

    def take(self, work: int) -> None:
        self.leases += 1
        self.given += 1
        self._work += work
        if self.leases > self._peak:
            self._peak = self.leases

    def give_back(self, work: int) -> None:
        self.leases -= 1
        self._work -= work

    def report(self, load: Load, reported_at: float, now: float) -> None:
        """A load that was true at `reported_at`; older than what is known, it is ignored."""
        if reported_at <= self._reported_at:
            return
        self._reported_at = reported_at
        self._kv_use = load.kv_use
        self._reported = max(0, load.running + load.waiting - self._own_since(reported_at - DELAY_SECONDS))
        if self._unreachable_at is not None and reported_at > self._unreachable_at:
            self._unreachable_at = None
        self._weigh(now)

    def refresh(self, worker: WorkerView, now: float) -> None:
        """A new snapshot has this worker as `worker`."""
        self.worker = worker
        self.speed = worker.speed
        load = Load(running=worker.running, waiting=worker.waiting, kv_use=worker.kv_use)
        self.report(load, worker.reported_at, now)

    def age(self, now: float) -> None:
        """Time has passed: note our peak, twice a second, and let the last report lose weight."""
        if not self._peaks or now - self._peaks[-1][0] >= SAMPLE_SECONDS:
            self._peaks.append((now, self._peak))
            self._peak = self.leases
        self._weigh(now)

    def mark_unreachable(self, now: float) -> None:
        """It gets nothing until a report newer than `now` arrives."""
        self._unreachable_at = now
        self.usable = False

    def _own_since(self, instant: float) -> int:
        """The most leases we had at any time after `instant`."""
        most = self._peak
        for sampled_at, peak in self._peaks:
            if sampled_at >= instant and peak > most:
                most = peak
        return most

    def _weigh(self, now: float) -> None:
        age = now - self._reported_at
        weight = 1.0 if age <= FRESH_SECONDS else max(0.0, 1.0 - (age - FRESH_SECONDS) / FADE_SECONDS)
        self.others = self._reported * weight
        self.usable = self._unreachable_at is None and not (self._kv_use >= KV_FULL and weight > 0)


class Lease:
    """A slot held by a request. Whoever has it releases it in a `finally`."""

    __slots__ = ("_freed", "_tally", "_work", "choice", "queue_seconds", "worker")

    def __init__(
        self,
        tally: Tally,
        work: int,
        queue_seconds: float,
        choice: Choice,
        freed: Callable[[int], None],
    ) -> None:
        tally.take(work)
        self.choice = choice
        self._work = work
        self.worker = tally.worker
        self.queue_seconds = queue_seconds
        self._tally: Tally | None = tally
        self._freed = freed

    def failed(self) -> bool:
        """The worker failed this request. True when it is thereby kept from others for a while."""
        tally = self._tally
        if tally is None:
            return False
        if tally.breaker is None:
            tally.breaker = Breaker()
        return tally.breaker.failed()

    def succeeded(self) -> None:
        """The worker answered."""
        if self._tally is not None and self._tally.breaker is not None:
            self._tally.breaker.succeeded()

    def release(self) -> None:
        """Give the slot back and wake the first that waits for one; a second call does nothing."""
        tally = self._tally
        if tally is not None:
            self._tally = None
            tally.give_back(self._work)
            self._freed(self.worker.deployment_id)
