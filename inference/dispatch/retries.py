"""How much of the load may be second tries: without a bound, workers in trouble get the most requests."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

WINDOW_SECONDS = 10.0
SHARE = 0.1
"""Of the requests in a window, so many may be tried again."""
LEAST = 3
"""So many may in any case."""


LONGEST_PAUSE_SECONDS = 0.05


def pause() -> float:
    """Seconds before a second try: all that a worker had when it died do not come to the next one at once."""
    return random.uniform(0, LONGEST_PAUSE_SECONDS)  # noqa: S311 - spreads retries, hides nothing


class RetryBudget:
    """Of one gateway. Windows follow one another; at the beginning of one the requests of the last count."""

    __slots__ = ("_before", "_clock", "_ends", "_requests", "_retries", "granted", "refused")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends = clock() + WINDOW_SECONDS
        self._before = 0
        self._requests = 0
        self._retries = 0
        self.granted = 0
        self.refused = 0

    def note_request(self) -> None:
        """A request comes for the first time."""
        self._turn()
        self._requests += 1

    def take(self) -> bool:
        """May a request be tried once more?"""
        self._turn()
        if self._retries >= max(LEAST, SHARE * max(self._before, self._requests)):
            self.refused += 1
            return False
        self._retries += 1
        self.granted += 1
        return True

    def _turn(self) -> None:
        now = self._clock()
        if now >= self._ends:
            self._before = self._requests if now < self._ends + WINDOW_SECONDS else 0
            self._requests = self._retries = 0
            self._ends = now + WINDOW_SECONDS
