"""A second gateway on the same PostgreSQL and Redis: does it make a request dearer?

With cores to spare two gateways answer twice as many requests; on two cores the load, the workers and
PostgreSQL are there as well, and what can be seen is the CPU that a request costs.
"""

from __future__ import annotations

import asyncio
import os
import statistics

from bench.load import Target, run
from bench.rows import Row
from bench.stage import body, cpu, stage
from tests import services
from tests.e2e.nursery import gateways
from tests.e2e.test_kills import Gateway

CONNECTIONS = 8
"""At each gateway."""
ROUNDS = 6


def rows(requests: int) -> list[Row]:
    """`requests`: at each gateway, over all rounds."""
    requests //= ROUNDS
    with services.own_postgres() as database, services.own_redis() as redis:
        if redis is None:
            raise SystemExit("no redis-server is installed")
        with (
            stage(DATABASE_URL=database.url, REDIS_URL=redis.url) as bench,
            gateways(bench.roundhouse) as nursery,
        ):
            bench.deploy("instant", replicas=2, arguments={"token_seconds": 0.0})
            other = Gateway(nursery)
            other.start()
            asyncio.run(other.ready())
            assert other._process is not None
            both = (bench.gateway, other._process)
            question = body(stream=False, model="instant")
            targets = (
                bench.through(question),
                Target(f"http://127.0.0.1:{other.port}/v1", bench.key, question),
            )

            async def load(*those: Target) -> float:
                """Requests per second of them together."""
                tallies = await asyncio.gather(
                    *(run(each, requests=requests, connections=CONNECTIONS) for each in those)
                )
                return len(those) * requests / max(tally.seconds for tally in tallies)

            def measured(*those: Target) -> tuple[float, float]:
                """CPU per request, of what both gateways use, and requests per second."""
                before, events = cpu(*both), bench.settled_events()
                pace = asyncio.run(load(*those))
                sent = len(those) * requests
                bench.accounted(sent, events)
                return (cpu(*both) - before) / sent, pace

            measured(*targets)
            # In turn, so that a machine that changes its speed changes both.
            alone, together = zip(
                *((measured(targets[0]), measured(*targets)) for _ in range(ROUNDS)), strict=True
            )
            other.kill()
    one, two = (statistics.mean(cost for cost, _ in those) for those in (alone, together))
    pace_one, pace_two = (statistics.mean(pace for _, pace in those) for those in (alone, together))
    # Half of the cores are the load's and the workers'.
    enough = (os.cpu_count() or 1) >= 8
    return [
        Row("CPU per plain request, one gateway of two in use", one, "ms"),
        Row("CPU per plain request, both in use", two, "ms"),
        Row("both, of one", two / one, bar=None if enough else 1.05),
        Row(
            "requests per second, both, of one",
            pace_two / pace_one,
            "",
            1.8 if enough else None,
            at_least=True,
        ),
    ]
