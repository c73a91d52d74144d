"""Keeping requests off a worker that keeps failing them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

FAILURES = 5
WITHIN_SECONDS = 30.0
"""So many failures in so long open the breaker."""
OPEN_SECONDS = 10.0
"""For this long then nothing goes to the worker; doubled with each probe that fails."""
LONGEST_SECONDS = 120.0


class Breaker:
    """Of one worker: closed, open for a while, then half open: one request at a time goes through, and how
    that one ends decides."""

    __slots__ = ("_clock", "_failures", "_open_seconds", "_open_until")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: deque[float] = deque(maxlen=FAILURES)
        self._open_until: float | None = None
        self._open_seconds = OPEN_SECONDS

    def lets(self, leases: int) -> bool:
        """May the worker, which has so many requests of ours, get one more?"""
        if self._open_until is None:
            return True
        return leases == 0 and self._clock() >= self._open_until

    @property
    def closed(self) -> bool:
        return self._open_until is None

    def failed(self) -> bool:
        """The worker failed a request. True when that opened the breaker, for the first time or again."""
        now = self._clock()
        if self._open_until is None:
            self._failures.append(now)
            if len(self._failures) < FAILURES or now - self._failures[0] > WITHIN_SECONDS:
                return False
        elif now < self._open_until:
            return False  # it was sent before
        else:
            self._open_seconds = min(2 * self._open_seconds, LONGEST_SECONDS)
        self._failures.clear()
        self._open_until = now + self._open_seconds
        return True

    def succeeded(self) -> None:
        """The worker answered a request. While the breaker is open that was an older one and says nothing."""
        if self._open_until is not None and self._clock() >= self._open_until:
            self._open_until = None
            self._open_seconds = OPEN_SECONDS
