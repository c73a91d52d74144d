"""F43 to F45: clients that leave, vanish, or take their time. The engine is told, and nobody else waits."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import pytest

from config.front import make_application
from openai_api import limits
from registry.actions.events import publish_change
from registry.models import UsageEvent
from registry.states import Outcome
from tests.api.conftest import (
    CAPABILITIES,
    ROUTE,
    WORKER_ID,
    Served,
    Worker,
    eventually,
    say,
    serving,
    worker_process,
)
from tests.chaos.clients import leases, read_until, sent
from tests.chaos.proxy import reset
from tests.factories import make_api_key, make_deployment, make_worker

pytestmark = pytest.mark.django_db(transaction=True)

LEAVING: dict[str, Callable[[socket.socket], None]] = {
    "close": socket.socket.close,
    "reset": reset,
    "half-close": lambda connected: connected.shutdown(socket.SHUT_WR),
}
WAITING = {
    "a stream": say("!tokens 1000 !slow 0.02", stream=True),
    "a whole answer": say("!tokens 1000 !slow 0.02"),
    "the first token": say("!tokens 10 !slow 30", stream=True),
}


def test_whoever_leaves_ends_the_work_for_him_within_a_second(served: Served, worker: Worker) -> None:
    began = {(how, what): sent(served, body) for how in LEAVING for what, body in WAITING.items()}
    for (_, what), connected in began.items():
        if what == "a stream":
            read_until(connected, b'"content":" ')
    running = eventually(lambda: (load := worker.load())["running"] == len(began) and load, "all of them run")
    assert running
    left = time.monotonic()
    for (how, _), connected in began.items():
        LEAVING[how](connected)
    eventually(lambda: worker.load()["running"] == 0, "the engine was told", seconds=3)
    took = time.monotonic() - left
    for connected in began.values():
        connected.close()
    assert took <= 1.0
    assert eventually(lambda: leases(served) == 0, "the slots are free", seconds=5)
    rows = eventually(
        lambda: (rows := list(UsageEvent.objects.all())) and len(rows) == len(began) and rows,
        "all have a row",
    )
    assert {(row.outcome, row.status) for row in rows} == {(Outcome.ABORTED, 499)}
    streamed = sorted(row.completion_tokens for row in rows)
    assert streamed[-1] > 0, "what was generated until then is counted"


def test_one_who_leaves_while_he_waits_for_a_worker_is_no_load(
    transactional_db: None, worker: Worker
) -> None:
    deployment = make_deployment(route=ROUTE, slots=1)
    make_worker(deployment=deployment, url=worker.url, capabilities=CAPABILITIES, id=WORKER_ID)
    with serving(front := make_application()) as port:
        served = Served(port, make_api_key(name="tests")[1], front)
        body = say("!tokens 1000 !slow 0.02", stream=True)
        with sent(served, body) as first, sent(served, body) as second:
            eventually(lambda: front.gateway.dispatcher.waiting(deployment.id) == 1, "one waits")
            reset(second)
            eventually(
                lambda: front.gateway.dispatcher.waiting(deployment.id) == 0, "nobody waits", seconds=1
            )
            reset(first)
        eventually(lambda: leases(served) == 0, "the slot is free", seconds=1)


def test_of_two_requests_sent_at_once_both_end_with_their_connection(served: Served, worker: Worker) -> None:
    """The second waits behind the first, and uvicorn tells of the end to the second alone."""
    for leave in (socket.socket.close, reset):
        connected = sent(served, say("!tokens 10 !slow 30", stream=True), times=2)
        eventually(lambda: worker.load()["running"] == 1, "the first runs")
        leave(connected)
        eventually(lambda: worker.load()["running"] == 0, "the engine was told", seconds=2.5)
    eventually(lambda: leases(served) == 0, "the slot is free", seconds=1)


@pytest.fixture
def torrent(transactional_db: None) -> Iterator[tuple[Served, Worker]]:
    """A gateway in front of a worker that writes as fast as it can, for ever."""
    with worker_process(7003, context_length=10**7) as running:
        deployment = make_deployment(route=ROUTE)
        make_worker(deployment=deployment, id=7003, url=running.url, capabilities=CAPABILITIES)
        publish_change("route", ROUTE)
        with serving(front := make_application()) as port:
            yield Served(port, make_api_key(name="tests")[1], front), running


def test_who_does_not_read_holds_the_engine_up_and_is_cut_off(
    torrent: tuple[Served, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, worker = torrent
    monkeypatch.setattr(limits, "STALLED_SECONDS", 3.0)
    seen: list[int] = []

    def pauses() -> bool:
        time.sleep(0.2)
        seen.append(worker.load()["tokens"])
        return len(seen) > 4 and len(set(seen[-5:])) == 1

    with sent(served, say("!tokens 9000000", stream=True), SO_RCVBUF=4096) as connected:
        read_until(connected, b'"content":" ')
        eventually(pauses, "the engine waits for its reader", seconds=15)
        assert seen[-1] < 10_000, "a megabyte or two is on its way, most of it at the worker"
        # Others are served meanwhile.
        assert served.chat(say("!tokens 3")).status == 200
        eventually(lambda: worker.load()["running"] == 0, "it is cut off", seconds=15)
        with pytest.raises(ConnectionResetError):
            read_until(connected, b"[DONE]")
    row = eventually(lambda: UsageEvent.objects.filter(outcome=Outcome.ABORTED).first(), "it has a row")
    assert (row.status, leases(served)) == (499, 0)
    assert 0 < row.completion_tokens <= worker.load()["tokens"]


@pytest.mark.full
def test_who_reads_slowly_but_reads_is_not_cut_off(
    torrent: tuple[Served, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, worker = torrent
    monkeypatch.setattr(limits, "STALLED_SECONDS", 2.0)
    with sent(served, say("!tokens 9000000", stream=True), SO_RCVBUF=4096) as connected:
        until = time.monotonic() + 7
        while time.monotonic() < until:
            assert connected.recv(20_000)
            time.sleep(0.05)
        assert worker.load()["running"] == 1
