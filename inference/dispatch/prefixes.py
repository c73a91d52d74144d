"""Which prompts' beginnings a worker probably has in its cache still."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

KEPT_BLOCKS = 8192
"""About a million tokens: more than the caches of most engines."""
LIFE_SECONDS = 600.0
"""What was not asked for so long has probably made room for others."""


class Prefixes:
    """The blocks (`Demand.blocks`) that were sent to one worker, the longest unused forgotten first, much
    as the engine itself does."""

    __slots__ = ("_clock", "_sent")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sent: OrderedDict[int, float] = OrderedDict()

    def matched(self, blocks: Sequence[int]) -> int:
        """How many of a prompt's first blocks are among them."""
        sent = self._sent
        if not sent:
            return 0
        oldest = self._clock() - LIFE_SECONDS
        for count, block in enumerate(blocks):
            if sent.get(block, float("-inf")) < oldest:
                return count
        return len(blocks)

    def note(self, blocks: Sequence[int]) -> None:
        """A prompt of these blocks is sent to the worker."""
        now = self._clock()
        sent = self._sent
        # The last first: of a chain the beginning is forgotten last, without it the rest is of no use.
        for block in reversed(blocks):
            sent[block] = now
            sent.move_to_end(block)
        while len(sent) > KEPT_BLOCKS:
            sent.popitem(last=False)
