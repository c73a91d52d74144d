from __future__ import annotations

from collections.abc import Callable, Sequence

from inference.dispatch.demand import Demand
from inference.dispatch.policies.base import C
from inference.dispatch.policies.shortest_queue import shortest_queue


def power_of_two(candidates: Sequence[C], demand: Demand, random: Callable[[], float]) -> C:
    """The less loaded of two at random: gateways that cannot see each other's last requests do not all run
    to the same idle worker. After Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing"."""
    first = int(random() * len(candidates))
    second = int(random() * (len(candidates) - 1))
    pair = (candidates[first], candidates[second + (second >= first)]) if len(candidates) > 1 else candidates
    return shortest_queue(pair, demand, random)
