"""Five times as many requests as the workers can answer, from clients that do not wait for each other.

Peak is what as many clients get as there are slots and places in the queue, each asking when it has its
answer. Then requests come at five times that pace, at random instants, and whoever is refused stays away.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

from bench.load import OK, Connection, Target
from bench.rows import Row, quantile
from bench.stage import Stage, body, cpu, stage

SLOTS = 8
WORKERS = 2
QUEUE = 32
TOKENS = 20
TOKEN_SECONDS = 0.01
TIMES = 5
SECONDS = 8.0
WARM_SECONDS = 2.0
"""Of a load, before anything is counted."""


@dataclass
class Outcome:
    """What became of the requests that ended while it was counted."""

    answered: int = 0
    refused_own: list[float] = field(default_factory=list)
    """What the gateway says that a refusal took it."""
    refused_seen: list[float] = field(default_factory=list)
    retry_after: list[str] = field(default_factory=list)
    other: list[int] = field(default_factory=list)
    """Statuses that should not be."""
    waited: list[float] = field(default_factory=list)
    """From a request to its whole answer."""


class Crowd:
    def __init__(self, target: Target) -> None:
        self.outcome = Outcome()
        self._target = target
        self._idle: list[Connection] = []
        self._since = time.monotonic() + WARM_SECONDS
        self._until = self._since + SECONDS

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._until

    async def ask(self) -> None:
        connection = self._idle.pop() if self._idle else Connection(self._target)
        seen = await connection.ask()
        self._idle.append(connection)
        if not self._since <= time.monotonic() < self._until:
            return
        if seen.status == OK:
            self.outcome.answered += 1
            self.outcome.waited.append(seen.seconds)
        elif seen.status == 503:
            self.outcome.refused_own.append(int(seen.header("openai-processing-ms")) / 1000)
            self.outcome.refused_seen.append(seen.seconds)
            self.outcome.retry_after.append(seen.header("retry-after"))
        else:
            self.outcome.other.append(seen.status)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


async def in_a_circle(target: Target, clients: int) -> Outcome:
    """So many clients, each of which asks again when it has its answer."""
    crowd = Crowd(target)

    async def client() -> None:
        while not crowd.over:
            await crowd.ask()

    await asyncio.gather(*[client() for _ in range(clients)])
    crowd.close()
    return crowd.outcome


async def at_a_pace(target: Target, per_second: float) -> Outcome:
    """So many requests a second, whatever became of those before."""
    crowd = Crowd(target)
    source = random.Random(7)
    due = time.monotonic()
    async with asyncio.TaskGroup() as asking:
        while not crowd.over:
            due += source.expovariate(per_second)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            asking.create_task(crowd.ask())
    crowd.close()
    return crowd.outcome


def rows() -> list[Row]:
    with stage() as bench:
        return _rows(bench)


def _rows(bench: Stage) -> list[Row]:
    bench.deploy(
        "busy",
        slots=SLOTS,
        replicas=WORKERS,
        queue_limit=QUEUE,
        arguments={"token_seconds": TOKEN_SECONDS},
    )
    target = bench.through(body(stream=False, model="busy", tokens=TOKENS))
    peak = asyncio.run(in_a_circle(target, SLOTS * WORKERS + QUEUE // 2)).answered / SECONDS
    before = cpu(bench.gateway)
    over = asyncio.run(at_a_pace(target, TIMES * peak))
    spent = cpu(bench.gateway) - before
    if over.other:
        raise SystemExit(f"overload: answers that should not be: {sorted(set(over.other))}")
    refused = len(over.refused_own)
    told = [float(value) for value in over.retry_after if value]
    # What came in the warm-up and afterwards has its part in what was spent.
    share = SECONDS / (SECONDS + WARM_SECONDS)
    capacity = SLOTS * WORKERS / (TOKENS * TOKEN_SECONDS)
    return [
        Row("answers per second at peak, of what the slots allow", peak / capacity),
        Row("goodput at 5 times that, of the peak", over.answered / SECONDS / peak, bar=0.9, at_least=True),
        Row("refused, of all requests", refused / (refused + over.answered)),
        Row("a refusal, the gateway's own time, p99", quantile(over.refused_own, 0.99), "ms", 0.1),
        Row("a refusal, the gateway's own time, the longest", max(over.refused_own), "ms"),
        Row("a refusal as its client sees it, p50", quantile(over.refused_seen, 0.5), "ms"),
        Row("a refusal as its client sees it, p99", quantile(over.refused_seen, 0.99), "ms"),
        Row("refusals with a Retry-After", len(told) / refused, bar=1.0, at_least=True),
        Row("Retry-After, the least", min(told), "s"),
        Row("Retry-After, the most", max(told), "s"),
        Row("an answer's time, p99", quantile(over.waited, 0.99), "s"),
        Row("gateway CPU per request, refused or not", spent * share / (refused + over.answered), "ms"),
    ]
