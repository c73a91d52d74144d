from __future__ import annotations

from collections.abc import Callable, Sequence

from inference.dispatch.policies.base import C, usual_speed


def shortest_queue(candidates: Sequence[C], random: Callable[[], float]) -> C:
    """The worker with the fewest requests per unit of speed; ties are broken at random."""
    usual = usual_speed(candidates)
    best = candidates[0]
    best_score = float("inf")
    ties = 0
    for candidate in candidates:
        score = candidate.load / (candidate.speed if candidate.speed > 0 else usual)
        if score < best_score:
            best, best_score, ties = candidate, score, 1
        elif score == best_score:
            # Each of k equals stays with chance 1/k, without a list of them.
            ties += 1
            if random() * ties < 1:
                best = candidate
    return best
