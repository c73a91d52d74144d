"""S25: a model that a key may not use is not reached by another name, another endpoint, or the chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from django.contrib.auth import get_user_model

from openai_api.endpoints import ENDPOINTS
from registry.actions.events import publish_change
from registry.models import Deployment, Route, RouteTarget, UsageEvent
from tests.api.conftest import ROUTE, Answer, Served, Worker, eventually, facts, say, served, worker  # noqa: F401
from tests.factories import make_api_key, make_worker
from tests.integration.test_chat_socket import page_of
from webchat.actions import create_conversation

pytestmark = pytest.mark.django_db(transaction=True)

SECRET = "org/secret"
"""Leads to the same deployment as ROUTE: what differs is only who may use the name."""
NAMES = [
    SECRET, "ORG/SECRET", "Org/Secret", " org/secret", "org/secret ", "org/secret\n",
    "org/secret\u0000", "/org/secret", "./org/secret", "org//secret", "org/./secret", "org/x/../secret",
    "org\\secret", "org%2Fsecret", "org%2fsecret", "\uff4frg/secret", "org/\u0455ecret", "org\u2044secret",
    "org/secret\u200b", "org/se\u00adcret", "org/secret:latest", "org/secret@main", "openai/org/secret",
    "secret", "org/secret,org/sim", "org/sim,org/secret", "*", "", "org/*", "org/sim/../secret",
    "org/sim\u0000org/secret", "default", "deployment-1",
]  # fmt: skip
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    **dict.fromkeys(("prompt", "input", "query", "text_1"), "hi"),
    **{"documents": [{"text": "hi"}], "text_2": ["hi"], "max_tokens": 2, "tokens": [1]},
}


@pytest.fixture
def dispatched(served: Served, worker: Worker) -> Iterator[list[str]]:  # noqa: F811
    """Two routes to one deployment, a key for one of them; afterwards nothing was dispatched or counted."""
    deployment = Deployment.objects.get()
    make_worker(
        deployment=deployment, id=7002, url=worker.url, capabilities=[e.capability for e in ENDPOINTS]
    )
    RouteTarget.objects.create(route=Route.objects.create(name=SECRET), deployment=deployment)
    publish_change("route", SECRET)
    publish_change("deployment", deployment.name)
    assert served.front is not None
    fleet = served.front.gateway.fleet
    eventually(lambda: (route := fleet.route(SECRET)) and route.targets[0][0].workers, "the fleet knows it")
    chosen: list[str] = []
    acquire = served.front.gateway.dispatcher.acquire

    async def counted(route: Any, **options: Any) -> Any:
        chosen.append(route.name)
        return await acquire(route, **options)

    served.front.gateway.dispatcher.acquire = counted  # type: ignore[method-assign]
    before = worker.load()["steps"]
    yield chosen
    assert chosen == []
    assert worker.load()["steps"] == before
    assert not UsageEvent.objects.exists()


def ask(served: Served, key: str, path: str, model: Any, **more: Any) -> Answer:  # noqa: F811
    body = BODY | {"model": model} | more
    if not path.endswith(("completions", "responses", "messages")):
        body.pop("stream", None)
    if "tokenize" in path:
        body.pop("messages")
    if path.endswith("responses"):
        body.pop("prompt")
    if path.endswith("score"):
        body.pop("documents")
    return served.request("POST", path, json.dumps(body).encode(), key=key)


def refused(answer: Answer, what: object) -> None:
    assert answer.status in (400, 403, 404), (what, answer.status, answer.body[:300])


def test_no_endpoint_and_no_spelling_reaches_it(served: Served, dispatched: list[str]) -> None:  # noqa: F811
    _, key = make_api_key(name="held", routes=[ROUTE])
    for endpoint in ENDPOINTS:
        for stream in (False, True):
            answer = ask(served, key, endpoint.path, SECRET, stream=stream)
            assert answer.status == 403, (endpoint.path, answer.body)
            told = answer.json()["error"]
            assert told.get("code", "model_not_found") == "model_not_found"
    for name in NAMES:
        for endpoint in ENDPOINTS[:7]:
            refused(ask(served, key, endpoint.path, name), (endpoint.path, name))
    for odd in ([SECRET], {"name": SECRET}, [ROUTE, SECRET], 7, None, True):
        refused(ask(served, key, "/v1/chat/completions", odd), odd)


def test_no_address_reaches_it(served: Served, dispatched: list[str]) -> None:  # noqa: F811
    _, key = make_api_key(name="held", routes=[ROUTE])
    for name in NAMES:
        if not name or "\n" in name:
            continue
        written = quote(name, safe="")
        for path in {written, quote(name), written.replace("%", "%25")}:
            # The URL's model counts, whatever the body says.
            refused(ask(served, key, f"/v1/engines/{path}/embeddings", ROUTE), path)
            refused(served.request("GET", f"/v1/models/{path}", key=key), path)
    checks = {"prompts": [{"model": SECRET, "prompt": "x", "max_tokens": 1}]}
    assert served.request("POST", "/api/v1/token_check", json.dumps(checks).encode(), key=key).status == 403
    listed = served.request("GET", "/v1/models", key=key).json()["data"]
    assert [model["id"] for model in listed] == [ROUTE]


def test_the_last_of_two_models_counts_for_both(served: Served, dispatched: list[str]) -> None:  # noqa: F811
    _, key = make_api_key(name="held", routes=[ROUTE])
    first = json.dumps({"model": ROUTE})[:-1]
    for second in (json.dumps({"model": SECRET})[1:-1], '"mod\\u0065l": "org/secret"'):
        body = f"{first}, {second}, {json.dumps(BODY)[1:]}".encode()
        refused(served.chat(body, key=key), second)
    for place in ("deployment", "route", "worker", "model_id", "engine", "models", "fallbacks", "model_name"):
        refused(ask(served, key, "/v1/chat/completions", SECRET, **{place: ROUTE}), place)
    refused(
        served.request("POST", f"/v1/chat/completions?model={ROUTE}", b'{"messages": []}', key=key), "query"
    )


def test_an_earlier_response_of_it_is_no_way_to_it(served: Served) -> None:  # noqa: F811
    RouteTarget.objects.create(route=Route.objects.create(name=SECRET), deployment=Deployment.objects.get())
    publish_change("route", SECRET)
    assert served.front is not None
    eventually(lambda: served.front and served.front.gateway.fleet.route(SECRET), "the fleet knows it")
    made = served.request("POST", "/v1/responses", json.dumps({"model": SECRET, "input": "hi"}).encode())
    assert made.status == 200, made.body
    eventually(lambda: UsageEvent.objects.count() == 1, "it is counted")
    _, key = make_api_key(name="held", routes=[ROUTE])
    follow = {"input": "more", "previous_response_id": made.json()["id"]}
    for body in (follow, follow | {"model": SECRET}):
        refused(served.request("POST", "/v1/responses", json.dumps(body).encode(), key=key), body)
    assert UsageEvent.objects.count() == 1


def test_a_route_that_is_taken_away_is_gone_from_the_chat(served: Served, dispatched: list[str]) -> None:  # noqa: F811
    Route.objects.filter(name=SECRET).update(enabled=False)
    publish_change("route", SECRET)
    assert served.front is not None
    eventually(lambda: served.front and served.front.gateway.fleet.route(SECRET) is None, "the fleet heard")
    ann = get_user_model().objects.create_user("ann")
    conversation = create_conversation(user=ann, model=SECRET)
    with page_of(ann, served.port) as page:
        assert [one["name"] for one in page.client.get("/chat/api/models").json()["models"]] == [ROUTE]
        for name in (None, *NAMES):
            fields = {} if name is None else {"model": name}
            page.say(type="send", conversation=str(conversation.pk), content="hi", parent=None, **fields)
            heard = page.hear()
            if heard["type"] == "sent":
                [end] = page.hear_all(heard["assistant"]["id"])
                assert end["state"] == "failed"
            else:
                assert heard["type"] == "error"
