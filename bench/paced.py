"""Streams of 64 tokens at 20 ms per token, 1 and 100 at a time: what the gateway adds to the first token.

The hundred begin one after the other, as in a long run, and each asks again when it has its answer.
"""

from __future__ import annotations

import asyncio

from bench.load import run
from bench.rows import Row, quantile
from bench.stage import TOKENS, body, stage

TOKEN_SECONDS = 0.02
ROUNDS = 2


def rows() -> list[Row]:
    found: list[Row] = []
    with stage() as bench:
        bench.deploy("paced", slots=128, arguments={"token_seconds": TOKEN_SECONDS})
        question = body(stream=True, model="paced")
        targets = bench.through(question), bench.direct("paced", question)
        for clients, requests in ((1, 10), (100, 300)):
            first: tuple[list[float], list[float]] = ([], [])
            for _ in range(ROUNDS):
                # In turn, so that a machine that changes its speed changes both.
                for target, times in zip(targets, first, strict=True):
                    tally = asyncio.run(
                        run(target, requests=requests, connections=clients, spread=TOKENS * TOKEN_SECONDS)
                    )
                    times += tally.first_seconds
            who = "1 client" if clients == 1 else f"{clients} clients"
            for share, name, bar in ((0.5, "p50", 1e-3), (0.99, "p99", 5e-3)):
                through, direct = (quantile(times, share) for times in first)
                asked = bar if (clients == 1) == (name == "p50") else None
                found += [
                    Row(f"{who}: time to first token, {name}", through, "ms"),
                    Row(f"{who}: added to it by the gateway, {name}", through - direct, "ms", asked),
                ]
    return found
