"""Ledgers for tests of reports: random traffic, put in as a gateway puts it in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from itertools import count
from random import Random
from typing import Any

from registry.actions.usage import record_usage
from registry.models import UsageEvent
from registry.states import Outcome

_numbers = count(1)
STATUSES = {
    Outcome.OK: (200,),
    Outcome.ABORTED: (499,),
    Outcome.INTERRUPTED: (200, 503),
    Outcome.FAILED: (400, 429, 500, 503),
}
"""What a client may have got when its request ended so."""


def make_event(**facts: Any) -> UsageEvent:
    """An event that is not in the ledger yet."""
    defaults: dict[str, Any] = {
        "request_id": f"req_usage{next(_numbers)}",
        "project_id": 1,
        "project_name": "default",
        "key_public_id": "abc",
        "key_name": "test",
        "route": "chat",
        "endpoint": "/v1/chat/completions",
        "status": 200,
        "outcome": Outcome.OK,
        "gateway": "g",
    }
    return UsageEvent(**defaults | facts)


def make_traffic(
    *,
    start: datetime,
    end: datetime,
    events: int,
    keys: Iterable[tuple[str, str]],
    projects: Sequence[tuple[int, str]] = ((1, "project 1"), (1, "project 1"), (2, "project 2")),
    seed: int = 1,
) -> list[UsageEvent]:
    """Record random requests of these keys (public id, name) and projects (id, name) within the range."""
    random = Random(seed)
    seconds = (end - start).total_seconds()
    names = list(keys)
    traffic = []
    for _ in range(events):
        public_id, name = random.choice(names)
        prompt = random.randrange(1, 3000)
        outcome = random.choice([*Outcome, *[Outcome.OK] * 20])
        ended = outcome is not Outcome.FAILED
        project_id, project_name = random.choice(projects)
        traffic.append(
            make_event(
                started_at=start + timedelta(seconds=random.random() * seconds),
                key_public_id=public_id,
                key_name=name,
                route=random.choice(["small", "org/large", "other"]),
                project_id=project_id,
                project_name=project_name,
                endpoint=random.choice(["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]),
                outcome=outcome,
                status=random.choice(STATUSES[outcome]),
                prompt_tokens=prompt if ended else 0,
                cached_tokens=random.randrange(prompt) if ended else 0,
                completion_tokens=random.randrange(500) if ended else 0,
                ttft_ms=random.randrange(2000) if ended else None,
                duration_ms=random.randrange(20000),
            )
        )
    for first in range(0, events, 200):
        record_usage(traffic[first : first + 200])
    return traffic


def sums(events: Iterable[UsageEvent]) -> dict[str, int]:
    """What a report must say of these events, added up the plain way."""
    listed = list(events)
    return {
        "requests": len(listed),
        "errors": sum(event.outcome in (Outcome.FAILED, Outcome.INTERRUPTED) for event in listed),
        "aborted": sum(event.outcome == Outcome.ABORTED for event in listed),
        "input_tokens": sum(event.prompt_tokens for event in listed),
        "cached_tokens": sum(event.cached_tokens for event in listed),
        "output_tokens": sum(event.completion_tokens for event in listed),
        "cost_micros": sum(event.cost_micros for event in listed),
    }
