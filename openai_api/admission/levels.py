"""What this gateway knows of the counts: all of them while Redis is away, a copy of Redis' while it is there.

So whoever has used up a limit has still used it up when Redis goes, and when it comes back empty: what is
known here is then written there, the higher of both counting.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from openai_api.admission.pace import Pace


def milliseconds() -> int:
    return time.monotonic_ns() // 1_000_000


class Level:
    """One bucket. `level` is as of `at`, in milliseconds of this process's own clock."""

    __slots__ = ("at", "level", "pace")

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.level = 0
        self.at = 0

    def now(self, now: int) -> int:
        """The level as it is now."""
        tick = self.pace.tick_ms
        return self.pace.leaked(self.level, now // tick - self.at // tick)

    def set(self, level: int, now: int) -> None:
        self.level = level
        self.at = now

    def add(self, count: int, now: int) -> None:
        self.set(self.pace.added(self.now(now), count), now)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What must be written to a Redis that has lost it."""

    levels: list[tuple[bytes, Pace, int]]
    slots: list[tuple[bytes, str]]


class Levels:
    """All buckets that were used here lately, by their name in Redis."""

    def __init__(self) -> None:
        self._levels: dict[bytes, Level] = {}
        self._slots: dict[bytes, set[str]] = {}

    def __len__(self) -> int:
        return len(self._levels)

    def level(self, name: bytes, pace: Pace) -> Level:
        """The bucket of that name, which follows this pace from now on: its limit may have been changed."""
        found = self._levels.get(name)
        if found is None:
            found = self._levels[name] = Level(pace)
        elif found.pace != pace:
            now = milliseconds()
            found.set(found.now(now), now)
            found.pace = pace
        return found

    def take_slot(self, name: bytes, request_id: str) -> None:
        """A parallel request of this bucket was let through here."""
        self._slots.setdefault(name, set()).add(request_id)

    def end_slot(self, name: bytes, request_id: str) -> None:
        running = self._slots.get(name)
        if running is not None:
            running.discard(request_id)
            if not running:
                del self._slots[name]

    def slots_taken(self, name: bytes) -> int:
        return len(self._slots.get(name, ()))

    def snapshot(self) -> Snapshot:
        now = milliseconds()
        return Snapshot(
            levels=[
                (name, one.pace, level) for name, one in self._levels.items() if (level := one.now(now)) > 0
            ],
            slots=self.running(),
        )

    def running(self) -> list[tuple[bytes, str]]:
        """Parallel requests by their buckets."""
        return [(name, request_id) for name, running in self._slots.items() for request_id in running]

    def forget_empty(self) -> int:
        """Drop buckets that have leaked empty; returns how many. Who kept one must look it up again."""
        now = milliseconds()
        empty = [name for name, one in self._levels.items() if one.now(now) == 0]
        for name in empty:
            del self._levels[name]
        return len(empty)
