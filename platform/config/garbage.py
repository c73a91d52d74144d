"""When the collector looks at all that lives. Everybody waits meanwhile: with ten thousand open streams for a
second or more, and left alone it comes whenever a quarter has been added."""

from __future__ import annotations

import gc

YOUNG = (2000, 10)
"""Objects made until the youngest are looked at, and how often until those that survived once are: what
most requests leave, in a millisecond or two."""
NEVER = 2**31 - 1
QUIET_REQUESTS = 100
"""With so many open at most, it takes some 10 ms."""
PAUSE_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 3600.0
"""Where it is never quiet. What waits for it, circles that outlived their request, is little."""


class Collector:
    """Looks at everything in quiet moments only. One process has one."""

    def __init__(self, now: float) -> None:
        """Seconds by any clock that never goes back. What lives by now is taken to live for ever."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(*YOUNG, NEVER)
        self._looked_at = now

    def look(self, now: float, open_requests: int) -> None:
        """Called every second or so."""
        waited = now - self._looked_at
        quiet = open_requests <= QUIET_REQUESTS and waited >= PAUSE_SECONDS
        if quiet or waited >= LONGEST_PAUSE_SECONDS:
            self._looked_at = now
            gc.collect()
