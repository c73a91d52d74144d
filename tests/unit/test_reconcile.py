"""`plan` and `derive` are pure: tables of wishes and facts against commands and statuses. No database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from inference.protocol import PERMANENT, Cause
from inference.reconcile import (
    CRASH_LOOP,
    Command,
    CreateWorker,
    DeploymentWish,
    DrainWorker,
    Facts,
    Failure,
    NodeFact,
    ReplaceLost,
    StopWorker,
    WorkerFact,
    failures_in_a_row,
    next_start,
    place,
    plan,
    vanished_together,
)
from inference.status import DeploymentState, DeploymentStatus, derive
from registry.states import WORKER_STARTING, NodeState, WorkerState

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
READY, LOST = WorkerState.READY, WorkerState.LOST
LIVE_BUT_LOST = [
    WorkerState.REQUESTED,
    WorkerState.LAUNCHING,
    WorkerState.LOADING,
    WorkerState.READY,
    WorkerState.SUSPECT,
    WorkerState.DRAINING,
]


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


def wish(replicas: int = 1, **facts: Any) -> DeploymentWish:
    defaults: dict[str, Any] = {
        "id": 1,
        "name": "d",
        "revision_id": 2,
        "changed_at": NOW - timedelta(days=1),
    }
    return DeploymentWish(replicas=replicas, **defaults | facts)


def worker(replica: int = 0, state: WorkerState = READY, **facts: Any) -> WorkerFact:
    defaults: dict[str, Any] = {
        "id": 100 + replica,
        "name": f"d-{replica}",
        "deployment_id": 1,
        "revision_id": 2,
        "node_id": 1,
        "state_changed_at": NOW,
    }
    return WorkerFact(replica=replica, state=state, **defaults | facts)


def node(id: int = 1, state: NodeState = NodeState.ONLINE, silent: float = 0, **facts: Any) -> NodeFact:
    return NodeFact(id=id, name=f"n{id}", state=state, last_seen_at=NOW - seconds(silent), **facts)


def failure(cause: str = Cause.CRASHED, ago: float = 1000, **facts: Any) -> Failure:
    defaults: dict[str, Any] = {"deployment_id": 1, "replica": 0, "node_id": 1, "detail": "It broke."}
    return Failure(cause=cause, ended_at=NOW - seconds(ago), **defaults | facts)


def failures(count: int, cause: str = Cause.CRASHED, ago: float = 0) -> list[Failure]:
    return [failure(cause, ago + 20 * number) for number in range(count)]


def planned(
    *wishes: DeploymentWish,
    workers: list[WorkerFact] | None = None,
    nodes: list[NodeFact] | None = None,
    ended: list[Failure] | None = None,
    now: datetime = NOW,
) -> list[Command]:
    return plan(wishes, facts(workers, nodes, ended), now)


def facts(
    workers: list[WorkerFact] | None = None,
    nodes: list[NodeFact] | None = None,
    ended: list[Failure] | None = None,
) -> Facts:
    return Facts(
        workers=workers or [],
        nodes=[node()] if nodes is None else nodes,
        failures={(1, 0): ended} if ended else {},
    )


def created(commands: list[Command]) -> list[tuple[int, int]]:
    """Replica and node of each worker created."""
    return [(command.replica, command.node_id) for command in commands if isinstance(command, CreateWorker)]


# -- Replicas


def test_every_wished_replica_without_a_worker_gets_one() -> None:
    assert created(planned(wish(3))) == [(0, 1), (1, 1), (2, 1)]


def test_no_replica_is_a_wish_too() -> None:
    assert planned(wish(0)) == []


@pytest.mark.parametrize("state", LIVE_BUT_LOST)
def test_a_live_worker_holds_its_replicas_place(state: WorkerState) -> None:
    assert planned(wish(1), workers=[worker(state=state)]) == []


def test_a_gap_among_the_replicas_is_filled() -> None:
    assert created(planned(wish(3), workers=[worker(0), worker(2)])) == [(1, 1)]


def test_surplus_replicas_drain_the_highest_first() -> None:
    commands = planned(wish(1), workers=[worker(0), worker(1), worker(2)])
    assert commands == [
        DrainWorker(worker_id=102, reason="scaled to 1"),
        DrainWorker(worker_id=101, reason="scaled to 1"),
    ]


def test_surplus_that_serves_nothing_is_stopped_without_a_drain() -> None:
    commands = planned(wish(0), workers=[worker(0, WorkerState.REQUESTED), worker(1, LOST)])
    assert [type(command) for command in commands] == [StopWorker, StopWorker]


def test_surplus_that_drains_already_is_left_alone() -> None:
    assert planned(wish(0), workers=[worker(0, WorkerState.DRAINING)]) == []


def test_planning_twice_gives_the_same() -> None:
    assert planned(wish(3), workers=[worker(1)]) == planned(wish(3), workers=[worker(1)])


# -- Placement


def test_the_node_with_the_fewest_live_workers_is_chosen() -> None:
    nodes = [node(1), node(2), node(3)]
    workers = [worker(0, node_id=1), worker(0, id=7, deployment_id=9, node_id=2)]
    assert created(planned(wish(4), workers=workers, nodes=nodes)) == [(1, 3), (2, 1), (3, 2)]


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (node(2, cordoned=True), "n2 is cordoned"),
        (node(2, NodeState.JOINING), "n2 is joining"),
        (node(2, NodeState.SUSPECT), "n2 is suspect"),
        (node(2, NodeState.OFFLINE), "n2 is offline"),
        (node(2), "n2 lacks the label gpu=h100"),
        (node(2, labels={"gpu": "a100"}), "n2 lacks the label gpu=h100"),
    ],
)
def test_a_node_that_may_not_is_refused_and_named(refused: NodeFact, why: str) -> None:
    picky = wish(1, node_labels={"gpu": "h100"})
    chosen = node(1, labels={"gpu": "h100", "rack": "4"})
    assert created(planned(picky, nodes=[chosen, refused])) == [(0, 1)]
    placement = place(picky, [refused], {})
    assert placement.node is None
    assert placement.explain() == why


def test_without_a_node_nothing_is_created_and_that_is_explained() -> None:
    assert planned(wish(1), nodes=[]) == []
    assert place(wish(1), [], {}).explain() == "no node has joined"


def test_a_replica_that_failed_on_one_node_tries_another() -> None:
    nodes = [node(1), node(2)]
    assert created(planned(wish(1), nodes=nodes, ended=[failure(node_id=1)])) == [(0, 2)]


# -- Restarts


@pytest.mark.parametrize(
    ("in_a_row", "pause"), [(1, 0), (2, 10), (3, 20), (4, 40), (5, 80), (6, 160), (7, 300), (12, 300)]
)
def test_the_pause_before_a_restart_grows_with_the_failures_in_a_row(in_a_row: int, pause: float) -> None:
    # Two causes in turn: like ones would be given up.
    ended = [failure([Cause.CRASHED, Cause.KILLED][number % 2], number * 20) for number in range(in_a_row)]
    if pause:
        assert planned(wish(1), ended=ended, now=NOW + seconds(pause - 0.1)) == []
    assert created(planned(wish(1), ended=ended, now=NOW + seconds(pause))) == [(0, 1)]


def test_like_causes_in_a_row_are_given_up() -> None:
    late = NOW + timedelta(days=1)
    assert created(planned(wish(1), ended=failures(CRASH_LOOP - 1), now=late)) == [(0, 1)]
    assert planned(wish(1), ended=failures(CRASH_LOOP), now=late) == []


def test_another_cause_in_between_begins_the_count_anew() -> None:
    ended = [*failures(4), failure(Cause.KILLED, 90), *failures(4, ago=100)]
    assert created(planned(wish(1), ended=ended, now=NOW + timedelta(days=1))) == [(0, 1)]


@pytest.mark.parametrize("cause", sorted(PERMANENT))
def test_a_permanent_cause_is_given_up_at_once(cause: Cause) -> None:
    assert planned(wish(1), ended=[failure(cause)]) == []


@pytest.mark.parametrize("cause", [Cause.LOST, Cause.VANISHED])
def test_what_happens_to_machines_is_never_given_up(cause: Cause) -> None:
    assert created(planned(wish(1), ended=failures(12, cause), now=NOW + seconds(300))) == [(0, 1)]


def test_a_worker_that_was_ready_for_long_ends_a_row_of_failures() -> None:
    steady = failure(ago=0, ready_at=NOW - seconds(60))
    assert failures_in_a_row([steady, *failures(9)]).count == 1
    assert created(planned(wish(1), ended=[steady, *failures(9)])) == [(0, 1)]


def test_a_worker_that_was_ready_only_shortly_does_not() -> None:
    brief = failure(ago=0, ready_at=NOW - seconds(59))
    assert failures_in_a_row([brief, *failures(2)]).count == 3


def test_an_ordered_stop_is_no_failure() -> None:
    stopped = failure(Cause.STOPPED, 0, stopped=True)
    assert failures_in_a_row([stopped, *failures(9)]).count == 0
    assert created(planned(wish(1), ended=[stopped, *failures(9)])) == [(0, 1)]


def test_one_replica_that_gave_up_does_not_hold_the_others_back() -> None:
    assert created(planned(wish(2), ended=[failure(Cause.BAD_ARGUMENT)])) == [(1, 1)]


def test_a_restart_says_why() -> None:
    [command] = planned(wish(1), ended=[failure(Cause.OUT_OF_MEMORY)])
    assert isinstance(command, CreateWorker)
    assert command.reason == "started again after: out_of_memory"


# -- Lost workers


def test_a_lost_worker_is_replaced_elsewhere() -> None:
    nodes = [node(1, NodeState.OFFLINE, silent=11), node(2), node(3)]
    commands = planned(wish(1), workers=[worker(0, LOST)], nodes=nodes)
    assert commands == [
        ReplaceLost(worker_id=100, reason="replaced on n2"),
        CreateWorker(deployment_id=1, replica=0, node_id=2, reason="started again after: lost"),
    ]


def test_a_lost_worker_may_come_back_while_there_is_no_place_for_the_next() -> None:
    nodes = [node(1, NodeState.OFFLINE, silent=11)]
    assert planned(wish(1), workers=[worker(0, LOST)], nodes=nodes) == []


def test_a_lost_worker_waits_for_its_restarts_pause() -> None:
    ended = failures(2)
    commands = planned(wish(1), workers=[worker(0, LOST)], ended=ended, now=NOW + seconds(19))
    assert commands == []
    commands = planned(wish(1), workers=[worker(0, LOST)], ended=ended, now=NOW + seconds(20))
    assert [type(command) for command in commands] == [ReplaceLost, CreateWorker]


@pytest.mark.parametrize(
    ("nodes", "together"),
    [
        ([node(1), node(2, NodeState.OFFLINE, 12)], False),
        ([node(1), node(2), node(3, NodeState.OFFLINE, 12), node(4, NodeState.OFFLINE, 12)], False),
        ([node(1), node(2, NodeState.OFFLINE, 12), node(3, NodeState.OFFLINE, 12)], True),
        ([node(1), node(2, NodeState.SUSPECT, 9), node(3, NodeState.OFFLINE, 12)], True),
        ([node(1, NodeState.OFFLINE, 12), node(2, NodeState.OFFLINE, 12)], True),
        # Gone before, one after another.
        ([node(1), node(2, NodeState.OFFLINE, 3600), node(3, NodeState.OFFLINE, 12)], False),
        # Really gone: an operator said so.
        ([node(1), node(2, NodeState.OFFLINE, 12, cordoned=True), node(3, NodeState.OFFLINE, 12)], False),
        ([], False),
    ],
)
def test_more_than_half_of_the_nodes_and_at_least_two_is_together(
    nodes: list[NodeFact], together: bool
) -> None:
    assert vanished_together(nodes) is together


def test_nothing_is_replaced_when_most_nodes_vanish_together() -> None:
    nodes = [node(1, NodeState.OFFLINE, 12), node(2, NodeState.OFFLINE, 12), node(3)]
    workers = [worker(0, LOST, node_id=1), worker(1, LOST, node_id=2), worker(2, LOST, node_id=3)]
    assert planned(wish(3), workers=workers, nodes=nodes) == []


def test_a_new_wish_is_still_carried_out_then() -> None:
    nodes = [node(1, NodeState.OFFLINE, 12), node(2, NodeState.OFFLINE, 12), node(3)]
    workers = [worker(0, LOST, node_id=1)]
    assert created(planned(wish(2), workers=workers, nodes=nodes)) == [(1, 3)]


# -- Updates


def test_an_update_takes_one_ready_worker_out_at_a_time() -> None:
    workers = [worker(replica, revision_id=1) for replica in range(3)]
    assert planned(wish(3), workers=workers) == [
        DrainWorker(worker_id=102, reason="a newer revision replaces it")
    ]


@pytest.mark.parametrize("state", [*WORKER_STARTING, WorkerState.DRAINING, WorkerState.SUSPECT])
def test_an_update_waits_while_another_replica_does_not_serve(state: WorkerState) -> None:
    workers = [worker(0, revision_id=1), worker(1, state, revision_id=2)]
    assert planned(wish(2), workers=workers) == []


def test_an_update_waits_while_a_replica_is_missing() -> None:
    commands = planned(wish(2), workers=[worker(0, revision_id=1)])
    assert created(commands) == [(1, 1)]
    assert len(commands) == 1


def test_an_old_worker_that_does_not_serve_yet_is_replaced_at_once() -> None:
    workers = [
        worker(0, revision_id=1),
        worker(1, WorkerState.LOADING, revision_id=1),
        worker(2, WorkerState.REQUESTED, revision_id=1),
    ]
    commands = planned(wish(3), workers=workers)
    assert commands == [
        DrainWorker(worker_id=101, reason="a newer revision replaces it"),
        StopWorker(worker_id=102, reason="a newer revision replaces it"),
    ]


def test_an_updated_deployment_is_left_alone() -> None:
    assert planned(wish(2), workers=[worker(0), worker(1)]) == []


def test_surplus_of_an_old_revision_is_ended_once() -> None:
    assert len(planned(wish(0), workers=[worker(0, revision_id=1)])) == 1


# -- Status


def status(
    a_wish: DeploymentWish,
    *,
    workers: list[WorkerFact] | None = None,
    nodes: list[NodeFact] | None = None,
    ended: list[Failure] | None = None,
    copies: dict[int, str] | None = None,
) -> DeploymentStatus:
    return derive(a_wish, facts(workers, nodes, ended), NOW, copies=copies)


@pytest.mark.parametrize(
    ("replicas", "states", "expected"),
    [
        (0, [], DeploymentState.STOPPED),
        (0, [WorkerState.DRAINING], DeploymentState.STOPPED),
        (1, [], DeploymentState.STARTING),
        (1, [WorkerState.REQUESTED], DeploymentState.STARTING),
        (1, [WorkerState.LAUNCHING], DeploymentState.STARTING),
        (1, [WorkerState.LOADING], DeploymentState.STARTING),
        (2, [WorkerState.LOADING, WorkerState.LOADING], DeploymentState.STARTING),
        (1, [READY], DeploymentState.READY),
        (1, [READY, READY], DeploymentState.READY),
        (2, [READY], DeploymentState.DEGRADED),
        (2, [READY, WorkerState.LOADING], DeploymentState.DEGRADED),
        (1, [WorkerState.SUSPECT], DeploymentState.DEGRADED),
        (1, [LOST], DeploymentState.DEGRADED),
    ],
)
def test_the_status_is_derived_from_the_workers(
    replicas: int, states: list[WorkerState], expected: DeploymentState
) -> None:
    workers = [worker(replica, state) for replica, state in enumerate(states)]
    found = status(wish(replicas), workers=workers)
    assert found.state == expected
    assert found.reason.endswith(".")
    assert found.next_action == ""


def test_giving_up_is_failed_with_cause_detail_and_what_to_do() -> None:
    found = status(wish(1), ended=[failure(Cause.MISSING_FILE, detail="config.json is missing.")])
    assert found.state == DeploymentState.FAILED
    assert found.cause == Cause.MISSING_FILE
    assert found.reason == "Gave up: missing file: config.json is missing."
    assert "Put the model's files" in found.next_action


def test_a_crash_loop_says_how_often() -> None:
    found = status(wish(1), ended=failures(CRASH_LOOP, Cause.OUT_OF_MEMORY))
    assert found.state == DeploymentState.FAILED
    assert found.reason == "Gave up after 5 ends in a row: out of memory: It broke."


@pytest.mark.parametrize("cause", [*Cause, "", "something new"])
def test_every_cause_has_something_to_do(cause: str) -> None:
    found = status(wish(1), ended=failures(CRASH_LOOP, cause))
    assert (found.state == DeploymentState.FAILED) == (cause not in (Cause.LOST, Cause.VANISHED))
    assert bool(found.next_action) == (found.state == DeploymentState.FAILED)


def test_one_that_gave_up_beside_one_that_serves_is_degraded_and_needs_a_hand() -> None:
    found = status(wish(2), workers=[worker(1)], ended=[failure(Cause.CHECKSUM)])
    assert found.state == DeploymentState.DEGRADED
    assert found.cause == Cause.CHECKSUM
    assert found.next_action


def test_one_that_gave_up_beside_one_that_starts_is_starting() -> None:
    found = status(wish(2), workers=[worker(1, WorkerState.LOADING)], ended=[failure(Cause.CHECKSUM)])
    assert found.state == DeploymentState.STARTING


def test_a_pause_before_a_restart_is_told() -> None:
    found = status(wish(1), ended=failures(3))
    assert found.reason == "Starts again in 20 s, after crashed: It broke."


def test_a_refused_placement_is_told_node_by_node() -> None:
    found = status(wish(1), nodes=[node(1, cordoned=True), node(2, NodeState.OFFLINE)])
    assert found.state == DeploymentState.STARTING
    assert found.reason == "No node can take a worker: n1 is cordoned; n2 is offline."
    assert found.next_action


def test_how_far_the_models_files_are_is_told() -> None:
    found = status(wish(1), workers=[worker(0, WorkerState.LAUNCHING)], copies={1: "fetching, 40 %"})
    assert found.reason == "d-0 on n1: fetching, 40 %."


def test_a_hold_is_told() -> None:
    nodes = [node(1, NodeState.OFFLINE, 12), node(2, NodeState.OFFLINE, 12)]
    found = status(wish(1), workers=[worker(0, LOST)], nodes=nodes)
    assert found.state == DeploymentState.DEGRADED
    assert "fell silent together" in found.reason
    assert "cordon" in found.next_action


def test_an_update_under_way_is_told() -> None:
    found = status(wish(2), workers=[worker(0), worker(1, revision_id=1)])
    assert found.state == DeploymentState.READY
    assert found.reason == "1 worker(s) still to be updated."


# -- When the next one is started


@pytest.mark.parametrize("count", range(8))
@pytest.mark.parametrize("replicas", [0, 1, 2])
@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("lost", [True, False])
def test_the_next_start_is_when_a_worker_is_created(
    count: int, replicas: int, online: bool, lost: bool
) -> None:
    nodes = [node(state=NodeState.ONLINE if online else NodeState.OFFLINE)]
    workers = [worker(state=LOST, state_changed_at=NOW - seconds(5))] if lost and replicas else []
    known = facts(workers, nodes, failures(count, ago=5))
    at = next_start(wish(replicas), known, NOW)
    if at is None:
        for later in (0, 1000):
            assert created(plan([wish(replicas)], known, NOW + seconds(later))) == []
        return
    assert created(plan([wish(replicas)], known, at))
    if at > NOW:
        assert not created(plan([wish(replicas)], known, at - seconds(0.01)))


def test_where_most_nodes_vanished_only_what_was_never_there_is_started() -> None:
    nodes = [node(number, NodeState.OFFLINE, silent=20) for number in (1, 2)] + [node(3)]
    lost = worker(state=LOST)
    assert next_start(wish(1), facts([lost], nodes), NOW) is None
    assert next_start(wish(2), facts([lost], nodes), NOW) == NOW
