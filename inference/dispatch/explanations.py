"""Why a request went where it went: kept by each gateway for its latest requests."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

KEPT = 5000
"""Requests that a gateway remembers."""
EXPLAINED = 16
"""Candidates that are told of one choice."""


class Candidate(NamedTuple):
    """A worker that was free, as dispatch saw it then."""

    worker: str
    load: float
    """Requests it had, others' too."""
    work: float
    """What they cost it, as `Demand.work` counts."""
    speed: float
    """Tokens per second while busy; 0: unknown."""


class Choice(NamedTuple):
    """One worker, chosen among those that were free."""

    deployment: str
    policy: str
    candidates: list[Candidate]
    """The first `EXPLAINED` of them."""
    chosen: str
    cached_tokens: int
    """Of the prompt, probably in its cache."""


@dataclass(slots=True)
class Step:
    """A worker that was asked."""

    choice: Choice
    queue_seconds: float
    """Waited for it."""
    failed: str = ""
    """Why another was asked after it, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One request. Seconds count from its arrival."""

    route: str
    endpoint: str
    status: int
    auth_seconds: float
    first_seconds: float | None
    """Until the worker's first byte; None: there was none."""
    total_seconds: float
    prompt_tokens: int
    """As dispatch estimates them."""
    session: bool
    """The client named one."""
    steps: list[Step]


class Explanations:
    """Of one gateway's latest requests."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Explanation] = OrderedDict()

    def note(self, request_id: str, explanation: Explanation) -> None:
        self._kept[request_id] = explanation
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def get(self, request_id: str) -> Explanation | None:
        return self._kept.get(request_id)


LATEST = Explanations()
"""Of the gateway in this process, for the admin, which it serves too."""
