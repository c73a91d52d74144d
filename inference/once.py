"""Starting what many may ask to be started at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Once:
    """Calls `start` for the first who asks; those who ask meanwhile, or later, share that call. One that
    failed is told to all who wait for it, and the next who asks tries again."""

    def __init__(self, start: Callable[[], Awaitable[None]]) -> None:
        self._start = start
        self._starting: asyncio.Future[None] | None = None

    async def __call__(self) -> None:
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        starting = self._starting
        try:
            await asyncio.shield(starting)
        except Exception:
            if self._starting is starting:
                self._starting = None
            raise

    def forget(self) -> None:
        """It was stopped: the next who asks starts it."""
        self._starting = None
