"""Dispatch policies against each other, on simulated workers with a KV cache, in simulated time.

A worker steps like a continuously batching engine: each step takes a share of prompts that are not in its
cache (at most `STEP_TOKENS`), and one token of every answer under way. Its cache keeps blocks of prompts,
the longest unused forgotten first. A fixed number of clients ask one question after another.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.rows import Row
from inference.dispatch.demand import BLOCK_TOKENS, BYTES_PER_TOKEN, Demand
from inference.dispatch.policies import POLICIES
from inference.dispatch.prefixes import Prefixes

STEP_TOKENS = 512
STEP_SECONDS = 0.008
PROMPT_SECONDS = 0.00008
"""Per token of a prompt that is read: 12,500 a second."""
ANSWER_SECONDS = 0.00005
"""Per answer under way, above what a step costs anyway."""


Choose = Callable[[Sequence[Any], Demand, Callable[[], float]], Any]
"""A policy: which of the free ones."""


@dataclass(slots=True)
class Request:
    demand: Demand
    answer_tokens: int
    prompt_left: int = 0
    answer_left: int = 0
    work: int = 0


@dataclass(slots=True)
class Worker:
    """One engine, and what dispatch knows of it."""

    slots: int = 16
    pace: float = 1.0
    """Of the usual one."""
    cache_blocks: int = 640
    running: list[Request] = field(default_factory=list)
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    speed: float = 0.0
    work: float = 0.0
    turn: float = 0.0
    kv_use: float = 0.0
    prefixes: Prefixes = field(default_factory=Prefixes)
    busy: float = 0.0
    done: int = 0

    @property
    def load(self) -> float:
        return len(self.running)

    def take(self, request: Request) -> None:
        blocks = request.demand.blocks
        cached = next((at for at, one in enumerate(blocks) if one not in self.cache), len(blocks))
        request.prompt_left = max(1, request.demand.prompt_tokens - cached * BLOCK_TOKENS)
        request.answer_left = request.answer_tokens
        request.work = request.demand.work(request.demand.cached_tokens)
        for block in reversed(blocks):
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > self.cache_blocks:
            self.cache.popitem(last=False)
        self.running.append(request)
        self.work += request.work

    def step(self) -> tuple[float, list[Request]]:
        """What the next step takes, and the requests that are answered with it."""
        room = STEP_TOKENS
        answering = 0
        for request in self.running:
            if request.prompt_left:
                read = min(room, request.prompt_left)
                request.prompt_left -= read
                room -= read
            else:
                request.answer_left -= 1
                answering += 1
        self.done += answering
        took = (STEP_SECONDS + PROMPT_SECONDS * (STEP_TOKENS - room) + ANSWER_SECONDS * answering) / self.pace
        self.busy += took
        # As a worker reports it: tokens per second while it was busy.
        self.speed = self.done / self.busy
        ended = [request for request in self.running if request.answer_left == 0]
        if ended:
            self.running = [request for request in self.running if request.answer_left]
            self.work -= sum(request.work for request in ended)
        return took, ended


def shared_prefixes(source: random.Random, *, groups: int = 96) -> Iterator[Request]:
    """Prompts of 4,000 tokens, of which each group shares all but the last 128."""
    starts = [source.randbytes(3872 * BYTES_PER_TOKEN) for _ in range(groups)]
    while True:
        body = b'"messages":' + source.choice(starts) + source.randbytes(128 * BYTES_PER_TOKEN)
        yield Request(Demand(body, most_tokens=64), source.randint(16, 64))


def uniform(source: random.Random) -> Iterator[Request]:
    """Prompts that have nothing in common."""
    while True:
        body = b'"messages":' + source.randbytes(source.randint(128, 1024) * BYTES_PER_TOKEN)
        yield Request(Demand(body, most_tokens=64), source.randint(16, 64))


def tokens_per_second(
    choose: Choose,
    trace: Callable[[random.Random], Iterator[Request]],
    workers: list[Worker],
    *,
    clients: int,
) -> float:
    """Generated tokens per simulated second, once caches and speeds are warm."""
    source = random.Random(11)
    requests = trace(source)
    now = 0.0
    steps: list[tuple[float, int, list[Request]]] = []
    stepping: set[int] = set()
    waiting = 0

    def start(at: int) -> None:
        if at not in stepping and workers[at].running:
            took, ended = workers[at].step()
            stepping.add(at)
            heapq.heappush(steps, (now + took, at, ended))

    def ask() -> bool:
        free = [worker for worker in workers if len(worker.running) < worker.slots]
        if not free:
            return False
        request = next(requests)
        chosen = choose(free, request.demand, source.random)
        chosen.take(request)
        start(workers.index(chosen))
        return True

    def ask_all() -> None:
        nonlocal waiting
        while waiting and ask():
            waiting -= 1

    waiting = clients
    ask_all()
    warm: tuple[float, int] | None = None
    answered = 0
    while answered < 4000:
        now, at, ended = heapq.heappop(steps)
        stepping.discard(at)
        answered += len(ended)
        waiting += len(ended)
        ask_all()
        start(at)
        if warm is None and answered >= 1000:
            warm = now, sum(worker.done for worker in workers)
    if warm is None:
        raise AssertionError("it ended before it was warm")
    return (sum(worker.done for worker in workers) - warm[1]) / (now - warm[0])


def fleet() -> list[Worker]:
    return [Worker() for _ in range(8)]


def fleet_with_a_slow_one() -> list[Worker]:
    return [Worker(pace=0.25), *(Worker() for _ in range(7))]


CLIENTS = 96
TRACES = {
    "shared prefixes": (shared_prefixes, fleet),
    "nothing shared": (uniform, fleet),
    "one slow worker": (uniform, fleet_with_a_slow_one),
}


def compare() -> dict[str, dict[str, float]]:
    """Tokens per second by trace and policy."""
    return {
        name: {
            policy: tokens_per_second(choose, trace, workers(), clients=CLIENTS)
            for policy, choose in POLICIES.items()
        }
        for name, (trace, workers) in TRACES.items()
    }


def ideal_with_a_slow_one() -> float:
    """The best that any fixed share of the slow worker gives, the others sharing the rest evenly."""

    def at_most(most: int) -> Choose:
        def choose(free: Sequence[Any], demand: Demand, draw: Callable[[], float]) -> Any:
            open_to = [worker for worker in free if worker.pace == 1.0 or len(worker.running) < most]
            slow = [worker for worker in open_to if worker.pace < 1.0]
            # Its share first; the rest to whom has least.
            return slow[0] if slow else min(open_to or free, key=lambda worker: len(worker.running))

        return choose

    return max(
        tokens_per_second(at_most(most), uniform, fleet_with_a_slow_one(), clients=CLIENTS)
        for most in range(0, 13, 2)
    )


def rows() -> list[Row]:
    """The bars of the design; `python -m bench.policies` prints all policies."""
    figures = compare()

    def to_round_robin(trace: str, policy: str) -> float:
        return figures[trace][policy] / figures[trace]["round_robin"]

    shared, uniform_ = (
        to_round_robin(trace, "prefix_affinity") for trace in ("shared prefixes", "nothing shared")
    )
    slow = figures["one slow worker"]["shortest_queue"] / ideal_with_a_slow_one()
    return [
        Row("prefix_affinity ÷ round_robin, shared prefixes", shared, bar=1.5, at_least=True),
        Row("prefix_affinity ÷ round_robin, nothing shared", uniform_, bar=0.98, at_least=True),
        Row("shortest_queue ÷ the ideal, one slow worker", slow, bar=0.95, at_least=True),
    ]


if __name__ == "__main__":
    for name, figures in compare().items():
        print(name)
        for policy, figure in figures.items():
            print(f"    {policy:16} {figure:8.0f} tok/s  {figure / figures['round_robin']:5.2f}")
