"""The reaper and reconcile against the database, with `now` passed in."""

from __future__ import annotations

import threading
from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from inference.liveness import FIRST_BEAT_WITHIN, reap
from inference.protocol import Cause
from inference.reconcile import CreateWorker, DrainWorker, ReplaceLost, StopWorker, reconcile
from inference.status import DeploymentState, read_statuses
from registry.actions.deployments import retry_deployment, save_deployment, scale_deployment
from registry.actions.gateways import forget_silent_gateways, note_gateway
from registry.actions.workers import move_worker
from registry.models import Deployment, Event, Gateway, ModelCopy, Node, Worker
from registry.querysets import database_now
from registry.states import CopyState, NodeState, WorkerState
from tests.factories import make_deployment, make_node, make_worker

pytestmark = pytest.mark.django_db


def listening(now: datetime, *, since: float = 60, seen: float = 0.0) -> None:
    """A gateway that has listened for `since` seconds and was last seen `seen` seconds ago."""
    Gateway.objects.create(
        name="g", listening_since=now - timedelta(seconds=since), seen_at=now - timedelta(seconds=seen)
    )


@pytest.fixture
def now() -> datetime:
    return database_now()


def worker_silent_for(now: datetime, seconds: float, **facts: Any) -> Worker:
    return make_worker(heartbeat_at=now - timedelta(seconds=seconds), **facts)


def reaped(worker: Worker, now: datetime) -> WorkerState:
    reap(now)
    worker.refresh_from_db()
    return WorkerState(worker.state)


def the_states(deployment: Deployment) -> dict[str, str]:
    return {str(worker): worker.state for worker in deployment.workers.order_by("id")}


def quiet(names: Collection[str]) -> None:
    """A nudge that nobody hears."""


# -- Silence


@pytest.mark.parametrize(
    ("before", "silent", "after"),
    [
        (WorkerState.READY, 4.9, WorkerState.READY),
        (WorkerState.READY, 5.1, WorkerState.SUSPECT),
        (WorkerState.SUSPECT, 9.9, WorkerState.SUSPECT),
        (WorkerState.SUSPECT, 10.1, WorkerState.LOST),
        (WorkerState.LOADING, 9.9, WorkerState.LOADING),
        (WorkerState.LOADING, 10.1, WorkerState.LOST),
        (WorkerState.DRAINING, 9.9, WorkerState.DRAINING),
        (WorkerState.DRAINING, 10.1, WorkerState.STOPPED),
        (WorkerState.LOST, 1000, WorkerState.LOST),
        (WorkerState.FAILED, 1000, WorkerState.FAILED),
    ],
)
def test_a_silent_worker_is_suspect_and_then_lost(
    now: datetime, before: WorkerState, silent: float, after: WorkerState
) -> None:
    listening(now)
    assert reaped(worker_silent_for(now, silent, state=before), now) == after


def test_a_worker_long_silent_takes_one_step_at_a_time(now: datetime) -> None:
    listening(now)
    worker = worker_silent_for(now, 60)
    assert reaped(worker, now) == WorkerState.SUSPECT
    assert reaped(worker, now) == WorkerState.LOST
    assert list(
        Event.objects.filter(kind="worker", object_id=worker.pk).order_by("id").values_list("what", "by")
    ) == [("suspect", "reaper"), ("lost", "reaper")]


def test_a_worker_that_never_beat_is_judged_from_when_it_got_its_state(now: datetime) -> None:
    listening(now)
    facts = {"heartbeat_at": None, "state": WorkerState.LOADING}
    fresh = make_worker(**facts, state_changed_at=now - timedelta(seconds=9))
    old = make_worker(**facts, state_changed_at=now - timedelta(seconds=11))
    assert reaped(fresh, now) == WorkerState.LOADING
    assert reaped(old, now) == WorkerState.LOST


def test_loading_may_take_long_as_long_as_it_beats(now: datetime) -> None:
    listening(now)
    worker = worker_silent_for(now, 2, state=WorkerState.LOADING, state_changed_at=now - timedelta(hours=2))
    assert reaped(worker, now) == WorkerState.LOADING


@pytest.mark.parametrize(
    ("presence", "why"),
    [
        (None, "no gateway was ever there"),
        ({"since": 14}, "it came back a moment ago"),
        ({"seen": 4}, "it is gone"),
    ],
)
def test_silence_counts_only_while_a_gateway_was_there_to_hear_it(
    now: datetime, presence: dict[str, float] | None, why: str
) -> None:
    if presence is not None:
        listening(now, **presence)
    node = make_node(last_seen_at=now - timedelta(seconds=60))
    assert reaped(worker_silent_for(now, 60, node=node), now) == WorkerState.READY, why
    node.refresh_from_db()
    assert node.state == NodeState.ONLINE, why


def test_a_gateway_that_is_gone_did_not_hear_what_came_since(now: datetime) -> None:
    """Killed 2.9 s ago, it may have missed a beat that was due then, and the next."""
    listening(now, seen=2.9)
    assert reaped(worker_silent_for(now, 5.4), now) == WorkerState.READY
    assert reaped(worker_silent_for(now, 8.1), now) == WorkerState.SUSPECT


def test_a_gateway_whose_presence_broke_begins_anew() -> None:
    note_gateway(name="g", unbroken=False)
    first = Gateway.objects.get()
    note_gateway(name="g", unbroken=True)
    assert Gateway.objects.get().listening_since == first.listening_since
    note_gateway(name="g", unbroken=False)
    assert Gateway.objects.get().listening_since > first.listening_since


def test_gateways_long_gone_are_forgotten(now: datetime) -> None:
    listening(now, since=9000, seen=7200)
    note_gateway(name="here", unbroken=False)
    assert forget_silent_gateways() == 1
    assert Gateway.objects.get().name == "here"


@pytest.mark.parametrize(
    ("before", "silent", "after"),
    [
        (NodeState.ONLINE, 4.9, NodeState.ONLINE),
        (NodeState.ONLINE, 5.1, NodeState.SUSPECT),
        (NodeState.SUSPECT, 9.9, NodeState.SUSPECT),
        (NodeState.SUSPECT, 10.1, NodeState.OFFLINE),
        (NodeState.JOINING, 60, NodeState.JOINING),
        (NodeState.OFFLINE, 60, NodeState.OFFLINE),
    ],
)
def test_a_silent_node_is_suspect_and_then_offline(
    now: datetime, before: NodeState, silent: float, after: NodeState
) -> None:
    listening(now)
    node = make_node(state=before, last_seen_at=now - timedelta(seconds=silent))
    reap(now)
    node.refresh_from_db()
    assert node.state == after


def test_a_worker_that_beats_outlives_its_agent(now: datetime) -> None:
    listening(now)
    node = make_node(state=NodeState.OFFLINE, last_seen_at=now - timedelta(seconds=60))
    assert reaped(worker_silent_for(now, 1, node=node), now) == WorkerState.READY


@pytest.mark.parametrize("state", [WorkerState.REQUESTED, WorkerState.LAUNCHING])
@pytest.mark.parametrize("node_state", [NodeState.ONLINE, NodeState.SUSPECT, NodeState.OFFLINE])
def test_a_worker_not_started_yet_is_judged_by_its_node(
    now: datetime, state: WorkerState, node_state: NodeState
) -> None:
    listening(now)
    node = make_node(state=node_state, last_seen_at=now)
    old = now - timedelta(hours=1)
    worker = make_worker(node=node, state=state, state_changed_at=old, heartbeat_at=None)
    assert reaped(worker, now) == (WorkerState.LOST if node_state == NodeState.OFFLINE else state)


def test_a_started_process_that_never_speaks_is_lost(now: datetime) -> None:
    listening(now)
    within = FIRST_BEAT_WITHIN.total_seconds()
    assert reaped(worker_silent_for(now, within - 1, state=WorkerState.LAUNCHING), now) == "launching"
    assert reaped(worker_silent_for(now, within + 1, state=WorkerState.LAUNCHING), now) == "lost"


# -- Reconcile carried out


def test_a_wish_becomes_workers_and_the_nodes_are_nudged(
    django_capture_on_commit_callbacks: Any,
) -> None:
    nodes = [make_node(), make_node()]
    deployment = make_deployment(replicas=2)
    nudged: list[Collection[str]] = []
    with django_capture_on_commit_callbacks(execute=True):
        done = reconcile(nudged.append)
    assert [type(command) for command in done] == [CreateWorker, CreateWorker]
    assert the_states(deployment) == {
        f"{deployment.name}-0 #1": "requested",
        f"{deployment.name}-1 #1": "requested",
    }
    assert nudged == [sorted(node.name for node in nodes)]
    assert reconcile(nudged.append) == []
    assert len(nudged) == 1


def test_a_failed_worker_is_started_again_with_the_next_epoch() -> None:
    make_node()
    deployment = make_deployment()
    reconcile(quiet)
    worker = deployment.workers.get()
    move_worker(
        worker=worker, to=WorkerState.FAILED, reason="killed", by="test", facts={"cause": Cause.KILLED}
    )
    reconcile(quiet)
    assert the_states(deployment) == {
        f"{deployment.name}-0 #1": "failed",
        f"{deployment.name}-0 #2": "requested",
    }


def test_a_crash_loop_ends_and_a_retry_begins_anew() -> None:
    node = make_node()
    deployment = make_deployment()
    later = database_now() + timedelta(seconds=1)
    for epoch in range(1, 6):
        make_worker(
            deployment=deployment,
            node=node,
            replica=0,
            epoch=epoch,
            state=WorkerState.FAILED,
            state_changed_at=later,
            state_reason="It ended by itself.",
            cause=Cause.CRASHED,
        )
    assert reconcile(quiet) == []
    status = read_statuses([deployment])[deployment.pk]
    assert (status.state, status.cause) == (DeploymentState.FAILED, Cause.CRASHED)
    assert "It ended by itself." in status.reason
    Deployment.objects.filter(pk=deployment.pk).update(wish_changed_at=later + timedelta(seconds=1))
    assert len(reconcile(quiet)) == 1
    assert deployment.workers.latest("id").epoch == 6


def test_a_retry_moves_the_wish_past_its_failures() -> None:
    deployment = make_deployment()
    before = deployment.wish_changed_at
    retry_deployment(deployment=deployment, by="test")
    deployment.refresh_from_db()
    assert deployment.wish_changed_at > before


def test_a_missing_model_is_given_up_while_others_run() -> None:
    make_node()
    broken, well = make_deployment(), make_deployment()
    reconcile(quiet)
    move_worker(
        worker=broken.workers.get(),
        to=WorkerState.FAILED,
        reason="The folder is missing.",
        by="test",
        facts={"cause": Cause.MISSING_FILE},
    )
    move_worker(worker=well.workers.get(), to=WorkerState.READY, reason="", by="test")
    assert reconcile(quiet) == []
    statuses = read_statuses([broken, well])
    assert statuses[broken.pk].state == DeploymentState.FAILED
    assert statuses[broken.pk].reason == "Gave up: missing file: The folder is missing."
    assert statuses[well.pk].state == DeploymentState.READY


def test_scaling_to_none_drains_what_serves_and_stops_what_does_not() -> None:
    deployment = make_deployment(replicas=3)
    for replica, state in enumerate([WorkerState.READY, WorkerState.LOADING, WorkerState.REQUESTED]):
        make_worker(deployment=deployment, replica=replica, state=state)
    scale_deployment(deployment=deployment, replicas=0, by="test")
    done = reconcile(quiet)
    assert [type(command) for command in done] == [StopWorker, DrainWorker, DrainWorker]
    assert sorted(the_states(deployment).values()) == ["draining", "draining", "stopped"]


def test_a_lost_worker_is_failed_and_replaced_on_another_node(now: datetime) -> None:
    listening(now)
    gone = make_node(state=NodeState.OFFLINE, last_seen_at=now - timedelta(minutes=5))
    here = make_node()
    worker = worker_silent_for(now, 60, node=gone, state=WorkerState.LOST)
    done = reconcile(quiet)
    assert [type(command) for command in done] == [ReplaceLost, CreateWorker]
    worker.refresh_from_db()
    assert (worker.state, worker.cause) == (WorkerState.FAILED, Cause.LOST)
    replacement = worker.deployment.workers.live().get()
    assert (replacement.node, replacement.epoch) == (here, worker.epoch + 1)


def test_a_worker_stuck_on_a_node_that_went_away_is_moved(now: datetime) -> None:
    listening(now)
    gone = make_node(state=NodeState.OFFLINE, last_seen_at=now - timedelta(minutes=5))
    here = make_node()
    stuck = make_worker(node=gone, state=WorkerState.REQUESTED, heartbeat_at=None)
    reap(now)
    reconcile(quiet)
    assert stuck.deployment.workers.live().get().node == here


def test_a_new_revision_replaces_workers_one_by_one() -> None:
    make_node()
    deployment = make_deployment(replicas=2)
    workers = [make_worker(deployment=deployment, replica=replica) for replica in range(2)]
    deployment.slots = 7
    save_deployment(deployment=deployment, by="test")
    assert [type(command) for command in reconcile(quiet)] == [DrainWorker]
    assert reconcile(quiet) == [], "the other one goes on serving"
    last = workers[1]
    last.refresh_from_db()
    move_worker(worker=last, to=WorkerState.STOPPED, reason="drained", by="test")
    assert [type(command) for command in reconcile(quiet)] == [CreateWorker]
    new = deployment.workers.live().get(replica=1)
    assert new.revision == deployment.revision
    assert reconcile(quiet) == []
    move_worker(worker=new, to=WorkerState.READY, reason="", by="test")
    assert [type(command) for command in reconcile(quiet)] == [DrainWorker]


def test_a_worker_that_comes_back_before_it_is_replaced_keeps_its_place(
    monkeypatch: pytest.MonkeyPatch, now: datetime
) -> None:
    make_node()
    worker = make_worker(state=WorkerState.LOST)
    from inference import reconcile as module

    original = module.plan

    def plan_and_lose_the_race(*arguments: Any) -> Any:
        commands = original(*arguments)
        move_worker(worker=worker, to=WorkerState.READY, reason="came back", by="test")
        return commands

    monkeypatch.setattr(module, "plan", plan_and_lose_the_race)
    assert reconcile(quiet) == []
    worker.refresh_from_db()
    assert worker.state == WorkerState.READY
    assert worker.deployment.workers.count() == 1


def test_reconcile_costs_a_fixed_number_of_queries() -> None:
    node = make_node()
    for _ in range(5):
        make_worker(deployment=make_deployment(), node=node)
    with CaptureQueriesContext(connection) as queries:
        assert reconcile(quiet) == []
    # Deployments, workers, nodes, and PostgreSQL's clock.
    assert len(queries) <= 4


def test_how_far_a_models_files_are_shows_in_the_status() -> None:
    node = make_node()
    worker = make_worker(node=node, state=WorkerState.LAUNCHING)
    ModelCopy.objects.create(
        language_model=worker.deployment.language_model,
        node=node,
        state=CopyState.FETCHING,
        step="fetching",
        done=30,
        total=120,
    )
    status = read_statuses([worker.deployment])[worker.deployment_id]
    assert status.reason == f"{worker.name} on {node.name}: fetching, 25 %."


@pytest.mark.django_db(transaction=True)
def test_two_controls_at_once_do_no_harm() -> None:
    Node.objects.all().delete()
    for _ in range(3):
        make_node()
    deployment = make_deployment(replicas=6)
    start = threading.Barrier(3)
    errors: list[BaseException] = []

    def control() -> None:
        try:
            start.wait(10)
            for _ in range(3):
                reconcile(quiet)
        except BaseException as error:
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=control) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert sorted(deployment.workers.values_list("replica", "epoch")) == [(n, 1) for n in range(6)]
