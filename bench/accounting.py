"""What accounting costs in CPU, measured from the code itself, in a process of its own:

    python -m bench.accounting [--database postgres://…]

prints seconds by name as one JSON object: of one event appended to the ledger, in batches of so many; of a
reservation in hard budgets; of what each request waits for itself, its entry in the spool and two limits in a
Redis of its own. The processes of database and Redis are not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import django

from bench.database import own_database
from tests.services import own_redis

if TYPE_CHECKING:
    from registry.models import ApiKey
    from registry.spool import Opened

BATCHES = (1, 20, 500)
BUDGETS = (1, 3)
ROUNDS = 7
CLIENTS = 16
"""Requests under way at once, as in the loads."""
ENDED = {"status": 200, "outcome": "ok", "prompt_tokens": 20, "completion_tokens": 64}

_numbers = count(1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accounting")
    parser.add_argument("--database", help="a PostgreSQL server's URL (default: SQLite)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.inside:
        print(json.dumps(measured(arguments.database)))
        return
    django.setup()
    print(json.dumps({**ledger(), **reservations(), **request_path()}))


def measured(server: str | None = None) -> dict[str, float]:
    """The figures, by name."""
    with own_database(server) as environment:
        command = [sys.executable, "-m", "bench.accounting", "--inside"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def ledger() -> dict[str, float]:
    from registry.actions.usage import record_usage  # after Django's apps
    from registry.spool import Closed, _event

    closed = Closed(**ENDED)
    found = {}
    for size in BATCHES:
        times = max(2, 200 // size)
        best = float("inf")
        for _ in range(ROUNDS):
            batches = [[_event(opened(), closed, "gateway-1") for _ in range(size)] for _ in range(times)]
            best = min(best, seconds(lambda: [record_usage(batch) for batch in batches]))  # noqa: B023
        found[f"event in batches of {size}"] = best / size / times
    return found


def reservations() -> dict[str, float]:
    from registry.actions.budgets import reserve, save_budget
    from registry.models import Budget

    ids: list[int] = []
    found = {}
    for budgets in BUDGETS:
        while len(ids) < budgets:
            unit, period = [("tokens", "day"), ("money", "month"), ("tokens", "total")][len(ids)]
            budget = Budget(scope="key", subject="0123456789ab", unit=unit, period=period, limit=10**12)
            ids.append(save_budget(budget=budget, by="bench").pk)

        def work() -> None:
            for _ in range(100):
                reserve(
                    budget_ids=ids,
                    request_id=opened().request_id,
                    route="instant",
                    prompt_tokens=20,
                    completion_tokens=64,
                    started_at=time.time(),
                    gateway="gateway-1",
                )

        found[f"reservation in {budgets}"] = min(seconds(work) for _ in range(ROUNDS)) / 100
    return found


def request_path() -> dict[str, float]:
    """What the gateway's loop does for the accounting of each request."""
    from openai_api.auth import load_key

    with own_redis() as redis, tempfile.TemporaryDirectory() as folder:
        if redis is None:
            raise SystemExit("redis-server is not installed")
        key = load_key(limited_key().public_id)
        limits, commands = asyncio.run(_limits(key, redis))
        return {"spool": _spool(Path(folder)), "limits": limits, "Redis commands": commands}


def limited_key() -> ApiKey:
    """A new key, with a limit of requests and one of tokens that it does not reach."""
    from registry.actions.api_keys import issue_api_key
    from registry.actions.limits import save_limit
    from registry.models import Limit, Project

    project = Project.objects.get_or_create(name="bench")[0]
    api_key, _ = issue_api_key(name="limited", project=project, by="bench")
    for metric in ("requests", "tokens"):
        save_limit(limit=Limit(api_key=api_key, metric=metric, per="minute", amount=10**9), by="bench")
    return api_key


def _spool(folder: Path) -> float:
    from registry.spool import Closed, Spool

    spool = Spool(folder, "gateway-1")
    closed = Closed(**ENDED)

    def work() -> None:
        for request in requests:
            entry = spool.open(request)
            entry.count(prompt_tokens=20, completion_tokens=64)
            entry.answered()
            entry.close(closed)

    best = float("inf")
    for _ in range(ROUNDS):
        requests = [opened() for _ in range(1000)]
        best = min(best, seconds(work) / len(requests))
    return best


async def _limits(key: Any, redis: Any) -> tuple[float, float]:
    """CPU seconds and commands to Redis per request, corrections of what was thought included."""
    from openai_api.admission import Admission

    admission = Admission(redis.url)
    await admission.start()
    requests, each = 0, 100
    best = float("inf")

    async def client() -> None:
        for _ in range(each):
            admitted = await admission.admit(
                key, "instant", prompt_bytes=100, max_tokens=64, request_id=opened().request_id
            )
            assert admitted is not None
            admitted.settle(20, 64)

    with redis.client() as asker:
        before = _scripts(asker)
        for _ in range(ROUNDS):
            began = time.process_time()
            await asyncio.gather(*(client() for _ in range(CLIENTS)))
            best = min(best, (time.process_time() - began) / CLIENTS / each)
            requests += CLIENTS * each
        await admission.stop()
        return best, (_scripts(asker) - before) / requests


def _scripts(asker: Any) -> int:
    commands = asker.info("commandstats")
    return sum(
        facts["calls"] for name, facts in commands.items() if name in ("cmdstat_eval", "cmdstat_evalsha")
    )


def opened() -> Opened:
    from registry.spool import Opened

    return Opened(
        request_id=f"req_{next(_numbers):024d}",
        started_at=time.time(),
        project_id=1,
        project_name="default",
        key_public_id="0123456789ab",
        key_name="bench",
        route="instant",
        endpoint="/v1/chat/completions",
        stream=False,
    )


def seconds(work: Callable[[], object]) -> float:
    """Of this process's CPU."""
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
