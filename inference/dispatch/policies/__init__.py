"""How dispatch chooses among a deployment's free workers: one file and one pure function per policy.

A policy gets at least one candidate, all of them free, and a source of numbers in [0, 1).
"""

from __future__ import annotations

from inference.dispatch.policies.base import Candidate, PolicyFunction
from inference.dispatch.policies.lottery import lottery
from inference.dispatch.policies.shortest_queue import shortest_queue

POLICIES: dict[str, PolicyFunction] = {"shortest_queue": shortest_queue, "lottery": lottery}
"""By the name that a deployment's `policy` column has."""


def policy_named(name: str) -> PolicyFunction:
    """The policy of that name. A name that this version does not know is served by the default: a newer
    gateway may have written it."""
    return POLICIES.get(name, shortest_queue)


__all__ = ["POLICIES", "Candidate", "PolicyFunction", "policy_named"]
