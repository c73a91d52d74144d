"""What a policy may know of a worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar


class Candidate(Protocol):
    @property
    def load(self) -> float:
        """Requests it has, ours and others'."""

    @property
    def speed(self) -> float:
        """Tokens per second while busy; 0 while unknown."""


C = TypeVar("C", bound=Candidate)


class PolicyFunction(Protocol):
    def __call__(self, candidates: Sequence[C], random: Callable[[], float]) -> C: ...


def usual_speed(candidates: Sequence[Candidate]) -> float:
    """What to take for a speed that is not known yet: the average of the known ones, else 1."""
    total = 0.0
    known = 0
    for candidate in candidates:
        if candidate.speed > 0:
            total += candidate.speed
            known += 1
    return total / known if known else 1.0
