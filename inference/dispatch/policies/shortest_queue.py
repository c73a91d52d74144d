from __future__ import annotations

from collections.abc import Callable, Sequence

from inference.dispatch.demand import Demand
from inference.dispatch.policies.base import C, least, usual_speed


def shortest_queue(candidates: Sequence[C], demand: Demand, random: Callable[[], float]) -> C:
    """The worker with the fewest requests per unit of speed."""
    usual = usual_speed(candidates)
    return least(candidates, lambda one: one.load / (one.speed if one.speed > 0 else usual), random)
