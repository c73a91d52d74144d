from __future__ import annotations

from collections.abc import Callable, Sequence

from inference.dispatch.demand import Demand
from inference.dispatch.policies.base import C


def round_robin(candidates: Sequence[C], demand: Demand, random: Callable[[], float]) -> C:
    """Each in its turn, as often as it has slots, well mixed: nginx's smooth weighted round robin."""
    total = 0
    for candidate in candidates:
        candidate.turn += candidate.slots
        total += candidate.slots
    chosen = max(candidates, key=_turn)
    chosen.turn -= total
    return chosen


def _turn(candidate: C) -> float:
    return candidate.turn
