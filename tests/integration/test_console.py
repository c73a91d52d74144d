"""Operating from the admin: the effect is shown first, then done; live cells and the first page follow."""

from __future__ import annotations

import html
import re
from functools import partial
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.contrib.staticfiles import finders
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from inference.admin.badges import LOOKS
from inference.beats import BeatBook, write_beats
from inference.dispatch.fleet import Fleet
from inference.protocol import Beat, Load, WorkerPhase
from inference.reconcile import reconcile
from inference.status import DeploymentState
from registry.actions.deployments import scale_deployment
from registry.models import Change, Deployment, Event, Node, UsageEvent, Worker
from registry.querysets import database_now
from registry.states import CopyState, NodeState, Outcome, WorkerState
from tests.factories import make_deployment, make_node, make_worker

pytestmark = pytest.mark.django_db

HOST = {"host": "localhost:8000"}


@pytest.fixture
def operator() -> Client:
    client = Client(headers=HOST, enforce_csrf_checks=False)
    client.force_login(get_user_model().objects.create_superuser("olga", password="x"))
    return client


def staff(*permissions: str) -> Client:
    """Somebody who may enter the admin, and do just this."""
    user = get_user_model().objects.create_user("sam", password="x", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    client = Client(headers=HOST)
    client.force_login(user)
    return client


def one_of(model: type, worker: Worker) -> Any:
    """The worker, or what it belongs to."""
    found: dict[type, Any] = {Deployment: worker.deployment, Worker: worker, Node: worker.node}
    return found[model]


def operate(model: type, name: str) -> str:
    return reverse(f"admin:registry_{model.__name__.lower()}_operate", args=[name])


def effect(client: Client, model: type, name: str, *objs: Any, **fields: Any) -> str:
    """The sentences of the page that comes first."""
    answer = client.get(operate(model, name), {"id": [obj.pk for obj in objs], **fields})
    assert answer.status_code == 200
    return " ".join(told for _, told in answer.context["effects"])


def confirm(client: Client, model: type, name: str, *objs: Any, **fields: Any) -> list[str]:
    """Press the button of that page; returns what is said then."""
    form = {"id": [obj.pk for obj in objs], "confirmed": "yes", **fields}
    answer = client.post(operate(model, name), form, follow=True)
    assert answer.status_code == 200
    return [str(message) for message in answer.context["messages"]]


def settle() -> None:
    """Let reconcile work, and workers do as they are told, until nothing changes."""
    for _ in range(20):
        done = reconcile(lambda names: None)
        moved = Worker.objects.filter(state=WorkerState.DRAINING).update(
            state=WorkerState.STOPPED, state_changed_at=database_now()
        )
        moved += Worker.objects.filter(state=WorkerState.REQUESTED).update(
            state=WorkerState.READY, state_changed_at=database_now(), ready_at=database_now()
        )
        if not done and not moved:
            return
    raise AssertionError("it never settles")


def running(replicas: int, **wish: Any) -> Deployment:
    make_node()
    deployment = make_deployment(replicas=replicas, **wish)
    settle()
    assert deployment.workers.live().count() == replicas
    return deployment


# -- Deployments


def test_stop_shows_the_requests_in_flight_and_drains_after_the_confirmation(operator: Client) -> None:
    deployment = running(2, route="chat", drain_seconds=45)
    deployment.workers.update(running=3)
    told = effect(operator, Deployment, "stop", deployment)
    assert "2 worker(s)" in told
    assert "6 request(s) in flight" in told
    assert "within 45 s" in told
    assert "Clients of chat get status 503" in told
    deployment.refresh_from_db()
    assert deployment.replicas == 2, "looking changes nothing"
    assert confirm(operator, Deployment, "stop", deployment) == [
        f"{deployment}: workers finish their requests and end."
    ]
    reconcile(lambda names: None)
    assert {worker.state for worker in deployment.workers.all()} == {WorkerState.DRAINING}
    assert Event.objects.filter(kind="deployment", what="scaled", by="olga").exists()
    assert Change.objects.filter(kind="deployment", key=str(deployment.pk)).count() >= 2


def test_start_goes_back_to_the_last_number_of_replicas(operator: Client) -> None:
    deployment = running(3)
    confirm(operator, Deployment, "stop", deployment)
    settle()
    assert deployment.workers.live().count() == 0
    told = effect(operator, Deployment, "start", Deployment.objects.get())
    assert "3 more worker(s) are started" in told
    assert f"goes to {Node.objects.get()}" in told
    confirm(operator, Deployment, "start", deployment)
    settle()
    assert deployment.workers.live().count() == 3
    assert "started already" in effect(operator, Deployment, "start", Deployment.objects.get())


def test_the_effect_tells_when_no_node_can_take_a_worker(operator: Client) -> None:
    deployment = running(1)
    Node.objects.update(cordoned=True)
    told = effect(operator, Deployment, "scale", deployment, number=2)
    assert "No node can take one now" in told
    assert "is cordoned" in told


def test_scale_asks_for_the_number_before_it_shows_what_that_means(operator: Client) -> None:
    deployment = running(3)
    asked = operator.get(operate(Deployment, "scale"), {"id": deployment.pk})
    assert asked.context["effects"] == []
    assert "How many replicas?" in asked.content.decode()
    told = effect(operator, Deployment, "scale", deployment, number=1)
    assert f"2 worker(s) ({deployment}-1, {deployment}-2)" in told
    assert "1 replica(s) stay" in told
    confirm(operator, Deployment, "scale", deployment, number=1)
    settle()
    assert [worker.replica for worker in deployment.workers.live()] == [0]


@pytest.mark.parametrize("number", ["-1", "257", "many", "1e3", "9" * 400])
def test_a_number_of_replicas_that_cannot_be_is_refused_in_words(operator: Client, number: str) -> None:
    deployment = make_deployment(replicas=1)
    form = {"id": deployment.pk, "number": number, "confirmed": "yes"}
    answer = operator.post(operate(Deployment, "scale"), form)
    assert answer.status_code == 200
    assert "whole number from 0 to 256" in answer.content.decode()
    deployment.refresh_from_db()
    assert deployment.replicas == 1


def test_restart_replaces_one_worker_after_the_other(operator: Client) -> None:
    deployment = running(2)
    before = set(deployment.workers.values_list("pk", flat=True))
    told = effect(operator, Deployment, "restart", deployment)
    assert "replaced one by one" in told
    confirm(operator, Deployment, "restart", deployment)
    deployment.refresh_from_db()
    assert deployment.revision is not None
    assert deployment.revision.number == 2
    reconcile(lambda names: None)
    states = [worker.state for worker in deployment.workers.live().order_by("replica")]
    assert states == [WorkerState.READY, WorkerState.DRAINING], "one serves while the other ends"
    settle()
    after = deployment.workers.live()
    assert after.count() == 2
    assert not before & set(after.values_list("pk", flat=True))
    first, second = deployment.revisions.order_by("number")
    alike = ("language_model_id", "source", "engine", "arguments", "environment", "slots", "chat_template")
    assert [getattr(first, name) for name in alike] == [getattr(second, name) for name in alike]


def test_restart_warns_of_the_gap_when_there_is_only_one(operator: Client) -> None:
    deployment = running(1)
    assert "the only one" in effect(operator, Deployment, "restart", deployment)
    assert "nothing runs" in effect(operator, Deployment, "restart", make_deployment(replicas=0))


def test_several_are_operated_at_once_from_the_list(operator: Client) -> None:
    deployments = [running(1) for _ in range(3)]
    form = {"action": "stop", "_selected_action": [one.pk for one in deployments[:2]]}
    answer = operator.post(reverse("admin:registry_deployment_changelist"), form)
    assert answer.status_code == 302
    url = answer.headers["location"]
    assert urlsplit(url).path == operate(Deployment, "stop")
    assert sorted(parse_qs(urlsplit(url).query)["id"]) == sorted(str(one.pk) for one in deployments[:2])
    page = operator.get(url).content.decode()
    assert str(deployments[0]) in page
    assert str(deployments[1]) in page
    assert not Deployment.objects.filter(replicas=0).exists()
    confirm(operator, Deployment, "stop", *deployments[:2])
    assert set(Deployment.objects.filter(replicas=0)) == set(deployments[:2])


# -- Workers and nodes


def test_a_worker_is_drained_and_another_takes_its_place(operator: Client) -> None:
    deployment = running(2)
    worker = deployment.workers.live().get(replica=1)
    assert "1 other worker(s)" in effect(operator, Worker, "replace", worker)
    confirm(operator, Worker, "replace", worker)
    worker.refresh_from_db()
    assert worker.state == WorkerState.DRAINING
    assert Event.objects.filter(kind="worker", object_id=worker.pk, what="draining", by="olga").exists()
    settle()
    assert deployment.workers.live().get(replica=1).epoch == 2
    assert "has ended" in effect(operator, Worker, "replace", Worker.objects.get(pk=worker.pk))
    [told] = confirm(operator, Worker, "replace", worker)
    assert "cannot become draining" in told


def test_a_worker_that_was_not_taken_up_ends_at_once(operator: Client) -> None:
    worker = make_worker(state=WorkerState.REQUESTED)
    confirm(operator, Worker, "replace", worker)
    worker.refresh_from_db()
    assert (worker.state, worker.cause) == (WorkerState.STOPPED, "stopped")


def test_a_node_is_cordoned_and_uncordoned(operator: Client) -> None:
    worker = make_worker()
    node = worker.node
    assert "1 live worker(s) go on" in effect(operator, Node, "cordon", node)
    confirm(operator, Node, "cordon", node)
    node.refresh_from_db()
    assert node.cordoned
    assert "Nothing changes" in effect(operator, Node, "cordon", node)
    confirm(operator, Node, "cordon", node)
    confirm(operator, Node, "uncordon", node)
    node.refresh_from_db()
    assert not node.cordoned
    events = Event.objects.filter(kind="node", object_id=node.pk).order_by("id")
    assert [event.what for event in events] == ["cordoned", "uncordoned"]


# -- Who may

OPERATIONS = [
    (Deployment, "start"),
    (Deployment, "stop"),
    (Deployment, "scale"),
    (Deployment, "restart"),
    (Worker, "replace"),
    (Node, "cordon"),
    (Node, "uncordon"),
]


def facts() -> list[Any]:
    return [
        list(model.objects.order_by("pk").values())
        for model in (Deployment, Worker, Node, Event, Change)
    ]  # fmt: skip


@pytest.mark.parametrize(("model", "name"), OPERATIONS)
def test_nobody_operates_without_the_right_to(model: type, name: str) -> None:
    worker = make_worker()
    obj = one_of(model, worker)
    form = {"id": obj.pk, "number": 5, "confirmed": "yes"}
    before = facts()
    for method in ("get", "post"):
        answer = getattr(Client(headers=HOST), method)(operate(model, name), form)
        assert answer.status_code == 302
        assert "/admin/login/" in answer.headers["location"]
    plain = Client(headers=HOST)
    plain.force_login(get_user_model().objects.create_user("paul", password="x"))
    assert plain.post(operate(model, name), form).status_code == 302
    viewer = staff("view_deployment", "view_worker", "view_node")
    for method in ("get", "post"):
        assert getattr(viewer, method)(operate(model, name), form).status_code == 403
    listing = viewer.get(reverse(f"admin:registry_{model.__name__.lower()}_changelist"))
    assert f'value="{name}"' not in listing.content.decode()
    assert facts() == before


@pytest.mark.parametrize(("model", "name"), OPERATIONS)
def test_a_foreign_page_cannot_operate_in_an_operators_name(model: type, name: str) -> None:
    worker = make_worker()
    obj = one_of(model, worker)
    victim = Client(headers=HOST, enforce_csrf_checks=True)
    victim.force_login(get_user_model().objects.create_superuser("olga", password="x"))
    form = {"id": obj.pk, "number": 5, "confirmed": "yes"}
    before = facts()
    assert victim.post(operate(model, name), form).status_code == 403
    for origin in ("https://evil.example", "null"):
        assert victim.post(operate(model, name), form, headers={"origin": origin}).status_code == 403
    assert victim.get(operate(model, name), form).status_code == 200
    assert facts() == before


def test_an_unknown_operation_or_object_is_told(operator: Client) -> None:
    assert operator.get(operate(Deployment, "explode"), {"id": 1}).status_code == 404
    for given in ({}, {"id": "x"}, {"id": "999"}):
        answer = operator.get(operate(Deployment, "stop"), given, follow=True)
        assert "none of these deployments exists" in next(str(one) for one in answer.context["messages"])


# -- Live pages


def test_every_state_has_a_colour_and_an_icon() -> None:
    for states in (WorkerState, NodeState, CopyState, DeploymentState):
        assert {str(state.value) for state in states} <= set(LOOKS)


def poll(client: Client, page: str) -> tuple[int, str, str]:
    """Ask as the page's poller does; returns status, answer and the next address to ask."""
    url = html.unescape(re.search(r'id="live-poll" hx-get="([^"]+)"', page)[1])  # type: ignore[index]
    answer = client.get(url)
    return answer.status_code, answer.content.decode(), url


@pytest.mark.parametrize("model", [Worker, Deployment, Node])
def test_a_page_asks_only_for_what_changed(operator: Client, model: type) -> None:
    worker = make_worker()
    obj = one_of(model, worker)
    name = f"admin:registry_{model.__name__.lower()}"
    for url in (reverse(f"{name}_changelist"), reverse(f"{name}_change", args=[obj.pk])):
        page = operator.get(url).content.decode()
        ids = set(re.findall(r'id="(live-[^"]+)"', page))
        status, first, _ = poll(operator, page)
        assert status == 200
        assert set(re.findall(r'id="(live-[^"]+)"', first)) <= ids, "every cell that comes has a place"
        assert poll(operator, first)[0] == 204
        Worker.objects.update(running=7)
        Node.objects.update(memory_free_bytes=7 * 10**9)
        Deployment.objects.update(replicas=9)
        status, changed, _ = poll(operator, first)
        assert status == 200
        assert 2 <= changed.count("hx-swap-oob") < first.count("hx-swap-oob")
        Worker.objects.update(running=0)
        Node.objects.update(memory_free_bytes=0)
        Deployment.objects.update(replicas=1)


def test_live_cells_are_for_staff_who_may_view_them() -> None:
    worker = make_worker()
    url = reverse("admin:registry_worker_live", args=["list"])
    assert Client(headers=HOST).get(url, {"id": worker.pk}).status_code == 403
    assert staff("view_node").get(url, {"id": worker.pk}).status_code == 403
    assert Client(headers=HOST).get(reverse("console-dashboard")).status_code == 403


@pytest.mark.parametrize("query", ["", "id=x", "id=1&was=zzz", "was=1.2.3", "id=99999999999999999999"])
def test_a_poll_that_asks_for_nonsense_is_no_fault_of_ours(operator: Client, query: str) -> None:
    make_worker()
    for page in ("list", "form", "other"):
        url = reverse("admin:registry_worker_live", args=[page])
        assert operator.get(f"{url}?{query}").status_code in (200, 404)


def test_a_loading_worker_shows_how_far_it_is(operator: Client) -> None:
    worker = make_worker(
        state=WorkerState.LOADING, progress_step="reading weights", progress_done=43, progress_total=100
    )
    page = operator.get(reverse("admin:registry_worker_change", args=[worker.pk])).content.decode()
    assert '<progress value="43" max="100"></progress> reading weights' in page
    assert "43 %" in page
    of_deployment = reverse("admin:registry_deployment_change", args=[worker.deployment.pk])
    assert "43 %" in operator.get(of_deployment).content.decode()


def test_what_workers_say_cannot_smuggle_markup_into_live_cells(operator: Client) -> None:
    bad = "<script>alert(1)</script>"
    facts: dict[str, Any] = {"state_reason": bad, "progress_step": bad, "progress_unit": "<b>"}
    worker = make_worker(log_tail=bad, state=WorkerState.LOADING, **facts)
    page = operator.get(reverse("admin:registry_worker_change", args=[worker.pk])).content.decode()
    answer = poll(operator, page)[1]
    dashboard = operator.get(reverse("console-dashboard")).content.decode()
    for text in (page, answer, dashboard):
        assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in answer


def test_log_lines_of_a_live_worker_arrive_and_stay() -> None:
    worker = make_worker()
    fleet = Fleet()
    book = BeatBook(fleet, name="test")
    beat = partial(Beat, worker_id=worker.pk, epoch=worker.epoch, phase=WorkerPhase.READY)
    book.hear(beat(log_tail=["one", "two"]))
    book.hear(beat(load=Load(running=3)))
    write_beats(book._take(), {})
    worker.refresh_from_db()
    assert (worker.log_tail, worker.running) == ("one\ntwo", 3), "a beat without lines takes none away"
    book.hear(beat())
    write_beats(book._take(), {})
    worker.refresh_from_db()
    assert (worker.log_tail, worker.running) == ("one\ntwo", 0)


def test_the_library_that_live_pages_load_is_there(operator: Client) -> None:
    make_worker()
    for url in (reverse("admin:index"), reverse("admin:registry_worker_changelist")):
        page = operator.get(url).content.decode()
        [path] = re.findall(r'src="/static/(vendor/htmx[^"]+)"', page)
        assert finders.find(path), "the version in console/htmx.html is the one that is vendored"
        assert '"allowEval": false' in page


# -- The first page


def test_the_first_page_is_silent_when_all_is_well(operator: Client) -> None:
    running(1)
    page = operator.get(reverse("admin:index")).content.decode()
    assert "Needs attention" not in page
    assert "1 of 1" in page
    assert "1 ready" in page


def test_the_first_page_names_what_needs_attention_and_what_to_do(operator: Client) -> None:
    deployment = running(1)
    Worker.objects.update(
        state=WorkerState.FAILED, cause="missing_file", state_reason="The model's folder is gone."
    )
    Worker.objects.update(state_changed_at=database_now())
    make_node(name="silent", state=NodeState.OFFLINE)
    page = html.unescape(operator.get(reverse("admin:index")).content.decode())
    assert "Needs attention" in page
    assert f">{deployment}</a>: Gave up: missing file: The model's folder is gone." in page
    assert "Put the model's files where its source says" in page
    assert ">silent</a>" in page
    scale_deployment(deployment=deployment, replicas=0, by="test")
    Node.objects.update(cordoned=True)
    assert "Needs attention" not in operator.get(reverse("admin:index")).content.decode()


def test_the_first_page_counts_the_requests_of_the_last_minutes(operator: Client) -> None:
    for number, outcome in enumerate([Outcome.OK, Outcome.OK, Outcome.FAILED, Outcome.ABORTED]):
        UsageEvent.objects.create(
            request_id=f"req_{number}", started_at=database_now(), project_id=1, project_name="default",
            key_public_id="abc", key_name="test", route="chat", endpoint="/v1/chat/completions", status=200,
            outcome=outcome, gateway="g", prompt_tokens=10, completion_tokens=5,
        )  # fmt: skip
    page = operator.get(reverse("console-dashboard")).content.decode()
    assert re.search(r">4</a></p>\s*<p class=\"rh-quiet\">1 failed, 40 tokens in, 20 out", page)


def test_the_first_page_shows_nobody_what_they_may_not_view() -> None:
    running(1)
    page = staff("view_apikey").get(reverse("admin:index")).content.decode()
    assert "Deployments</h3>" not in page
    assert "last 5 minutes" not in page


def test_the_first_page_costs_no_more_queries_for_more_deployments(operator: Client) -> None:
    def count() -> int:
        with CaptureQueriesContext(connection) as queries:
            operator.get(reverse("console-dashboard"))
        return len(queries)

    running(1)
    few = count()
    for _ in range(5):
        running(2)
    assert count() <= few
