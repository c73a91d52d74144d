"""Facts keep their rules: states, constraints, actions, the change feed."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.utils import timezone

from registry.actions.api_keys import issue_api_key, revoke_api_key
from registry.actions.deployments import (
    delete_deployment,
    deploy,
    retry_deployment,
    save_deployment,
    scale_deployment,
)
from registry.actions.gateways import note_gateway
from registry.actions.nodes import create_join_token, join_node, node_of_secret
from registry.actions.usage import record_usage
from registry.actions.workers import create_worker, move_worker
from registry.errors import InvalidInput, InvalidTransition, JoinRefused, StillInUse
from registry.models import ApiKey, Change, Event, Gateway, UsageEvent, Worker
from registry.querysets import database_now, heard_until
from registry.states import WORKER_LIVE, WORKER_TERMINAL, WORKER_TRANSITIONS, WorkerState
from tests.factories import (
    make_api_key,
    make_deployment,
    make_language_model,
    make_node,
    make_project,
    make_worker,
)

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize("state", WorkerState)
@pytest.mark.parametrize("to", WorkerState)
def test_a_worker_moves_only_along_the_arrows(state, to):
    worker = make_worker(state=state)
    if to in WORKER_TRANSITIONS[state]:
        move_worker(worker=worker, to=to, reason="because", by="test")
        assert worker.state == to
        event = Event.objects.filter(kind="worker", object_id=worker.pk).get()
        assert (event.what, event.reason, event.by) == (to, "because", "test")
    else:
        with pytest.raises(InvalidTransition):
            move_worker(worker=worker, to=to, reason="because", by="test")
        worker.refresh_from_db()
        assert worker.state == state


def test_every_worker_state_has_its_row_in_the_table():
    assert set(WORKER_TRANSITIONS) == set(WorkerState)
    assert all(not WORKER_TRANSITIONS[state] for state in WORKER_TERMINAL)
    assert set(WorkerState) == WORKER_LIVE | WORKER_TERMINAL


def test_a_stale_epoch_moves_nothing():
    worker = make_worker()
    worker.epoch += 1
    with pytest.raises(InvalidTransition):
        move_worker(worker=worker, to=WorkerState.FAILED, reason="late", by="test")


def test_a_replica_has_one_live_worker_and_epochs_that_grow():
    deployment = make_deployment()
    node = make_node()
    first = create_worker(deployment=deployment, replica=0, node=node, by="test")
    with pytest.raises(InvalidTransition):
        create_worker(deployment=deployment, replica=0, node=node, by="test")
    move_worker(worker=first, to=WorkerState.FAILED, reason="gone", by="test")
    second = create_worker(deployment=deployment, replica=0, node=node, by="test")
    assert (first.epoch, second.epoch) == (1, 2)


def test_the_database_itself_refuses_what_must_not_be():
    worker = make_worker()
    UsageEvent.objects.create(**usage("r0"))
    refused = [
        lambda: Worker.objects.filter(pk=worker.pk).update(state="dancing"),
        lambda: make_worker(deployment=worker.deployment, replica=worker.replica, epoch=99),
        lambda: UsageEvent.objects.create(**usage("r1", cached_tokens=5, prompt_tokens=4)),
        lambda: UsageEvent.objects.create(**usage("r2", outcome="vanished")),
        lambda: UsageEvent.objects.create(**usage("r0")),
    ]
    for attempt in refused:
        with pytest.raises(IntegrityError), transaction.atomic():
            attempt()


def test_a_terminal_worker_shows_no_load():
    worker = make_worker(running=3, waiting=2, kv_use=0.5)
    move_worker(worker=worker, to=WorkerState.FAILED, reason="killed", by="test", facts={"cause": "killed"})
    assert (worker.running, worker.waiting, worker.kv_use, worker.cause) == (0, 0, 0, "killed")


def test_what_workers_are_started_from_makes_a_new_revision_and_replicas_do_not():
    deployment = make_deployment()
    assert deployment.revision.number == 1
    deployment.replicas = 3
    save_deployment(deployment=deployment, by="test")
    assert deployment.revision.number == 1
    deployment.arguments = {"token_seconds": 0.1}
    save_deployment(deployment=deployment, by="test")
    assert deployment.revision.number == 2
    assert deployment.revisions.count() == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("slots", 0), ("replicas", 257), ("engine", "abacus"), ("policy", "guess"), ("name", "has space")],
)
def test_a_bad_wish_names_its_field(field, value):
    with pytest.raises(ValidationError) as error:
        make_deployment(**{field: value})
    assert field in error.value.message_dict


def test_deploying_with_a_route_tells_the_gateways():
    deployment = deploy(
        name="chat", language_model=make_language_model(), engine="simulated", route="chat", by="test"
    )
    assert deployment.routes.get().name == "chat"
    kinds = set(Change.objects.values_list("kind", flat=True))
    assert {"deployment", "route"} <= kinds


def test_a_deployment_with_live_workers_is_not_deleted():
    worker = make_worker()
    with pytest.raises(StillInUse, match="scale it to 0"):
        delete_deployment(deployment=worker.deployment, by="test")
    move_worker(worker=worker, to=WorkerState.STOPPED, reason="scaled", by="test")
    delete_deployment(deployment=worker.deployment, by="test")
    assert Event.objects.filter(kind="deployment", what="deleted").exists()


def test_scaling_and_retrying_renew_the_wish():
    deployment = make_deployment()
    before = deployment.wish_changed_at
    scale_deployment(deployment=deployment, replicas=0, by="test")
    deployment.refresh_from_db()
    assert deployment.replicas == 0
    retry_deployment(deployment=deployment, by="test")
    deployment.refresh_from_db()
    assert deployment.wish_changed_at > before


def test_a_key_is_kept_as_a_digest_only():
    api_key, text = make_api_key()
    stored = " ".join(str(value) for value in ApiKey.objects.values_list().get(pk=api_key.pk))
    assert text not in stored
    assert text.split("-")[2] not in stored


def test_revoking_is_for_good_and_told_once():
    api_key, _ = make_api_key()
    assert api_key.usable(timezone.now())
    revoke_api_key(api_key=api_key, by="test")
    revoke_api_key(api_key=api_key, by="test")
    assert not api_key.usable(timezone.now())
    assert not ApiKey.objects.usable(timezone.now()).exists()
    assert Event.objects.filter(kind="apikey", what="revoked").count() == 1
    assert Change.objects.filter(kind="api_key", key=api_key.public_id).count() == 2


def test_an_expired_key_is_not_usable():
    api_key, _ = issue_api_key(
        name="old", project=make_project(), by="test", expires_at=timezone.now() - timedelta(seconds=1)
    )
    assert not api_key.usable(timezone.now())


def test_a_join_token_works_as_often_as_it_says():
    token = create_join_token(by="test", uses=1)
    node, secret = join_node(token=token, name="gpu-1", address="10.0.0.5")
    assert node_of_secret(node.pk, secret) == node
    assert node_of_secret(node.pk, secret + "x") is None
    with pytest.raises(JoinRefused):
        join_node(token=token, name="gpu-2", address="10.0.0.6")


def test_an_expired_join_token_is_refused():
    token = create_join_token(by="test", lifetime=timedelta(seconds=-1))
    with pytest.raises(JoinRefused):
        join_node(token=token, name="gpu-1", address="10.0.0.5")


@pytest.mark.parametrize(("name", "address"), [("a b", "10.0.0.5"), ("", "10.0.0.5"), ("gpu", "example.org")])
def test_a_bad_join_costs_no_use_of_the_token(name, address):
    token = create_join_token(by="test", uses=1)
    with pytest.raises(InvalidInput):
        join_node(token=token, name=name, address=address)
    join_node(token=token, name="gpu-1", address="10.0.0.5")


def test_joining_again_ends_the_old_secret():
    token = create_join_token(by="test", uses=2)
    node, old = join_node(token=token, name="gpu-1", address="10.0.0.5")
    same, new = join_node(token=token, name="gpu-1", address="10.0.0.6")
    assert same.pk == node.pk
    assert node_of_secret(node.pk, old) is None
    assert node_of_secret(node.pk, new) is not None


def usage(request_id, **facts):
    return {
        "request_id": request_id,
        "started_at": timezone.now(),
        "project_id": 1,
        "project_name": "p",
        "key_public_id": "k",
        "key_name": "k",
        "route": "r",
        "endpoint": "/v1/chat/completions",
        "status": 200,
        "outcome": "ok",
        "gateway": "g",
    } | facts


def test_a_batch_of_usage_brought_twice_counts_once():
    def batch():
        return [UsageEvent(**usage(f"req-{n}", completion_tokens=n)) for n in range(5)]

    record_usage(batch())
    record_usage([*batch(), UsageEvent(**usage("req-new"))])
    assert UsageEvent.objects.count() == 6
    assert UsageEvent.objects.get(request_id="req-3").completion_tokens == 3


def test_an_event_that_breaks_a_rule_is_not_swallowed():
    with pytest.raises(IntegrityError), transaction.atomic():
        record_usage([UsageEvent(**usage("bad", prompt_tokens=1, cached_tokens=2))])


def test_silence_counts_only_while_a_gateway_was_there_to_hear_it():
    now = database_now()
    assert not heard_until(now, for_seconds=15)
    note_gateway(name="g", unbroken=False)
    assert not heard_until(database_now(), for_seconds=15)
    Gateway.objects.update(listening_since=now - timedelta(seconds=20))
    note_gateway(name="g", unbroken=True)
    assert heard_until(database_now(), for_seconds=15)
    note_gateway(name="g", unbroken=False)
    assert not heard_until(database_now(), for_seconds=15)
    assert not heard_until(now + timedelta(seconds=60), for_seconds=15)
