"""The fleet's snapshot, polled from a real database."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from datetime import timedelta

import pytest
from django.db import OperationalError, connection
from django.test.utils import CaptureQueriesContext

from inference.dispatch import fleet as fleet_module
from inference.dispatch.dispatcher import Dispatcher
from inference.dispatch.fleet import FORGET_ALL, Fleet, _read
from inference.dispatch.queue import Wish
from inference.errors import NoWorker
from inference.protocol import BeatOrder, Load
from inference.reconcile import CRASH_LOOP
from registry.actions.api_keys import revoke_api_key
from registry.actions.deployments import retry_deployment, save_deployment
from registry.actions.events import publish_change
from registry.actions.routes import note_route_change
from registry.actions.workers import move_worker
from registry.keys import worker_secret
from registry.models import Change, Deployment, Node, Route, RouteTarget, Worker
from registry.querysets import database_now
from registry.states import NodeState, WorkerState
from registry.threads import in_database
from tests.factories import make_api_key, make_deployment, make_node, make_worker

pytestmark = pytest.mark.django_db(transaction=True)


async def make(factory, *args, **facts):
    return await in_database(factory, *args, **facts)


@pytest.fixture
async def fleet():
    """Not polling by itself: tests say when."""
    return Fleet()


async def test_a_route_leads_to_ready_workers_with_all_that_a_request_needs(fleet, settings):
    deployment = await make(make_deployment, route="chat", slots=7, queue_limit=3, queue_seconds=9)
    worker = await make(
        make_worker, deployment=deployment, url="http://127.0.0.1:4000/", capabilities=["seed"],
        tokens_per_second=12.5, running=2, waiting=1,
    )  # fmt: skip
    others = (WorkerState.LOADING, WorkerState.SUSPECT, WorkerState.DRAINING, WorkerState.FAILED)
    for replica, state in enumerate(others, 20):
        await make(make_worker, deployment=deployment, replica=replica, state=state)
    await make(make_worker, deployment=deployment, replica=9, url="")
    await fleet.poll()

    route = fleet.route("chat")
    assert route is not None
    [(view, weight)] = route.targets
    assert (view.name, weight, view.queue_limit, view.queue_seconds) == (deployment.name, 1, 3, 9.0)
    [ready] = view.workers
    assert (ready.id, ready.epoch, ready.url) == (worker.pk, 1, "http://127.0.0.1:4000")
    assert ready.secret == worker_secret(settings.SECRET_KEY, worker.pk, 1)
    assert (ready.slots, ready.capabilities, ready.speed) == (7, frozenset({"seed", "endpoint:chat"}), 12.5)
    assert fleet.tallies[ready.id].load == 3
    assert fleet.route("unknown") is None


async def test_a_disabled_route_is_unknown_and_one_without_targets_is_known(fleet):
    await make(make_deployment, route="off")
    await make(Route.objects.filter(name="off").update, enabled=False)
    await make(Route.objects.create, name="empty")
    await fleet.poll()
    assert fleet.route("off") is None
    empty = fleet.route("empty")
    assert empty is not None
    assert empty.targets == ()


async def test_a_poll_costs_two_queries_and_a_change_of_structure_three_more(fleet):
    for _ in range(3):
        deployment = await make(make_deployment, route="chat", replicas=2)
        await make(make_worker, deployment=deployment)
        await make(make_worker, deployment=deployment)

    await fleet.poll()

    def queries(*, with_structure: bool) -> int:
        seen = set(Change.objects.values_list("id", flat=True))
        with CaptureQueriesContext(connection) as captured:
            reading = _read(frozenset({999}), seen, fleet._structure, with_structure=with_structure)
        assert len(reading.workers) == 6
        return len(captured)

    assert await in_database(queries, with_structure=False) == 2
    assert await in_database(queries, with_structure=True) == 5


@pytest.mark.parametrize(
    ("state", "starts_in"),
    [
        (WorkerState.LAUNCHING, 0.0),
        (WorkerState.LOADING, 0.0),
        (WorkerState.SUSPECT, 0.0),
        (WorkerState.DRAINING, 0.0),
        (WorkerState.LOST, 0.0),
        (WorkerState.FAILED, 0.0),
    ],
)
async def test_it_knows_that_a_worker_is_about_to_serve(fleet, state, starts_in):
    deployment = await make(make_deployment, route="chat")
    await make(make_worker, deployment=deployment, state=state)
    await fleet.poll()
    assert fleet.deployment(deployment.pk).starts_in == starts_in


async def test_it_knows_when_the_next_one_is_tried_and_that_none_will_be(fleet):
    deployment = await make(make_deployment, route="chat")
    node = await make(make_node)

    def fail() -> None:
        make_worker(deployment=deployment, node=node, replica=0, state=WorkerState.FAILED, cause="crashed")

    waits = []
    for _ in range(CRASH_LOOP):
        await in_database(fail)
        await fleet.poll()
        waits.append(fleet.deployment(deployment.pk).starts_in)
    assert waits == [0.0, *(pytest.approx(pause, abs=2) for pause in (10, 20, 40)), None]
    await in_database(retry_deployment, deployment=deployment, by="test")
    await fleet.poll()
    assert fleet.deployment(deployment.pk).starts_in == 0.0


@pytest.mark.parametrize("why", ["scaled to 0", "no node"])
async def test_where_none_can_come_it_knows_that_too(fleet, why):
    deployment = await make(make_deployment, route="chat")
    worker = await make(make_worker, deployment=deployment)
    if why == "no node":
        await make(Node.objects.filter(pk=worker.node_id).update, state=NodeState.OFFLINE)
        await make(Worker.objects.filter(pk=worker.pk).update, state=WorkerState.LOST)
    else:
        await make(Deployment.objects.filter(pk=deployment.pk).update, replicas=0)
        await make(Worker.objects.filter(pk=worker.pk).update, state=WorkerState.DRAINING)
    await fleet.poll()
    assert fleet.deployment(deployment.pk).starts_in is None


async def test_a_change_is_seen_at_the_next_poll_without_reading_everything_each_time(fleet):
    deployment = await make(make_deployment, route="chat", queue_limit=3)
    await fleet.poll()
    structure = fleet._structure
    await fleet.poll()
    assert fleet._structure is structure
    deployment.queue_limit = 77
    await in_database(save_deployment, deployment=deployment, by="test")
    await fleet.poll()
    assert fleet.deployment(deployment.pk).queue_limit == 77


async def test_a_route_edited_in_the_admin_moves_traffic_at_the_next_poll(fleet):
    first = await make(make_deployment, route="chat")
    second = await make(make_deployment)
    await fleet.poll()

    def edit() -> None:
        route = Route.objects.get(name="chat")
        RouteTarget.objects.filter(route=route).update(deployment=second)
        note_route_change(route=route, what="changed", by="test")

    await in_database(edit)
    await fleet.poll()
    assert [deployment.id for deployment, _ in fleet.route("chat").targets] == [second.pk]
    assert first.pk != second.pk


async def test_a_deployment_of_which_no_change_told_is_found_through_its_worker(fleet):
    await fleet.poll()
    deployment = await make(make_deployment, route="chat")
    await make(make_worker, deployment=deployment)
    await make(Change.objects.all().delete)
    await fleet.poll()
    await fleet.poll()
    assert len(fleet.route("chat").targets[0][0].workers) == 1


async def test_a_subscriber_hears_each_change_once_even_when_ids_appear_out_of_order(fleet):
    heard = []
    fleet.subscribe("api_key", heard.append)
    await fleet.poll()
    key, _ = await make(make_api_key)
    await in_database(revoke_api_key, api_key=key, by="test")
    await fleet.poll()
    await fleet.poll()
    assert heard == [key.public_id]
    newest = (await in_database(Change.objects.order_by("-id").first)).pk
    await make(Change.objects.create, id=newest + 5, kind="api_key", key="later")
    await fleet.poll()
    # A slow transaction got its number first and commits last.
    await make(Change.objects.create, id=newest + 2, kind="api_key", key="earlier")
    await fleet.poll()
    assert heard[1:] == ["later", "earlier"]


async def test_a_failing_subscriber_stops_neither_the_poll_nor_the_others(fleet, caplog):
    heard = []

    def fail(key: str) -> None:
        raise ValueError(key)

    fleet.subscribe("api_key", fail)
    fleet.subscribe("api_key", heard.append)
    await in_database(publish_change, "api_key", "k1")
    await fleet.poll()
    assert heard == ["k1"]
    assert fleet.database_away_seconds == 0
    assert "subscriber_failed" in caplog.text


async def test_old_changes_are_not_told_again(fleet):
    heard = []
    fleet.subscribe("api_key", heard.append)
    old = await in_database(database_now) - timedelta(seconds=60)
    await make(Change.objects.create, kind="api_key", key="old", at=old)
    await fleet.poll()
    assert heard == []


async def test_orders_follow_the_workers_state(fleet):
    ready = await make(make_worker)
    draining = await make(make_worker, state=WorkerState.DRAINING)
    lost = await make(make_worker, state=WorkerState.LOST)
    await fleet.poll()
    assert fleet.order(ready.pk, 1) == BeatOrder.CONTINUE
    assert fleet.order(ready.pk, 7) == BeatOrder.EXIT
    assert fleet.order(draining.pk, 1) == BeatOrder.DRAIN
    assert fleet.order(lost.pk, 1) == BeatOrder.CONTINUE
    await in_database(move_worker, worker=ready, to=WorkerState.FAILED, reason="test", by="test")
    await fleet.poll()
    assert fleet.order(ready.pk, 1) == BeatOrder.EXIT


async def test_a_worker_that_ended_before_this_gateway_started_is_told_so_once_the_database_was_asked(fleet):
    ended = await make(make_worker, state=WorkerState.STOPPED)
    await fleet.poll()
    assert fleet.order(ended.pk, 1) == BeatOrder.CONTINUE
    # No row at all: deleted with its deployment.
    assert fleet.order(ended.pk + 1000, 1) == BeatOrder.CONTINUE
    await fleet.poll()
    assert fleet.order(ended.pk, 1) == BeatOrder.EXIT
    assert fleet.order(ended.pk + 1000, 1) == BeatOrder.EXIT


async def test_a_worker_younger_than_the_snapshot_goes_on(fleet, monkeypatch):
    await fleet.poll()
    young = await make(make_worker)
    assert fleet.order(young.pk, 1) == BeatOrder.CONTINUE
    with monkeypatch.context() as patch:
        patch.setattr(fleet_module, "_read", unavailable)
        await fleet.poll()
        # Unknown for as long as the database is away.
        assert fleet.order(young.pk, 1) == BeatOrder.CONTINUE
    await fleet.poll()
    assert fleet.order(young.pk, 1) == BeatOrder.CONTINUE
    assert not fleet._unknown


def unavailable(*_args, **_kwargs):
    raise OperationalError("the server closed the connection")


async def test_while_the_database_is_away_the_last_snapshot_serves(fleet, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "roundhouse.fleet")
    deployment = await make(make_deployment, route="chat")
    await make(make_worker, deployment=deployment)
    heard = []
    fleet.subscribe("api_key", heard.append)
    await fleet.poll()
    assert fleet.database_away_seconds == 0
    with monkeypatch.context() as patch:
        patch.setattr(fleet_module, "_read", unavailable)
        for _ in range(3):
            await fleet.poll()
        first = fleet.database_away_seconds
        assert first > 0
        lease = await Dispatcher(fleet).acquire(fleet.route("chat"))
        lease.release()
        await fleet.poll()
        assert fleet.database_away_seconds > first
    await fleet.poll()
    assert fleet.database_away_seconds == 0
    # Said once when it left and once when it returned.
    assert [record.getMessage().split()[0] for record in caplog.records] == [
        "event=database_away",
        "event=database_back",
    ]
    assert heard == []


async def test_after_a_long_absence_subscribers_forget_everything(fleet, monkeypatch):
    heard = []
    fleet.subscribe("api_key", heard.append)
    await fleet.poll()
    monkeypatch.setattr(fleet, "_answered_at", fleet._answered_at - 20)
    await fleet.poll()
    assert heard == [FORGET_ALL]


async def test_a_poll_that_hangs_counts_as_the_database_being_away(fleet, monkeypatch):
    await fleet.poll()
    monkeypatch.setattr(fleet, "_answered_at", fleet._answered_at - 5)
    assert fleet.database_away_seconds >= 5


async def test_start_comes_back_without_a_database_and_goes_on_trying(monkeypatch):
    fleet = Fleet(poll_seconds=0.02)
    deployment = await make(make_deployment, route="chat")
    await make(make_worker, deployment=deployment)
    with monkeypatch.context() as patch:
        patch.setattr(fleet_module, "_read", unavailable)
        await fleet.start()
        assert fleet.route("chat") is None
    async with asyncio.timeout(5):
        while fleet.route("chat") is None:  # noqa: ASYNC110 - polled, with a deadline
            await asyncio.sleep(0.01)
    await fleet.stop()
    await fleet.stop()


async def test_who_finds_no_worker_looks_again_before_it_is_refused(fleet, monkeypatch):
    monkeypatch.setattr(fleet_module, "LOOK_SECONDS", 0)
    deployment = await make(make_deployment, route="chat", slots=4)
    dead = await make(make_worker, deployment=deployment)
    await fleet.poll()
    route = fleet.route("chat")
    fleet.mark_unreachable(route.targets[0][0].workers[0])
    fresh = await make(make_worker, deployment=deployment, replica=2)
    lease = await Dispatcher(fleet).acquire(route, Wish(avoid=frozenset({dead.pk})))
    assert lease.worker.id == fresh.pk


async def test_those_who_look_at_once_share_a_poll_and_a_new_snapshot_is_enough(fleet, monkeypatch):
    polls = 0
    read = fleet_module._read

    def counted(*args, **facts):
        nonlocal polls
        polls += 1
        return read(*args, **facts)

    monkeypatch.setattr(fleet_module, "_read", counted)
    await asyncio.gather(*(fleet.look() for _ in range(50)))
    assert polls == 1
    monkeypatch.setattr(fleet_module, "LOOK_SECONDS", 60)
    await fleet.look()
    assert polls == 1
    monkeypatch.setattr(fleet_module, "LOOK_SECONDS", 0)
    await fleet.look()
    assert polls == 2


async def test_a_database_that_does_not_answer_holds_no_refusal_up(fleet, monkeypatch):
    monkeypatch.setattr(fleet_module, "LOOK_SECONDS", 0)
    await make(make_deployment, route="chat", replicas=0)
    await fleet.poll()
    with monkeypatch.context() as patch:
        patch.setattr(fleet_module, "_read", unavailable)
        for _ in range(2):
            with pytest.raises(NoWorker):
                await Dispatcher(fleet).acquire(fleet.route("chat"))
    await fleet.poll()
    over = threading.Event()
    monkeypatch.setattr(fleet_module, "_read", lambda *_, **__: over.wait(5))
    began = time.monotonic()
    with pytest.raises(NoWorker):
        await Dispatcher(fleet).acquire(fleet.route("chat"))
    assert time.monotonic() - began < 2
    over.set()
    await fleet.stop()


async def test_loads_are_dated_by_the_databases_clock(fleet):
    now = await in_database(database_now)
    deployment = await make(make_deployment, route="chat", slots=8)
    worker = await make(
        make_worker, deployment=deployment, running=4, heartbeat_at=now - timedelta(seconds=5)
    )
    await fleet.poll()
    # Half of its weight is gone after 2 + 3 seconds.
    assert 1.7 < fleet.tallies[worker.pk].load < 2.3
    fleet.note_load(worker.pk, Load(running=6))
    assert fleet.tallies[worker.pk].load == 6
    # The database's older report does not replace what was heard directly.
    await fleet.poll()
    assert fleet.tallies[worker.pk].load == 6


async def test_a_worker_that_is_unreachable_returns_with_its_next_beat_in_the_database(fleet):
    deployment = await make(make_deployment, route="chat")
    worker = await make(make_worker, deployment=deployment)
    await fleet.poll()
    fleet.mark_unreachable(fleet.route("chat").targets[0][0].workers[0])
    await fleet.poll()
    assert not fleet.tallies[worker.pk].free
    later = await in_database(database_now) + timedelta(milliseconds=50)
    await make(Worker.objects.filter(pk=worker.pk).update, heartbeat_at=later)
    await fleet.poll()
    assert fleet.tallies[worker.pk].free


async def test_a_worker_that_falls_silent_gets_nothing_and_keeps_our_leases(fleet):
    deployment = await make(make_deployment, route="chat", slots=2)
    worker = await make(make_worker, deployment=deployment)
    dispatcher = Dispatcher(fleet)
    await fleet.poll()
    lease = await dispatcher.acquire(fleet.route("chat"))
    await in_database(move_worker, worker=worker, to=WorkerState.SUSPECT, reason="silent", by="test")
    await fleet.poll()
    assert fleet.route("chat").targets[0][0].workers == ()
    await in_database(move_worker, worker=worker, to=WorkerState.READY, reason="back", by="test")
    await fleet.poll()
    assert fleet.tallies[worker.pk].leases == 1
    lease.release()
    assert fleet.tallies[worker.pk].leases == 0
