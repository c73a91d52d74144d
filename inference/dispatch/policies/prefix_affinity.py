from __future__ import annotations

from collections.abc import Callable, Sequence

from inference.dispatch.demand import Demand
from inference.dispatch.policies.base import C, least, usual_speed


def prefix_affinity(candidates: Sequence[C], demand: Demand, random: Callable[[], float]) -> C:
    """The worker that is done first when it need not read what it has read before: as `least_tokens`, but a
    prompt's beginning that it probably holds in its cache costs nothing. So a conversation, or a long system
    prompt, or a session, stays where it is until that worker is behind by more work than the cache saves."""
    usual = usual_speed(candidates)

    def seconds(one: C) -> float:
        own = demand.work(demand.cached_by(one.prefixes))
        return (one.work + own) / (one.speed if one.speed > 0 else usual)

    chosen = least(candidates, seconds, random)
    # Its lease weighs as much as it costs there: with all of the prompt, holders would seem busy and lose
    # what they hold to others.
    demand.cached_tokens = demand.cached_by(chosen.prefixes)
    demand.note_sent(chosen.prefixes)
    return chosen
