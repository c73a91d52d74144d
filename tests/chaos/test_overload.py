"""F45, F47 to F49: too many at once, too slow, too long, or one for all."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from openai_api import limits
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
from tests.chaos.clients import request_of
from tests.factories import make_api_key, make_deployment, make_project, make_worker
from tests.services import free_port

pytestmark = pytest.mark.django_db(transaction=True)

Serve = Callable[..., tuple[Served, Worker]]


@pytest.fixture
def serve(transactional_db: None, tmp_path: Path) -> Iterator[Serve]:
    """Starts a gateway process in front of one worker; called with the deployment's fields, and the worker's
    arguments."""
    with contextlib.ExitStack() as stack:

        def start(arguments: dict[str, Any], **fields: Any) -> tuple[Served, Worker]:
            worker = stack.enter_context(worker_process(7071, **arguments))
            deployment = make_deployment(route=ROUTE, **fields)
            make_worker(deployment=deployment, id=7071, url=worker.url, capabilities=CAPABILITIES)
            publish_change("route", ROUTE)
            port = free_port()
            command = (str(ROOT / "manage.py"), "gateway", "--port", str(port))
            log = {"ROUNDHOUSE_LOG_LEVEL": "ERROR"}
            stack.enter_context(process_serving(*command, port=port, data=tmp_path, **log))
            served = Served(port, make_api_key(name="tests")[1])
            eventually(lambda: served.chat(say("!tokens 1")).status == 200, "it answers")
            return served, worker

        yield start


async def answer(port: int, request: bytes) -> tuple[int, dict[str, str], bytes, float]:
    """Status, headers and body of a request on a connection of its own, and how long they took."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        lines = [line.partition(": ") for line in head.split("\r\n")[1:] if line]
        headers = {name.lower(): value for name, _, value in lines}
        body = await reader.readexactly(int(headers["content-length"]))
        return int(head.split()[1]), headers, body, time.monotonic() - began
    finally:
        writer.close()


@pytest.mark.full
@pytest.mark.timeout(180)
def test_two_thousand_at_once_are_answered_or_told_when_to_come_again(serve: Serve) -> None:
    served, _ = serve({"token_seconds": 0.01}, slots=32, queue_limit=300, queue_seconds=8)
    request = request_of(served.api_key, say("!tokens 10"))

    async def herd() -> list[tuple[int, dict[str, str], bytes, float]]:
        return await asyncio.gather(*(answer(served.port, request) for _ in range(2000)))

    told = asyncio.run(herd())
    statuses = collections.Counter(status for status, *_ in told)
    refused = [one for one in told if one[0] != 200]
    waits = collections.Counter(headers["retry-after"] for _, headers, *_ in refused)
    slowest = max(seconds for *_, seconds in told)
    print(f"{dict(statuses)}, the slowest in {slowest:.1f} s, come again in {dict(waits)}", file=sys.stderr)
    assert set(statuses) == {200, 503}
    assert statuses[200] >= 300
    assert {json.loads(body)["error"]["code"] for *_, body, _ in refused} == {"server_is_overloaded"}
    assert all(1 <= int(seconds) <= 80 for seconds in waits)
    assert len(waits) >= 2, "they do not come back together"
    rows = eventually(
        lambda: (found := list(UsageEvent.objects.all())) and len(found) == 2001 and found,
        "each has a row",
        seconds=20,
        every=0.5,
    )
    assert collections.Counter(row.outcome for row in rows) == {
        Outcome.OK: statuses[200] + 1,
        Outcome.FAILED: statuses[503],
    }
    assert sum(row.attempts for row in rows) <= 1.1 * (statuses[200] + 1), "the worker is not asked again"
    # And the next one is served as if nothing had been.
    assert served.chat(say("!tokens 1")).status == 200


@pytest.mark.full
@pytest.mark.timeout(180)
@pytest.mark.parametrize("queue_limit", [1000, 60])
def test_one_key_with_nearly_all_of_the_load_leaves_the_others_their_share(
    serve: Serve, queue_limit: int
) -> None:
    """Of three projects one sends nine requests of ten: each gets a third."""
    served, _ = serve({"token_seconds": 0.01}, slots=4, queue_limit=queue_limit, queue_seconds=30)
    keys = {
        name: make_api_key(name=name, project=make_project(name=name))[1] for name in ("hot", "one", "other")
    }
    clients = {"hot": 90, "one": 6, "other": 6}
    done: collections.Counter[str] = collections.Counter()
    refused: collections.Counter[str] = collections.Counter()

    async def ask(name: str, until: float, since: float) -> None:
        request = request_of(keys[name], say("!tokens 10"))
        while (now := time.monotonic()) < until:
            status, *_ = await answer(served.port, request)
            if now > since:
                (done if status == 200 else refused)[name] += 1
            if status != 200:
                await asyncio.sleep(0.2)

    async def all_of_them() -> None:
        began = time.monotonic()
        asking = [ask(name, began + 20, began + 8) for name, count in clients.items() for _ in range(count)]
        await asyncio.gather(*asking)

    asyncio.run(all_of_them())
    print(f"answered: {dict(done)}, refused: {dict(refused)}", file=sys.stderr)
    share = sum(done.values()) / 3
    for name in ("one", "other"):
        assert done[name] >= 0.9 * share, name
        assert refused[name] == 0, name


def test_what_is_too_long_is_refused_at_once(served: Served, worker: Worker) -> None:
    """A token is a word here, and the context has 8192."""
    long = served.chat(say("x" * 10 * 2**20))
    assert (long.status, long.error()["code"]) == (413, "request_too_large")
    before = worker.load()["tokens"]
    assert served.chat(say("word " * 8187, max_tokens=5)).status == 200
    over = served.chat(say("word " * 8193))
    assert (over.status, over.error()["code"]) == (400, "context_length_exceeded")
    # By the gateway's own clock: a client that has to wait for a processor would see more.
    assert [int(one.headers["openai-processing-ms"]) < 100 for one in (long, over)] == [True, True]
    assert worker.load()["tokens"] == before + 5
    row = served.event(over.headers["x-request-id"])
    assert (row.outcome, row.status, row.completion_tokens) == (Outcome.FAILED, 400, 0)


@pytest.mark.full
@pytest.mark.timeout(120)
@pytest.mark.parametrize("part", ["header", "body"])
def test_five_hundred_that_send_a_byte_a_second_are_cut_in_time(serve: Serve, part: str) -> None:
    """With the limits as they are: 10 s for a header, 30 s for a body."""
    served, _ = serve({})
    start = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
    most = limits.HEADER_SECONDS
    if part == "body":
        start = request_of(served.api_key, say("x" * 1000))[:-500]
        most = limits.BODY_SECONDS

    async def slow() -> tuple[bytes, float]:
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(start)
        reading = asyncio.create_task(reader.read(65536))
        while not reading.done():
            await asyncio.wait([reading], timeout=1)
            with contextlib.suppress(ConnectionError):
                writer.write(b"x")
        writer.close()
        return reading.result(), time.monotonic() - began

    async def all_of_them() -> tuple[list[tuple[bytes, float]], list[float]]:
        slows = asyncio.gather(*(slow() for _ in range(500)))
        others = []
        request = request_of(served.api_key, say("!tokens 1"))
        while not slows.done():
            status, *_, seconds = await answer(served.port, request)
            assert status == 200
            others.append(seconds)
            await asyncio.sleep(0.1)
        return await slows, others

    cut, others = asyncio.run(all_of_them())
    assert all(told.startswith(b"HTTP/1.1 408 ") for told, _ in cut)
    assert most - 0.1 <= min(seconds for _, seconds in cut)
    assert max(seconds for _, seconds in cut) <= most + 3
    assert sorted(others)[len(others) // 2] < 0.1
    print(f"{part}: cut after {max(seconds for _, seconds in cut):.1f} s, others {max(others):.2f} s at most")
