"""Requests that end the workers that try to answer them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

DEATHS = 2
"""So many workers may end with a request before it is refused."""
REFUSED_SECONDS = 600.0
KEPT = 1000
"""Requests remembered, the oldest forgotten first."""


class Poison:
    """What was being answered when workers died. A request is known by its fingerprint, a hash of whoever
    asks and what: the same words of another key are another request."""

    __slots__ = ("_clock", "_deaths", "_forget_at")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deaths: OrderedDict[int, tuple[float, frozenset[tuple[int, int]]]] = OrderedDict()
        self._forget_at = 0.0
        """From then on none of them matters."""

    def note_death(self, fingerprint: int, worker_id: int, epoch: int) -> bool:
        """A worker died while it had this request. True when that makes it refused."""
        since, workers = self._deaths.pop(fingerprint, (0.0, frozenset[tuple[int, int]]()))
        now = self._clock()
        if now - since > REFUSED_SECONDS:
            workers = frozenset()
        workers |= {(worker_id, epoch)}
        self._deaths[fingerprint] = (now, workers)
        self._forget_at = now + REFUSED_SECONDS
        if len(self._deaths) > KEPT:
            self._deaths.popitem(last=False)
        return len(workers) == DEATHS

    def refuses(self, fingerprint: Callable[[], int]) -> bool:
        """Is it to be refused? Asks for the fingerprint only if a worker died lately."""
        if not self._deaths:
            return False
        if self._clock() > self._forget_at:
            self._deaths.clear()
            return False
        since, workers = self._deaths.get(fingerprint(), (0.0, ()))
        return len(workers) >= DEATHS and self._clock() - since <= REFUSED_SECONDS
