"""The rule of counting: GCRA, in the form of a bucket that leaks. Pure, and in whole numbers only.

A bucket's level says how much was used lately. It leaks at the limit's rate, `amount` per period, and
never below nothing; what would lift it above `burst` is refused and adds nothing. So in any stretch of
time t at most `burst + amount * t / period` is let through, and at most `burst` at once.

Time goes in ticks, and the level is kept in parts: one request, or token, is as many parts as the period
has ticks, so that each tick leaks `amount` parts exactly. `scripts` does the same in Lua, whose numbers
are doubles: the largest level, 10 * 10^9 * 864000, is less than 2^53.
"""

from __future__ import annotations

from dataclasses import dataclass

from registry.models import Per

TICKS: dict[str, tuple[int, int]] = {
    Per.SECOND: (1, 1_000),
    Per.MINUTE: (1, 60_000),
    Per.HOUR: (10, 360_000),
    Per.DAY: (100, 864_000),
}
"""Milliseconds of a tick, and ticks of the period. Coarser where the period is longer: 1/600 000 of a day is
as good as 1/60 000 of a minute, and the numbers stay small."""

LEVEL_MAX = 2**53 - 1


@dataclass(frozen=True, slots=True)
class Pace:
    """How a bucket fills and leaks."""

    tick_ms: int
    parts: int
    """Of one request or token; also the ticks of the period."""
    amount: int
    """Parts that leak per tick."""
    burst: int
    """How much fits into an empty bucket."""

    @classmethod
    def of(cls, per: str, amount: int, burst: int) -> Pace:
        tick_ms, parts = TICKS[per]
        return cls(tick_ms, parts, amount, burst)

    def leaked(self, level: int, ticks: int) -> int:
        """The level after so many ticks."""
        return max(0, level - max(0, ticks) * self.amount)

    def added(self, level: int, count: int) -> int:
        """The level with `count` more; less where it is negative."""
        return min(LEVEL_MAX, max(0, level + count * self.parts))

    def fits(self, level: int, cost: int) -> bool:
        """Is there room for `cost`? What costs nothing is not refused, even where others overdrew."""
        return cost == 0 or level + cost * self.parts <= self.burst * self.parts

    def remaining(self, level: int) -> int:
        """How much fits now."""
        return max(0, (self.burst * self.parts - level) // self.parts)

    def used(self, level: int) -> int:
        """How much of the burst is taken."""
        return -(-level // self.parts)

    def wait_ms(self, level: int, cost: int) -> int:
        """How long until `cost` fits, if nothing else comes; 0: now."""
        return self._ticks(level + (cost - self.burst) * self.parts) * self.tick_ms

    def reset_ms(self, level: int) -> int:
        """How long until the bucket is empty, if nothing comes."""
        return self._ticks(level) * self.tick_ms

    def _ticks(self, parts: int) -> int:
        return max(0, -(-parts // self.amount))
