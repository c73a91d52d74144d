from __future__ import annotations

from collections.abc import Callable, Sequence

from inference.dispatch.demand import Demand
from inference.dispatch.policies.base import C, usual_speed


def lottery(candidates: Sequence[C], demand: Demand, random: Callable[[], float]) -> C:
    """A worker at random, weighted by measured speed."""
    usual = usual_speed(candidates)
    total = 0.0
    for candidate in candidates:
        total += candidate.speed if candidate.speed > 0 else usual
    drawn = random() * total
    for candidate in candidates:
        drawn -= candidate.speed if candidate.speed > 0 else usual
        if drawn < 0:
            return candidate
    # Rounding may leave a trace of `drawn` after the last one.
    return candidates[-1]
