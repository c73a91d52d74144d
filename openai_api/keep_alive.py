"""Open streams, each told every few seconds that it is open still."""

from __future__ import annotations

import asyncio
from typing import Protocol

PARTS = 1000
"""A round goes through the streams in so many parts: ten thousand at once, or a hundred, would hold up all
others."""
NAP_SECONDS = 0.1
"""Parts without streams are passed over, so long at a time."""


class KeptAlive(Protocol):
    """An open stream."""

    def keep_alive(self) -> None: ...


class KeepAlive:
    """Calls each stream once in `seconds`, and the first time within as much. One event loop owns it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._parts: list[set[KeptAlive]] = [set() for _ in range(PARTS)]
        self._part_of: dict[KeptAlive, set[KeptAlive]] = {}
        self._next = 0

    def add(self, stream: KeptAlive) -> None:
        self._next = (self._next + 1) % PARTS
        part = self._part_of[stream] = self._parts[self._next]
        part.add(stream)

    def discard(self, stream: KeptAlive) -> None:
        part = self._part_of.pop(stream, None)
        if part is not None:
            part.remove(stream)

    async def run(self) -> None:
        owed = 0.0
        while True:
            for part in self._parts:
                owed += self.seconds / PARTS
                if part or owed >= NAP_SECONDS:
                    await asyncio.sleep(owed)
                    owed = 0.0
                for stream in part:
                    stream.keep_alive()
