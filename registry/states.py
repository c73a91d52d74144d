"""States and the arrows between them. A state moves only by `actions`, by compare-and-set.

Worker, with who drives each arrow:

    requested ──agent── launching ──worker── loading ──worker── ready ⇄ suspect ──reaper── lost
        any live ──worker, agent── failed      ready, suspect ──reconcile── draining ──worker── stopped
    loading ──reaper── lost        lost ──worker, same epoch came back── ready
    lost ──reconcile, replaced── failed       any live ──agent, told to stop── stopped

Node:

    joining ──agent── online ⇄ suspect ──reaper── offline ──agent── online
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from django.db import models

State = TypeVar("State", bound=models.TextChoices)


class WorkerState(models.TextChoices):
    REQUESTED = "requested"
    """Wished for; its node has not taken it up yet."""
    LAUNCHING = "launching"
    """Its node prepares the model's files and starts the process."""
    LOADING = "loading"
    """The process runs, the engine is not ready."""
    READY = "ready"
    SUSPECT = "suspect"
    """Silent for longer than a beat should take: gets no new request."""
    LOST = "lost"
    """Silent for so long that it counts as gone; the same epoch may still come back."""
    DRAINING = "draining"
    """Finishes what runs, accepts nothing new."""
    STOPPED = "stopped"
    FAILED = "failed"


WORKER_TRANSITIONS: dict[WorkerState, frozenset[WorkerState]] = {
    WorkerState.REQUESTED: frozenset(
        {
            WorkerState.LAUNCHING,
            WorkerState.LOADING,
            WorkerState.READY,
            WorkerState.LOST,
            WorkerState.STOPPED,
            WorkerState.FAILED,
        }
    ),
    WorkerState.LAUNCHING: frozenset(
        {
            WorkerState.LOADING,
            WorkerState.READY,
            WorkerState.LOST,
            WorkerState.DRAINING,
            WorkerState.STOPPED,
            WorkerState.FAILED,
        }
    ),
    WorkerState.LOADING: frozenset(
        {
            WorkerState.READY,
            WorkerState.LOST,
            WorkerState.DRAINING,
            WorkerState.STOPPED,
            WorkerState.FAILED,
        }
    ),
    WorkerState.READY: frozenset(
        {WorkerState.SUSPECT, WorkerState.DRAINING, WorkerState.STOPPED, WorkerState.FAILED}
    ),
    WorkerState.SUSPECT: frozenset(
        {
            WorkerState.READY,
            WorkerState.LOST,
            WorkerState.DRAINING,
            WorkerState.STOPPED,
            WorkerState.FAILED,
        }
    ),
    WorkerState.LOST: frozenset(
        {WorkerState.READY, WorkerState.LOADING, WorkerState.STOPPED, WorkerState.FAILED}
    ),
    WorkerState.DRAINING: frozenset({WorkerState.STOPPED, WorkerState.FAILED}),
    WorkerState.STOPPED: frozenset(),
    WorkerState.FAILED: frozenset(),
}

WORKER_STARTING = frozenset({WorkerState.REQUESTED, WorkerState.LAUNCHING, WorkerState.LOADING})
WORKER_TERMINAL = frozenset({WorkerState.STOPPED, WorkerState.FAILED})
WORKER_LIVE = frozenset(WorkerState) - WORKER_TERMINAL
"""Holds a replica's place: at most one live worker per replica, by a constraint."""
WORKER_BEATING = frozenset({WorkerState.LOADING, WorkerState.READY, WorkerState.DRAINING})
"""States in which silence is news."""


class NodeState(models.TextChoices):
    JOINING = "joining"
    """Has its secret; its agent was not heard yet."""
    ONLINE = "online"
    SUSPECT = "suspect"
    OFFLINE = "offline"


NODE_TRANSITIONS: dict[NodeState, frozenset[NodeState]] = {
    NodeState.JOINING: frozenset({NodeState.ONLINE}),
    NodeState.ONLINE: frozenset({NodeState.SUSPECT}),
    NodeState.SUSPECT: frozenset({NodeState.ONLINE, NodeState.OFFLINE}),
    NodeState.OFFLINE: frozenset({NodeState.ONLINE}),
}


class CopyState(models.TextChoices):
    FETCHING = "fetching"
    CONVERTING = "converting"
    READY = "ready"
    FAILED = "failed"


COPY_UNDER_WAY = frozenset({CopyState.FETCHING, CopyState.CONVERTING})


class EngineName(models.TextChoices):
    TRANSFORMERS = "transformers"
    VLLM = "vllm", "vLLM"
    EMBEDDING = "embedding"
    UPSTREAM = "upstream"
    SIMULATED = "simulated"


class Policy(models.TextChoices):
    """How dispatch chooses among a deployment's workers."""

    PREFIX_AFFINITY = "prefix_affinity", "Prefix affinity: where the prompt's beginning is in the cache"
    LEAST_TOKENS = "least_tokens", "Least tokens: the fewest tokens to do per unit of speed"
    SHORTEST_QUEUE = "shortest_queue", "Shortest queue: the fewest requests per unit of speed"
    POWER_OF_TWO = "power_of_two", "Power of two: the less loaded of two at random"
    ROUND_ROBIN = "round_robin", "Round robin: each in its turn"
    LOTTERY = "lottery", "Lottery: at random, weighted by measured speed"


class Outcome(models.TextChoices):
    """How an accounted request ended."""

    OK = "ok"
    ABORTED = "aborted"
    """The client left."""
    INTERRUPTED = "interrupted"
    """The worker or the gateway ended in mid-answer."""
    FAILED = "failed"
    """Nothing was answered: no capacity, or the engine refused."""


def sources_of(to: State, transitions: Mapping[State, frozenset[State]]) -> list[State]:
    """States from which `to` may be reached, for the WHERE of a compare-and-set."""
    return sorted(state for state, targets in transitions.items() if to in targets)
