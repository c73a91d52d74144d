"""Many ask at once and leave in every way there is: nobody gets what is another's, and nothing is
left over."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.actions.events import publish_change
from registry.models import UsageEvent
from registry.states import Outcome
from tests.api.conftest import (
    CAPABILITIES,
    ROOT,
    ROUTE,
    Served,
    Worker,
    eventually,
    process_serving,
    say,
    worker_process,
)
from tests.chaos.clients import sent
from tests.chaos.crowd import Crowd
from tests.factories import make_api_key, make_deployment, make_limit, make_worker
from tests.services import free_port, missing, own_redis

pytestmark = pytest.mark.django_db(transaction=True)

WORKERS = (7011, 7012)
SLOTS = 40
CLIENTS = 64


@pytest.fixture
def busy(transactional_db: None, tmp_path: Path) -> Iterator[tuple[Served, list[Worker]]]:
    """A gateway process with two workers that have room for all clients, and limits to ask Redis about."""
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(own_redis())
        if redis is None:
            missing("no redis-server is installed")
        make_limit(10**9, "requests", "minute", each="key")
        make_limit(10**4, "parallel")
        deployment = make_deployment(route=ROUTE, slots=SLOTS, queue_limit=1000, policy="round_robin")
        workers = []
        for replica, number in enumerate(WORKERS):
            workers.append(stack.enter_context(worker_process(number)))
            make_worker(
                deployment=deployment,
                id=number,
                replica=replica,
                url=workers[-1].url,
                capabilities=CAPABILITIES,
            )
        publish_change("route", ROUTE)
        port = free_port()
        command = (str(ROOT / "manage.py"), "gateway", "--port", str(port))
        more = {"ROUNDHOUSE_LOG_LEVEL": "ERROR", "REDIS_URL": redis.url}
        stack.enter_context(process_serving(*command, port=port, data=tmp_path, **more))
        yield Served(port, make_api_key(name="tests")[1]), workers


@pytest.mark.timeout(900)
@pytest.mark.parametrize("requests", [800, pytest.param(100_000, marks=pytest.mark.full)])
def test_everybody_gets_his_own_answer(busy: tuple[Served, list[Worker]], requests: int) -> None:
    served, workers = busy
    crowd = Crowd(served.port, served.api_key, ROUTE, seed=requests)
    began = time.monotonic()
    asyncio.run(crowd.come(requests, at_once=CLIENTS))
    took = time.monotonic() - began
    print(f"{requests} requests in {took:.0f} s: {dict(crowd.seen)}", file=sys.stderr)
    assert crowd.wrong == []
    assert crowd.limited == crowd.seen["answered whole"], "each was told what its limit leaves"
    assert sum(crowd.seen.values()) == requests
    assert min(crowd.seen.values()) > requests / 200, "of each way to leave there are many"

    # Nothing runs any more, and as many slots are free as there are: all of them at once are served.
    eventually(lambda: not any(worker.load()["running"] for worker in workers), "nothing runs", seconds=5)
    everyone = [sent(served, say("!tokens 2 !slow 20", stream=True)) for _ in range(SLOTS * len(workers))]
    eventually(
        lambda: [worker.load()["running"] for worker in workers] == [SLOTS] * len(workers),
        "every slot is taken",
        seconds=10,
    )
    for one in everyone:
        one.close()

    def answered() -> set[str]:
        return set(UsageEvent.objects.filter(outcome=Outcome.OK).values_list("request_id", flat=True))

    eventually(lambda: crowd.whole <= answered(), "what was answered is in the ledger", seconds=30, every=0.5)
    eventually(lambda: not any(worker.load()["running"] for worker in workers), "nothing runs", seconds=5)
    outcomes = set(UsageEvent.objects.values_list("outcome", flat=True))
    assert outcomes == {Outcome.OK, Outcome.ABORTED}
