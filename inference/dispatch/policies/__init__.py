"""How dispatch chooses among a deployment's free workers: one file and one function per policy.

A policy gets at least one candidate, all of them free, the request's demand, and a source of numbers in
[0, 1). It keeps nothing itself: what it remembers stands in the candidates.
"""

from __future__ import annotations

from inference.dispatch.policies.base import Candidate, PolicyFunction
from inference.dispatch.policies.least_tokens import least_tokens
from inference.dispatch.policies.lottery import lottery
from inference.dispatch.policies.power_of_two import power_of_two
from inference.dispatch.policies.prefix_affinity import prefix_affinity
from inference.dispatch.policies.round_robin import round_robin
from inference.dispatch.policies.shortest_queue import shortest_queue

POLICIES: dict[str, PolicyFunction] = {
    "prefix_affinity": prefix_affinity,
    "least_tokens": least_tokens,
    "shortest_queue": shortest_queue,
    "power_of_two": power_of_two,
    "round_robin": round_robin,
    "lottery": lottery,
}
"""By the name that a deployment's `policy` column has."""


def policy_named(name: str) -> PolicyFunction:
    """The policy of that name. One that this version does not know, for a newer gateway may have written it,
    is taken for `shortest_queue`."""
    return POLICIES.get(name, shortest_queue)


__all__ = ["POLICIES", "Candidate", "PolicyFunction", "policy_named"]
