"""What a policy may know of a worker, and what policies share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from inference.dispatch.demand import Demand
from inference.dispatch.prefixes import Prefixes


class Candidate(Protocol):
    prefixes: Prefixes
    """Of prompts that were sent to it."""
    turn: float
    """For `round_robin` to remember."""

    @property
    def load(self) -> float:
        """Requests it has, ours and others'."""

    @property
    def work(self) -> float:
        """What those requests cost it, as `Demand.work` counts."""

    @property
    def speed(self) -> float:
        """Tokens per second while busy; 0 while unknown."""

    @property
    def kv_use(self) -> float:
        """The used part of its KV cache, 0 to 1; 0 while unknown."""

    @property
    def slots(self) -> int:
        """Requests it takes at once."""


C = TypeVar("C", bound=Candidate)


class PolicyFunction(Protocol):
    def __call__(self, candidates: Sequence[C], demand: Demand, random: Callable[[], float]) -> C: ...


def usual_speed(candidates: Sequence[Candidate]) -> float:
    """What to take for a speed that is not known yet: the average of the known ones, else 1."""
    total = 0.0
    known = 0
    for candidate in candidates:
        if candidate.speed > 0:
            total += candidate.speed
            known += 1
    return total / known if known else 1.0


def least(candidates: Sequence[C], score: Callable[[C], float], random: Callable[[], float]) -> C:
    """The candidate of the lowest score; ties are broken at random."""
    best = candidates[0]
    best_score = float("inf")
    ties = 0
    for candidate in candidates:
        its = score(candidate)
        if its < best_score:
            best, best_score, ties = candidate, its, 1
        elif its == best_score:
            # Each of k equals stays with chance 1/k, without a list of them.
            ties += 1
            if random() * ties < 1:
                best = candidate
    return best
