"""What a key may do, rotation, and what happens to open answers when it ends: on a real gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth import get_user_model
from django.utils import timezone
from openai import APIError, AuthenticationError, PermissionDeniedError

from config.front import make_application
from inference.tasks import watch_people
from openai_api.urls import urlpatterns
from registry.actions.api_keys import change_api_key, revoke_api_key, rotate_api_key
from registry.actions.events import publish_change
from registry.actions.projects import save_project, set_role
from registry.models import ApiKey, KeySecret, UsageEvent
from registry.rights import Scope, parse_networks
from registry.threads import in_database
from tests.api.conftest import (
    CAPABILITIES,
    ROUTE,
    Answer,
    Served,
    eventually,
    say,
    serving,
    worker_process,
)
from tests.factories import make_api_key, make_deployment, make_project, make_worker

pytestmark = pytest.mark.django_db(transaction=True)


def refused(answer: Answer, code: str, *, status: int = 403) -> str:
    error = answer.error()
    assert (answer.status, error["type"], error["code"], error["param"]) == (
        status, "invalid_request_error", code, None,
    )  # fmt: skip
    return str(error["message"])


# -- rotation


def test_both_secrets_work_until_the_overlap_is_over(served: Served) -> None:
    api_key = ApiKey.objects.get()
    assert served.chat(say("hi")).status == 200
    new = rotate_api_key(api_key=api_key, by="test", overlap=timedelta(seconds=3))
    assert new.split("-")[1] == served.api_key.split("-")[1], "the public id stays"
    for text in (new, served.api_key, new):
        assert served.chat(say("hi"), key=text).status == 200
    old, fresh = KeySecret.objects.order_by("id")
    eventually(
        lambda: KeySecret.objects.filter(last_used_at__isnull=False).count() == 2,
        "the page can tell which is used",
    )
    assert fresh.last4 == new[-4:]
    eventually(lambda: served.chat(say("hi")).status == 401, "the old one ends", seconds=6)
    old.refresh_from_db()
    assert old.expires_at is not None
    assert old.expires_at <= timezone.now()
    assert served.chat(say("hi"), key=new).status == 200
    revoke_api_key(api_key=api_key, by="test")
    eventually(lambda: served.chat(say("hi"), key=new).status == 401, "revoked", seconds=3)


def test_without_overlap_the_old_secret_ends_within_a_second(served: Served) -> None:
    assert served.chat(say("hi")).status == 200
    new = rotate_api_key(api_key=ApiKey.objects.get(), by="test", overlap=timedelta(0))
    eventually(lambda: served.chat(say("hi")).status == 401, "the old one is refused", seconds=1)
    assert served.request("GET", "/v1/models").status == 401
    assert served.request("GET", "/v1/models", key=new).status == 200


# -- what it may do

ASKED: list[tuple[str, str, str, dict[str, Any] | None]] = [
    ("chat", "POST", "/v1/chat/completions", say("hi")),
    ("completions", "POST", "/v1/completions", {"model": ROUTE, "prompt": "hi"}),
    ("embeddings", "POST", "/v1/embeddings", {"model": ROUTE, "input": "hi"}),
    ("embeddings", "POST", f"/v1/engines/{ROUTE}/embeddings", {"input": "hi"}),
    ("rerank", "POST", "/v1/rerank", {"model": ROUTE, "query": "a", "documents": ["b"]}),
    ("rerank", "POST", "/v2/rerank", {"model": ROUTE, "query": "a", "documents": ["b"]}),
    ("rerank", "POST", "/v1/score", {"model": ROUTE, "text_1": "a", "text_2": "b"}),
    ("rerank", "POST", "/score", {"model": ROUTE, "text_1": "a", "text_2": "b"}),
    ("responses", "POST", "/v1/responses", {"model": ROUTE, "input": "hi"}),
    ("responses", "GET", "/v1/responses/resp_none", None),
    ("responses", "GET", "/v1/responses/resp_none/input_items", None),
    ("responses", "POST", "/v1/responses/resp_none/cancel", {}),
    ("messages", "POST", "/v1/messages", say("hi", max_tokens=5)),
    ("messages", "POST", "/v1/messages/count_tokens", say("hi")),
    ("tokenize", "POST", "/tokenize", {"model": ROUTE, "prompt": "hi"}),
    ("tokenize", "POST", "/v1/tokenize", {"model": ROUTE, "prompt": "hi"}),
    ("tokenize", "POST", "/detokenize", {"model": ROUTE, "tokens": [1]}),
    ("tokenize", "POST", "/v1/detokenize", {"model": ROUTE, "tokens": [1]}),
    ("tokenize", "POST", "/api/v1/token_check", {"prompts": []}),
    ("models", "GET", "/v1/models", None),
    ("models", "GET", f"/v1/models/{ROUTE}", None),
    ("usage", "GET", "/v1/organization/usage/completions?start_time=1", None),
]


def test_a_key_held_to_scopes_may_use_those_endpoints_and_no_other(served: Served) -> None:
    assert {scope for scope, *_ in ASKED} == set(Scope.values), "each scope guards something"
    texts = {scope: make_api_key(name=scope, scopes=[scope])[1] for scope in Scope.values}
    for needed, method, path, body in ASKED:
        sent = json.dumps(body).encode() if body is not None else None
        for scope in (needed, "models" if needed != "models" else "usage"):
            answer = served.request(method, path, sent, key=texts[scope])
            if scope == needed:
                assert answer.status not in (401, 403), (path, answer.body)
                continue
            assert answer.status == 403, (path, answer.body)
            if not path.startswith("/v1/messages"):
                told = refused(answer, "missing_scope")
                assert f"Missing scopes: {needed}." in told
            else:
                assert answer.json()["error"]["type"] == "permission_error"
    # The body is not even read.
    refused(served.chat(b"{not json", key=texts["usage"]), "missing_scope")


def test_every_view_of_the_api_says_which_scope_it_needs() -> None:
    views = [pattern.callback.cls for pattern in urlpatterns]
    assert len(views) >= 3
    for view in views:
        assert view.scope in Scope.values, view


async def test_the_official_client_reads_a_missing_scope(served: Served) -> None:
    _, text = await in_database(make_api_key, name="held", scopes=["models"])
    async with served.client(api_key=text) as client:
        assert [model.id async for model in client.models.list()] == [ROUTE]
        with pytest.raises(PermissionDeniedError) as caught:
            await client.chat.completions.create(**say("hi"))
    assert caught.value.code == "missing_scope"


def test_routes_are_named_with_wildcards_and_bounded_by_the_project(served: Served) -> None:
    for name in ("smol-1", "smol-2", "big"):
        make_deployment(route=name, replicas=0)
        publish_change("route", name)
    project = make_project(name="bounded", routes=["smol*", ROUTE])
    texts = {
        "any": make_api_key(project=project, name="a")[1],
        "wild": make_api_key(project=project, name="b", routes=["*-2", "big"])[1],
        "free": make_api_key(project=make_project(name="free"), name="c", routes=["smol", "org/*"])[1],
    }

    def listed(which: str) -> list[str]:
        data = served.request("GET", "/v1/models", key=texts[which]).json()["data"]
        return [model["id"] for model in data]

    assert listed("any") == [ROUTE, "smol-1", "smol-2"]
    assert listed("wild") == ["smol-2"]
    assert listed("free") == [ROUTE], "a name is no beginning"
    eventually(
        lambda: served.chat(say("hi") | {"model": "big"}).status != 404, "the gateway knows the routes"
    )
    for which, model, status in (
        ("any", "big", 403),
        ("wild", "big", 403),
        ("wild", ROUTE, 403),
        ("any", ROUTE, 200),
    ):
        assert served.chat(say("hi") | {"model": model}, key=texts[which]).status == status, (which, model)
    assert served.request("GET", "/v1/models/big", key=texts["wild"]).status == 404
    # What the project allows is asked of it, not copied: its keys follow within a second.
    project.routes = ["smol-1"]
    save_project(project=project, by="test")
    eventually(lambda: listed("any") == ["smol-1"], "the keys follow", seconds=3)
    eventually(
        lambda: served.chat(say("hi"), key=texts["any"]).status == 403, "the gateway follows", seconds=3
    )
    project.scopes = ["models"]
    save_project(project=project, by="test")
    eventually(
        lambda: served.chat(say("hi"), key=texts["any"]).error()["code"] == "missing_scope",
        "scopes too",
        seconds=3,
    )


# -- where it may be used from


def test_a_key_held_to_addresses_is_refused_from_elsewhere(served: Served) -> None:
    here = make_api_key(name="here", cidrs=["127.0.0.0/8"])[1]
    there = make_api_key(name="there", cidrs=["10.0.0.0/8", "2001:db8::/32"])[1]
    assert served.chat(say("hi"), key=here).status == 200
    assert served.request("GET", "/v1/models", key=here).status == 200
    told = refused(served.chat(say("hi"), key=there), "ip_not_allowed")
    assert "127.0.0.1" in told
    refused(served.request("GET", "/v1/models", key=there), "ip_not_allowed")
    # Nobody is asked to be believed, so nobody is.
    for header in ("X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Client-IP", "CF-Connecting-IP"):
        refused(served.chat(say("hi"), f"{header}: 10.1.1.1", key=there), "ip_not_allowed")
    refused(
        served.request("GET", "/v1/models", None, "X-Forwarded-For: 10.1.1.1", key=there), "ip_not_allowed"
    )
    # Before the body is read.
    refused(served.chat(b"{not json", key=there), "ip_not_allowed")


def test_behind_a_trusted_proxy_its_word_counts_and_no_further(facts: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(settings, "ROUNDHOUSE_TRUSTED_PROXIES", parse_networks(["127.0.0.1", "10.9.0.0/16"]))
    text = make_api_key(name="there", cidrs=["10.1.0.0/16", "2001:db8::/32"])[1]
    with serving(make_application()) as port:
        served = Served(port, facts)
        for sent, status in [
            (["10.1.1.1"], 200),
            (["192.0.2.1"], 403),
            (["10.1.1.1, 192.0.2.1"], 403),  # the client wrote the first itself
            (["192.0.2.1, 10.1.1.1"], 200),
            (["10.1.1.1, 10.9.0.1"], 200),  # two of our proxies
            (["10.1.1.1", "192.0.2.1"], 403),  # in two headers
            (["192.0.2.1", "10.1.1.1"], 200),
            (["10.1.1.1:4711"], 200),
            (["[2001:db8::1]:4711"], 200),
            (["::ffff:10.1.1.1"], 200),
            (["10.1.1.1, unknown"], 403),
            ([""], 403),
            ([], 403),
        ]:
            headers = [f"X-Forwarded-For: {value}" for value in sent]
            for answer in (
                served.chat(say("hi"), *headers, key=text),
                served.request("GET", "/v1/models", None, *headers, key=text),
            ):
                assert answer.status == status, (sent, answer.body)


# -- open answers


@pytest.fixture
def asking() -> Iterator[Callable[..., socket.socket]]:
    """Ask for a long answer; what comes is read from the socket."""
    with contextlib.ExitStack() as sockets:
        yield lambda *args, **kwargs: sockets.enter_context(_ask(*args, **kwargs))


def _ask(served: Served, text: str, *, stream: bool, tokens: int = 3000) -> socket.socket:
    body = json.dumps(say("hi", stream=stream, max_tokens=tokens, ignore_eos=True)).encode()
    connected = socket.create_connection(("127.0.0.1", served.port), timeout=15)
    connected.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {text}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    return connected


def read_to_the_end(connected: socket.socket) -> bytes:
    received = b""
    while not received.endswith(b"0\r\n\r\n") and (part := connected.recv(65536)):
        received += part
    return received


@pytest.fixture
def slow(transactional_db: None) -> Any:
    """A gateway whose worker says ten tokens a second."""
    with worker_process(7002, tokens_per_second=10) as worker:
        deployment = make_deployment(route=ROUTE)
        make_worker(deployment=deployment, id=7002, url=worker.url, capabilities=CAPABILITIES)
        publish_change("route", ROUTE)
        text = make_api_key(name="tests")[1]
        front = make_application()
        with serving(front) as port:
            yield Served(port, text, front), worker


def _end(how: str, api_key: ApiKey) -> None:
    if how == "revoked":
        revoke_api_key(api_key=api_key, by="test")
    elif how == "expired":
        api_key.expires_at = timezone.now() + timedelta(seconds=1)
        change_api_key(api_key=api_key, by="test")
    elif how == "disabled":
        owner = get_user_model().objects.get(pk=api_key.owner_id)
        owner.is_active = False
        owner.save()
    elif how == "disabled with others":
        get_user_model().objects.filter(username__startswith="a").update(is_active=False)
        # Control does so every two seconds.
        time.sleep(2)
        watch_people()
    else:
        get_user_model().objects.get(pk=api_key.owner_id).delete()


@pytest.mark.parametrize("how", ["revoked", "expired", "disabled", "disabled with others", "deleted"])
def test_f56_an_open_stream_ends_with_an_error_when_its_key_does(slow: Any, asking: Any, how: str) -> None:
    served, worker = slow
    project = make_project(name="people")
    ann = get_user_model().objects.create_user("ann")
    set_role(project=project, user=ann, role="member", by="test")
    api_key, text = make_api_key(project=project, name="ann's", owner=ann)
    other = asking(served, served.api_key, stream=True, tokens=30)
    stream = asking(served, text, stream=True)
    whole = asking(served, text, stream=False)
    eventually(lambda: b"data: " in stream.recv(65536), "the stream has begun")
    began = time.monotonic()
    _end(how, api_key)
    told = read_to_the_end(stream)
    assert time.monotonic() - began < 5
    event = json.loads(told.rpartition(b"data: ")[2].split(b"\n\n")[0])
    assert event["error"]["code"] == "invalid_api_key"
    assert "not valid any more" in event["error"]["message"]
    assert b"[DONE]" not in told
    answer = Answer.of(whole.recv(65536), 0.0)
    assert (answer.status, answer.error()["code"]) == (401, "invalid_api_key")
    assert time.monotonic() - began < 5
    # The engine generates no more for it, what it had said is accounted for, and others go on.
    request_id = answer.headers["x-request-id"]
    assert served.event(request_id).status == 401
    cut = eventually(
        lambda: UsageEvent.objects.filter(stream=True, key_name="ann's").first(),
        "the stream is accounted for",
    )
    assert (cut.outcome, cut.status) == ("interrupted", 200)
    assert 0 < cut.completion_tokens < 100
    eventually(lambda: worker.load()["running"] <= 1, "the engine stopped", seconds=3)
    assert served.chat(say("hi"), key=text).status == 401, "nor is anything begun with it"
    assert b"[DONE]" in read_to_the_end(other)
    assert served.front is not None
    eventually(lambda: served.front.gateway.guard.idle, "nothing is left behind")


def test_a_change_that_leaves_the_key_valid_ends_nothing(slow: Any, asking: Any) -> None:
    served, _ = slow
    stream = asking(served, served.api_key, stream=True, tokens=25)
    eventually(lambda: b"data: " in stream.recv(65536), "the stream has begun")
    api_key = ApiKey.objects.get()
    api_key.name = "renamed"
    change_api_key(api_key=api_key, by="test")
    rotate_api_key(api_key=api_key, by="test", overlap=timedelta(0))
    publish_change("api_key", "*")
    assert b"[DONE]" in read_to_the_end(stream)


async def test_the_official_client_gets_the_error_of_a_key_that_ended(slow: Any) -> None:
    served, _ = slow
    async with served.client() as client:
        stream = await client.chat.completions.create(**say("hi", max_tokens=3000), stream=True)
        await anext(aiter(stream))
        api_key = await in_database(ApiKey.objects.get)
        await in_database(revoke_api_key, api_key=api_key, by="test")

        async def read() -> None:
            async for _chunk in stream:
                pass

        with pytest.raises(APIError) as caught:
            await asyncio.wait_for(read(), 5)
        assert "not valid any more" in caught.value.message
        with pytest.raises(AuthenticationError):
            await client.models.list()
