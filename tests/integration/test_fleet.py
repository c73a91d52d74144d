"""What agents and workers say to a gateway, over HTTP into the database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import msgspec
import pytest
from channels.routing import URLRouter
from django.conf import settings as django_settings
from django.db import OperationalError
from pytest_django import Settings

from inference import beats as beats_module
from inference.beats import BeatBook
from inference.broker import PRIVATE
from inference.dispatch.fleet import Fleet
from inference.fleet import JOINS_AT_ONCE, fleet_routes
from inference.protocol import (
    LOG_TAIL_LINES,
    Beat,
    BeatOrder,
    Cause,
    CopyPhase,
    CopyReport,
    Load,
    NodeOrders,
    NodeReport,
    ProcessReport,
    Progress,
    Wish,
    WorkerPhase,
)
from registry.actions.nodes import create_join_token
from registry.actions.workers import move_worker
from registry.keys import digest_secret, worker_secret
from registry.models import Change, Event, Gateway, JoinToken, LanguageModel, ModelCopy, Node, Worker
from registry.querysets import database_now
from registry.states import CopyState, NodeState, WorkerState
from registry.threads import in_database
from tests.factories import make_deployment, make_node, make_worker

pytestmark = pytest.mark.django_db(transaction=True)

SECRET = "a-node-secret-of-some-length-0123456789"
DEADLINE_SECONDS = 20.0


class FleetPart:
    """A gateway's fleet part, reached over ASGI."""

    def __init__(self, fleet: Fleet, book: BeatBook) -> None:
        self.fleet, self.book = fleet, book
        self.app = URLRouter(fleet_routes(fleet, book))

    async def post(
        self, path: str, token: str | None, body: object = b"", *, client: str = "127.0.0.1"
    ) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app, client=(client, 4711))
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        headers = {"authorization": f"Bearer {token}"} if token is not None else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            return await http.post(path, content=content, headers=headers)

    async def beat(self, worker: Worker, phase: WorkerPhase, **facts: Any) -> httpx.Response:
        beat = Beat(worker_id=worker.pk, epoch=worker.epoch, phase=phase, **facts)
        return await self.post("/fleet/worker", token_of(worker), beat)

    async def report(self, node: Node, **facts: Any) -> NodeOrders:
        answer = await self.post("/fleet/node", f"{node.pk}.{SECRET}", NodeReport(agent_pid=77, **facts))
        assert answer.status_code == 200, answer.text
        return msgspec.json.decode(answer.content, type=NodeOrders)


@pytest.fixture
async def gateway() -> AsyncIterator[FleetPart]:
    fleet = Fleet()
    book = BeatBook(fleet, name="test-gateway")
    await fleet.start()
    await book.start()
    yield FleetPart(fleet, book)
    await book.stop()
    await fleet.stop()


def token_of(worker: Worker) -> str:
    secret = worker_secret(django_settings.SECRET_KEY, worker.pk, worker.epoch)
    return f"{worker.pk}.{worker.epoch}.{secret}"


def a_node(**facts: Any) -> Node:
    return make_node(secret_digest=digest_secret(SECRET), **facts)


async def until(question: Callable[[], Any]) -> Any:
    """The first true answer of a question to the database; fails after the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        answer = await in_database(question)
        if answer:
            return answer
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


async def state_of(worker: Worker) -> WorkerState:
    await in_database(worker.refresh_from_db)
    return WorkerState(worker.state)


async def until_state(worker: Worker, state: WorkerState) -> Worker:
    return await until(Worker.objects.filter(pk=worker.pk, state=state).first)


# -- Joining


async def test_a_machine_with_a_join_token_becomes_a_node(gateway: FleetPart) -> None:
    token = await in_database(create_join_token, by="test")
    answer = await gateway.post("/fleet/join", token, {"name": "gpu-1", "address": "192.0.2.7"})
    assert answer.status_code == 200
    node = await in_database(Node.objects.get, name="gpu-1")
    reply = answer.json()
    assert reply["node_id"] == node.pk
    assert digest_secret(reply["secret"]) == node.secret_digest
    assert node.state == NodeState.JOINING

    again = await gateway.post("/fleet/join", token, {"name": "gpu-2", "address": "192.0.2.8"})
    assert again.status_code == 401
    assert "join token" in again.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "JoinRequest"),
        (b"[]", 400, "JoinRequest"),
        ({"name": "a/b", "address": "192.0.2.7"}, 400, "name"),
        ({"name": "a", "address": "nowhere"}, 400, "address"),
        ({"name": 7, "address": "192.0.2.7"}, 400, "name"),
        (b" " * (1024 * 1024 + 1), 413, "larger"),
    ],
)
async def test_a_join_that_cannot_be_used_says_why_and_keeps_the_token(
    gateway: FleetPart, body: object, status: int, says: str
) -> None:
    token = await in_database(create_join_token, by="test")
    answer = await gateway.post("/fleet/join", token, body)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]
    assert (await in_database(JoinToken.objects.get)).uses_left == 1


async def test_a_private_redis_is_given_only_on_this_machine(gateway: FleetPart, settings: Settings) -> None:
    settings.ROUNDHOUSE_REDIS_URL = "unix:///run/redis.sock?db=0"
    settings.CELERY_BROKER_URL = "redis+socket:///run/redis.sock?virtual_host=0"
    token = await in_database(create_join_token, by="test")
    request = {"name": "gpu-1", "address": "192.0.2.7"}
    refused = await gateway.post("/fleet/join", token, request, client="192.0.2.7")
    assert refused.status_code == 409
    assert refused.json()["error"]["message"] == PRIVATE
    assert not await in_database(Node.objects.filter(name="gpu-1").exists)

    accepted = await gateway.post("/fleet/join", token, request, client="127.0.0.1")
    assert accepted.json()["broker_url"] == "redis+socket:///run/redis.sock?virtual_host=0"


async def test_a_redis_on_loopback_is_refused_to_other_machines_too(
    gateway: FleetPart, settings: Settings
) -> None:
    settings.ROUNDHOUSE_REDIS_URL = "redis://localhost:6379/0"
    token = await in_database(create_join_token, by="test")
    request = {"name": "gpu-1", "address": "192.0.2.7"}
    assert (await gateway.post("/fleet/join", token, request, client="192.0.2.7")).status_code == 409


async def test_a_shared_redis_that_does_not_answer_is_passed_on_as_it_is(
    gateway: FleetPart, settings: Settings
) -> None:
    url = "redis://127.0.0.1:1/0"
    settings.ROUNDHOUSE_REDIS_URL = settings.CELERY_BROKER_URL = url
    token = await in_database(create_join_token, by="test")
    answer = await gateway.post("/fleet/join", token, {"name": "gpu-1", "address": "192.0.2.7"})
    assert answer.json()["broker_url"] == url


async def test_a_flood_of_joins_is_turned_away(gateway: FleetPart) -> None:
    request = {"name": "gpu-1", "address": "192.0.2.7"}
    answers = await asyncio.gather(
        *(gateway.post("/fleet/join", "wrong" * 8, request) for _ in range(20 * JOINS_AT_ONCE))
    )
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {401, 429}
    assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 429)


# -- Nodes


@pytest.mark.parametrize(
    "token", [None, "", "x", "1.x", f"1.{'y' * 43}", "9" * 300, f"{'9' * 19}.{'y' * 43}"]
)
async def test_a_node_without_its_secret_is_refused(gateway: FleetPart, token: str | None) -> None:
    await in_database(a_node, pk=1)
    answer = await gateway.post("/fleet/node", token, NodeReport(agent_pid=1))
    assert answer.status_code == 401
    assert answer.json()["error"]["message"]


async def test_a_get_is_not_allowed(gateway: FleetPart) -> None:
    transport = httpx.ASGITransport(app=gateway.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        assert (await http.get("/fleet/node")).status_code == 405


async def test_a_report_brings_a_node_online(gateway: FleetPart) -> None:
    node = await in_database(a_node, state=NodeState.OFFLINE, last_seen_at=None)
    await gateway.report(node, cores=64, memory_bytes=2**40, memory_free_bytes=2**39, version="0.1.0")
    await in_database(node.refresh_from_db)
    assert (node.state, node.agent_pid, node.cores, node.memory_bytes) == (NodeState.ONLINE, 77, 64, 2**40)
    assert node.last_seen_at is not None


async def test_orders_list_every_live_worker_of_the_node_and_no_other(gateway: FleetPart) -> None:
    def make() -> tuple[Node, dict[WorkerState, Worker]]:
        node = a_node()
        deployment = make_deployment(
            replicas=9, arguments={"pace": 0.01}, environment={"OMP_NUM_THREADS": 8}, drain_seconds=7
        )
        workers = {
            state: make_worker(deployment=deployment, node=node, replica=number, state=state)
            for number, state in enumerate(WorkerState)
        }
        make_worker()
        return node, workers

    node, workers = await in_database(make)
    orders = await gateway.report(node)
    wishes = {assignment.worker_id: assignment.wish for assignment in orders.assignments}
    drains = workers.pop(WorkerState.DRAINING)
    for ended in (WorkerState.STOPPED, WorkerState.FAILED):
        del workers[ended]
    assert wishes == {worker.pk: Wish.RUN for worker in workers.values()} | {drains.pk: Wish.DRAIN}
    ready = next(a for a in orders.assignments if a.worker_id == workers[WorkerState.READY].pk)
    deployment = workers[WorkerState.READY].deployment
    assert ready.secret == token_of(workers[WorkerState.READY]).split(".")[2]
    assert ready.served_name == deployment.name
    assert (ready.arguments, ready.environment) == ({"pace": 0.01}, {"OMP_NUM_THREADS": "8"})
    assert (ready.engine, ready.slots, ready.drain_seconds) == ("simulated", deployment.slots, 7.0)


async def test_orders_cost_a_fixed_number_of_queries(gateway: FleetPart) -> None:
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    from inference.fleet import take_report

    def count(replicas: int) -> int:
        node = a_node()
        deployment = make_deployment(replicas=replicas)
        for _ in range(replicas):
            make_worker(deployment=deployment, node=node)
        with CaptureQueriesContext(connection) as queries:
            take_report(node, NodeReport(agent_pid=1))
        return len(queries)

    few = await in_database(count, 1)
    assert await in_database(count, 12) == few


async def test_a_process_that_runs_moves_its_worker_on(gateway: FleetPart) -> None:
    node = await in_database(a_node)
    worker = await in_database(make_worker, node=node, state=WorkerState.REQUESTED, heartbeat_at=None)
    process = ProcessReport(worker_id=worker.pk, epoch=worker.epoch, running=True, pid=4242)
    await gateway.report(node, processes=[process])
    assert await state_of(worker) == WorkerState.LAUNCHING
    assert worker.pid == 4242
    first = worker.heartbeat_at
    assert first is not None
    await gateway.report(node, processes=[process])
    await in_database(worker.refresh_from_db)
    assert worker.heartbeat_at == first, "only the worker itself may say that it is still alive"


async def test_a_worker_whose_files_are_made_ready_is_launching(gateway: FleetPart) -> None:
    node = await in_database(a_node)
    worker = await in_database(make_worker, node=node, state=WorkerState.REQUESTED, heartbeat_at=None)
    model_id = await in_database(lambda: worker.revision.language_model_id)
    copy = CopyReport(
        model_id=model_id, phase=CopyPhase.FETCHING, progress=Progress(step="fetching", done=1, total=4)
    )
    await gateway.report(node, copies=[copy])
    assert await state_of(worker) == WorkerState.LAUNCHING
    assert worker.heartbeat_at is None
    process = ProcessReport(worker_id=worker.pk, epoch=worker.epoch, running=True, pid=4242)
    await gateway.report(node, processes=[process])
    await in_database(worker.refresh_from_db)
    assert worker.pid == 4242
    assert worker.heartbeat_at is not None


@pytest.mark.parametrize(
    ("cause", "state"),
    [
        (Cause.KILLED, WorkerState.FAILED),
        (Cause.VANISHED, WorkerState.FAILED),
        (None, WorkerState.FAILED),
        (Cause.STOPPED, WorkerState.STOPPED),
    ],
)
@pytest.mark.parametrize("before", [WorkerState.REQUESTED, WorkerState.READY, WorkerState.DRAINING])
async def test_a_process_that_ended_ends_its_worker(
    gateway: FleetPart, before: WorkerState, cause: Cause | None, state: WorkerState
) -> None:
    node = await in_database(a_node)
    worker = await in_database(make_worker, node=node, state=before)
    process = ProcessReport(
        worker_id=worker.pk,
        epoch=worker.epoch,
        running=False,
        exit_code=-9,
        cause=cause,
        detail="It was killed.\x00",
        log_tail=["one", "two"],
    )
    orders = await gateway.report(node, processes=[process])
    assert orders.assignments == []
    assert await state_of(worker) == state
    assert (worker.exit_code, worker.log_tail) == (-9, "one\ntwo")
    assert worker.state_reason == "It was killed."
    assert worker.cause == (cause or Cause.CRASHED)
    events = await in_database(Event.objects.filter(kind="worker", object_id=worker.pk).count)
    await gateway.report(node, processes=[process])
    assert await in_database(Event.objects.filter(kind="worker", object_id=worker.pk).count) == events


async def test_a_report_of_an_old_epoch_or_of_another_nodes_worker_is_ignored(gateway: FleetPart) -> None:
    node = await in_database(a_node)
    own = await in_database(make_worker, node=node)
    foreign = await in_database(make_worker)
    ends = [
        ProcessReport(worker_id=own.pk, epoch=own.epoch + 1, running=False, cause=Cause.KILLED),
        ProcessReport(worker_id=foreign.pk, epoch=foreign.epoch, running=False, cause=Cause.KILLED),
    ]
    await gateway.report(node, processes=ends)
    assert await state_of(own) == WorkerState.READY
    assert await state_of(foreign) == WorkerState.READY


async def test_a_copys_progress_is_kept_and_written_only_when_it_is_news(gateway: FleetPart) -> None:
    node = await in_database(a_node)
    worker = await in_database(make_worker, node=node)
    model_id = await in_database(lambda: worker.revision.language_model_id)

    async def report(phase: CopyPhase, done: int, **facts: Any) -> ModelCopy:
        progress = Progress(step="fetching", done=done, total=100)
        copy = CopyReport(model_id=model_id, phase=phase, progress=progress, **facts)
        await gateway.report(node, copies=[copy])
        return await in_database(ModelCopy.objects.get)

    copy = await report(CopyPhase.FETCHING, 1)
    assert (copy.state, copy.done, copy.total) == (CopyState.FETCHING, 1, 100)
    at_once = await report(CopyPhase.FETCHING, 2)
    assert at_once.updated_at == copy.updated_at
    ready = await report(CopyPhase.READY, 100, size_bytes=12, sha256="ab" * 32)
    assert (ready.state, ready.size_bytes) == (CopyState.READY, 12)
    again = await report(CopyPhase.READY, 100, size_bytes=12, sha256="ab" * 32)
    assert again.updated_at == ready.updated_at
    failed = await report(CopyPhase.FAILED, 100, detail="The digest differs.", cause=Cause.CHECKSUM)
    assert (failed.state, failed.detail) == (CopyState.FAILED, "The digest differs.")


async def test_a_copy_of_a_deleted_model_is_ignored(gateway: FleetPart) -> None:
    node = await in_database(a_node)
    await gateway.report(node, copies=[CopyReport(model_id=999_999, phase=CopyPhase.READY)])
    assert await in_database(ModelCopy.objects.count) == 0


async def test_a_node_hears_503_while_the_database_is_away(
    gateway: FleetPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OperationalError("the server closed the connection")

    monkeypatch.setattr("inference.fleet.node_of_secret", away)
    answer = await gateway.post("/fleet/node", f"1.{SECRET}", NodeReport(agent_pid=1))
    assert answer.status_code == 503
    assert "closed the connection" not in answer.text


# -- Workers


@pytest.mark.parametrize("fault", ["none", "short", "other", "epoch", "id"])
async def test_a_worker_without_its_secret_is_refused(gateway: FleetPart, fault: str) -> None:
    worker = await in_database(make_worker)
    good = token_of(worker)
    token = {
        "none": None,
        "short": good[:-1],
        "other": f"{worker.pk}.{worker.epoch}.{'0' * 64}",
        "epoch": f"{worker.pk}.{worker.epoch + 1}.{good.split('.')[2]}",
        "id": f"{worker.pk + 1}.{worker.epoch}.{good.split('.')[2]}",
    }[fault]
    beat = Beat(worker_id=worker.pk, epoch=worker.epoch, phase=WorkerPhase.STOPPED)
    assert (await gateway.post("/fleet/worker", token, beat)).status_code == 401


async def test_a_worker_speaks_only_for_itself(gateway: FleetPart) -> None:
    worker, other = await in_database(make_worker), await in_database(make_worker)
    beat = Beat(worker_id=other.pk, epoch=other.epoch, phase=WorkerPhase.STOPPED)
    assert (await gateway.post("/fleet/worker", token_of(worker), beat)).status_code == 401


async def test_a_worker_is_followed_from_loading_to_stopped(gateway: FleetPart) -> None:
    worker = await in_database(make_worker, state=WorkerState.LAUNCHING, heartbeat_at=None, url="")
    answer = await gateway.beat(
        worker,
        WorkerPhase.LOADING,
        pid=10,
        progress=Progress(step="weights", done=3, total=9, unit="tensors"),
    )
    assert answer.json() == {}, "`continue` is the default"
    loading = await until_state(worker, WorkerState.LOADING)
    assert (loading.progress_step, loading.progress_done, loading.progress_total) == ("weights", 3, 9)
    assert loading.heartbeat_at is not None

    await gateway.beat(
        worker,
        WorkerPhase.READY,
        url="http://127.0.0.1:9999",
        pid=10,
        engine_pid=11,
        capabilities=["top_k", "seed"],
        context_length=8192,
    )
    ready = await until_state(worker, WorkerState.READY)
    assert (ready.url, ready.pid, ready.engine_pid) == ("http://127.0.0.1:9999", 10, 11)
    assert ready.capabilities == ["seed", "top_k"]
    assert ready.ready_at is not None
    model = await in_database(lambda: LanguageModel.objects.get(deployments__workers=worker))
    assert model.context_length == 8192
    assert await in_database(Change.objects.filter(kind="language_model", key=str(model.pk)).count) == 1

    await gateway.beat(worker, WorkerPhase.DRAINING)
    await until_state(worker, WorkerState.DRAINING)
    await gateway.beat(worker, WorkerPhase.STOPPED, cause=Cause.STOPPED, detail="Told to stop.", exit_code=0)
    stopped = await until_state(worker, WorkerState.STOPPED)
    assert (stopped.cause, stopped.exit_code, stopped.state_reason) == ("stopped", 0, "Told to stop.")


async def test_a_worker_that_failed_says_why(gateway: FleetPart) -> None:
    worker = await in_database(make_worker, state=WorkerState.LOADING)
    await gateway.beat(
        worker,
        WorkerPhase.FAILED,
        cause=Cause.OUT_OF_MEMORY,
        detail="The device has 2 GB too little.",
        exit_code=3,
        log_tail=[f"line {number}\x00" for number in range(LOG_TAIL_LINES + 5)],
    )
    failed = await until_state(worker, WorkerState.FAILED)
    assert (failed.cause, failed.exit_code) == ("out_of_memory", 3)
    assert failed.state_reason == "The device has 2 GB too little."
    assert failed.log_tail.splitlines()[0] == "line 5"


@pytest.mark.parametrize("silent", [WorkerState.SUSPECT, WorkerState.LOST])
async def test_a_worker_that_fell_silent_comes_back_with_its_next_beat(
    gateway: FleetPart, silent: WorkerState
) -> None:
    worker = await in_database(make_worker, state=silent)
    await gateway.beat(worker, WorkerPhase.READY, url="http://127.0.0.1:9999")
    await until_state(worker, WorkerState.READY)


async def test_a_lost_worker_that_was_loading_goes_on_loading(gateway: FleetPart) -> None:
    worker = await in_database(make_worker, state=WorkerState.LOST)
    await gateway.beat(worker, WorkerPhase.LOADING)
    await until_state(worker, WorkerState.LOADING)


async def test_a_worker_that_ended_stays_ended_and_is_told_to_exit(gateway: FleetPart) -> None:
    worker = await in_database(make_worker)
    await gateway.fleet.poll()
    await in_database(move_worker, worker=worker, to=WorkerState.FAILED, reason="replaced", by="test")
    await gateway.fleet.poll()
    answer = await gateway.beat(worker, WorkerPhase.READY, url="http://127.0.0.1:9999")
    assert answer.json() == {"order": BeatOrder.EXIT}
    marker = await in_database(make_worker, state=WorkerState.LOADING)
    await gateway.beat(marker, WorkerPhase.READY, url="http://127.0.0.1:9998")
    await until_state(marker, WorkerState.READY)
    assert await state_of(worker) == WorkerState.FAILED


async def test_a_draining_worker_is_told_to_drain(gateway: FleetPart) -> None:
    worker = await in_database(make_worker, state=WorkerState.DRAINING)
    await gateway.fleet.poll()
    answer = await gateway.beat(worker, WorkerPhase.READY, url="http://127.0.0.1:9999")
    assert answer.json() == {"order": BeatOrder.DRAIN}


async def test_loads_are_written(gateway: FleetPart) -> None:
    workers = [await in_database(make_worker) for _ in range(3)]
    for number, worker in enumerate(workers):
        load = Load(running=number + 1, waiting=2, kv_use=0.5, steps=100, tokens=1000)
        await gateway.beat(worker, WorkerPhase.READY, load=load)
    written = Worker.objects.filter(running__gte=1, waiting=2, kv_use=0.5, steps=100, tokens=1000)
    await until(lambda: written.count() == 3)


async def test_speed_is_measured_only_while_busy(gateway: FleetPart, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(beats_module.time, "monotonic", lambda: clock[0])
    worker = await in_database(make_worker)

    def hear(tokens: int, running: int) -> None:
        clock[0] += 2.0
        load = Load(running=running, tokens=tokens)
        gateway.book.hear(Beat(worker_id=worker.pk, epoch=worker.epoch, phase=WorkerPhase.READY, load=load))

    measured = gateway.book._measured
    hear(0, running=0)
    hear(500, running=1)
    assert measured() == {}, "it was idle for an unknown part of this time"
    hear(700, running=2)
    assert measured() == {worker.pk: 100.0}
    hear(1100, running=0)
    assert measured() == {worker.pk: 100.0}
    hear(1100, running=1)
    hear(1500, running=1)
    assert measured()[worker.pk] == pytest.approx(0.3 * 200 + 0.7 * 100)
    hear(3, running=1)
    assert measured()[worker.pk] == pytest.approx(130), "a counter that went back says nothing"


async def test_nonsense_in_a_beat_is_bounded(gateway: FleetPart) -> None:
    worker = await in_database(make_worker)
    await gateway.beat(
        worker,
        WorkerPhase.READY,
        url="http://169.254.169.254/latest?" + "x" * 500,
        pid=-1,
        load=Load(running=2**40, waiting=-3, kv_use=1e300, steps=-1, tokens=2**63),
        progress=Progress(step="\x00" * 300, done=-1, total=2**63, unit="u" * 99),
        context_length=2**60,
    )
    written = await until(Worker.objects.filter(pk=worker.pk, running=2**31 - 1).first)
    assert (written.waiting, written.kv_use, written.steps) == (0, 1.0, 0)
    assert written.url == worker.url


async def test_one_bad_beat_does_not_hold_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from django.db import DataError

    good, bad = await in_database(make_worker), await in_database(make_worker)
    original = beats_module.record_loads

    def picky(rows: list[Worker], *, fields: list[str]) -> None:
        if any(row.pk == bad.pk for row in rows):
            raise DataError("no such number")
        original(rows, fields=fields)

    monkeypatch.setattr(beats_module, "record_loads", picky)
    beats = [
        Beat(worker_id=worker.pk, epoch=worker.epoch, phase=WorkerPhase.READY, load=Load(running=5))
        for worker in (bad, good)
    ]
    await in_database(beats_module.write_beats, beats, {})
    assert await in_database(Worker.objects.filter(running=5).get) == good


async def test_beats_wait_while_the_database_is_away_and_presence_begins_anew(
    gateway: FleetPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await until(Gateway.objects.filter(name="test-gateway").first)
    worker = await in_database(make_worker)
    original = beats_module.write_beats
    failed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def away(*_: object) -> None:
        loop.call_soon_threadsafe(failed.set)
        raise OperationalError("the database is away")

    monkeypatch.setattr(beats_module, "AWAY_SECONDS", 0.05)
    monkeypatch.setattr(beats_module, "write_beats", away)
    await gateway.beat(worker, WorkerPhase.READY, load=Load(running=3))
    async with asyncio.timeout(DEADLINE_SECONDS):
        await failed.wait()
    answer = await gateway.beat(worker, WorkerPhase.READY, load=Load(running=4))
    assert answer.status_code == 200, "no worker is delayed"
    monkeypatch.setattr(beats_module, "write_beats", original)
    await until(Worker.objects.filter(pk=worker.pk, running=4).exists)
    await until(Gateway.objects.filter(name="test-gateway", listening_since__gt=first.listening_since).exists)


async def test_presence_is_kept_up_without_a_break() -> None:
    book = BeatBook(Fleet(), name="steady")
    await book.start()
    first = await until(Gateway.objects.filter(name="steady").first)
    await until(Gateway.objects.filter(name="steady", seen_at__gt=first.seen_at).exists)
    later = await in_database(Gateway.objects.get, name="steady")
    assert later.listening_since == first.listening_since
    await book.stop()
    assert not await in_database(Gateway.objects.filter(name="steady").exists), "it said good-bye"


async def test_the_last_beats_are_written_when_the_book_is_closed() -> None:
    book = BeatBook(Fleet(), name="closing")
    worker = await in_database(make_worker)
    await book.start()
    book.hear(Beat(worker_id=worker.pk, epoch=worker.epoch, phase=WorkerPhase.READY, load=Load(running=9)))
    await book.stop()
    assert await in_database(Worker.objects.filter(pk=worker.pk, running=9).exists)


async def test_a_heartbeat_is_stamped_by_the_databases_clock(gateway: FleetPart) -> None:
    worker = await in_database(make_worker, heartbeat_at=None)
    before = await in_database(database_now)
    await gateway.beat(worker, WorkerPhase.READY)
    await until(Worker.objects.filter(pk=worker.pk, heartbeat_at__gte=before).exists)
