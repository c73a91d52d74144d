"""Every situation in which a client is refused, and exactly what it is told, as it comes from the socket:
status, type, code, param, headers."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from django.conf import settings

from config.front import make_application
from openai_api import limits
from openai_api.auth import KeyRing
from registry.actions.api_keys import revoke_api_key
from registry.actions.events import publish_change
from registry.models import ApiKey, Deployment, UsageEvent
from registry.models import Worker as WorkerRow
from tests.api.conftest import ROUTE, WORKER_ID, Answer, Served, eventually, say, serving, worker_process
from tests.factories import make_api_key, make_deployment

pytestmark = pytest.mark.django_db(transaction=True)

CHAT = "/v1/chat/completions"
INVALID = "invalid_request_error"
OVERLOADED = "service_unavailable_error"


def told(
    answer: Answer, status: int, kind: str, code: str | None, param: str | None = None, says: str = ""
) -> dict[str, Any]:
    """Checks all that an error is made of; returns it."""
    error = answer.error()
    seen = (answer.status, error["type"], error["code"], error["param"])
    assert seen == (status, kind, code, param), (seen, error["message"])
    if says:
        assert re.fullmatch(says, error["message"]), error["message"]
    assert re.fullmatch(r"req_[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.headers["openai-processing-ms"].isdigit()
    assert answer.headers["openai-version"] == "2020-10-01"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert ("retry-after" in answer.headers) is (status in (429, 503))
    assert ("www-authenticate" in answer.headers) is (status == 401)
    assert status != 405 or "allow" in answer.headers
    # A client's own idea of what to try again is right everywhere so far.
    assert "x-should-retry" not in answer.headers
    return error


def without(name: str) -> dict[str, Any]:
    body = say("hi")
    del body[name]
    return body


# -- the key


def test_no_key(served: Served) -> None:
    answer = served.chat(say("hi"), key=None)
    told(answer, 401, INVALID, None, says=r"You didn't provide an API key\. .*Bearer YOUR_KEY\)\.")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_wrong_key_is_masked(served: Served) -> None:
    key = served.api_key[:-2] + "zz"
    error = told(
        served.chat(say("hi"), key=key),
        401,
        INVALID,
        "invalid_api_key",
        says=r"Incorrect API key provided: \S{3,12}\*+\S{1,4}\.",
    )
    assert key not in error["message"]
    assert key[12:-4] not in error["message"]


def test_a_revoked_key_is_told_like_one_that_never_was(served: Served) -> None:
    revoke_api_key(api_key=ApiKey.objects.get(), by="test")
    answer = eventually(
        lambda: (got := served.chat(say("hi"))).status == 401 and got, "the key is refused", seconds=3
    )
    told(answer, 401, INVALID, "invalid_api_key", says=r"Incorrect API key provided: .*\.")


def test_a_wrong_key_in_another_header_is_a_wrong_key(served: Served) -> None:
    for header in ("x-api-key", "api-key"):
        told(served.chat(say("hi"), f"{header}: sk-wrong", key=None), 401, INVALID, "invalid_api_key")


# -- the body

NOT_JSON = r"We could not parse the JSON body of your request\. .*"


BODIES: list[tuple[Any, str | None, str | None, str]] = [
    (b"{", None, None, NOT_JSON),
    (b'{"model":"\xff"}', None, None, NOT_JSON),
    (b'{"temperature":NaN}', None, None, NOT_JSON),
    (b"[1]", "invalid_type", None, r"Invalid type for the body: expected an object, but got an array .*"),
    (b'"x"', "invalid_type", None, r"Invalid type for the body: .*"),
    (
        without("messages"),
        "missing_required_parameter",
        "messages",
        r"Missing required parameter: 'messages'\.",
    ),
    (without("model"), "missing_required_parameter", "model", r"Missing required parameter: 'model'\."),
    (
        say("hi", temperature="hot"),
        "invalid_type",
        "temperature",
        r"Invalid type for 'temperature': expected a decimal, but got a string instead\.",
    ),
    (say("hi", temperature=2.5), "decimal_above_max_value", "temperature", r"Invalid 'temperature': .*"),
    (say("hi", temperature=-1), "decimal_below_min_value", "temperature", r"Invalid 'temperature': .*"),
    (say("hi", n=0), "integer_below_min_value", "n", r"Invalid 'n': .*"),
    (say("hi", n=129), "integer_above_max_value", "n", r"Invalid 'n': .*"),
    (say("hi", stop="x" * 257), "string_above_max_length", "stop", r"Invalid 'stop': .*"),
    (say("hi") | {"messages": []}, "empty_array", "messages", r"Invalid 'messages': .*"),
    (say("hi", stop=["x"] * 17), "array_above_max_length", "stop", r"Invalid 'stop': .*"),
    (
        say("hi") | {"messages": [{"role": "boss", "content": "x"}]},
        "invalid_value",
        "messages[0].role",
        r".*'messages\[0\]\.role'.*",
    ),
]


def test_a_body_that_cannot_be_used(served: Served) -> None:
    for body, code, param, says in BODIES:
        told(served.chat(body), 400, INVALID, code, param, says)
    assert not UsageEvent.objects.exists()


def test_a_body_that_is_too_large(served: Served) -> None:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {served.api_key}\r\nContent-Length: {limits.BODY_BYTES + 1}\r\n\r\n"
    )
    told(served.raw(head.encode()), 413, INVALID, "request_too_large", says=r".* larger than the 4194304 .*")


# -- the model


def test_an_unknown_model(served: Served) -> None:
    says = r"The model `nobody` does not exist or you do not have access to it\."
    told(served.chat(say("hi") | {"model": "nobody"}), 404, INVALID, "model_not_found", says=says)
    told(served.request("GET", "/v1/models/nobody"), 404, INVALID, "model_not_found", "model", says)


def test_a_model_that_is_not_for_this_key(served: Served) -> None:
    make_deployment(route="other")
    publish_change("route", "other")
    text = make_api_key(name="held", routes=["other"])[1]
    says = rf"Project `default` does not have access to model `{ROUTE}`"
    told(served.chat(say("hi"), key=text), 403, INVALID, "model_not_found", says=says)


def test_a_conversation_that_is_too_long_in_the_words_that_clients_look_for(served: Served) -> None:
    told(
        served.chat(say("word " * 9000)),
        400,
        INVALID,
        "context_length_exceeded",
        "messages",
        r"This model's maximum context length is 8192 tokens\. However, your messages resulted in 9000 "
        r"tokens\. Please reduce the length of the messages\.",
    )


# -- the URL


def test_an_unknown_url_is_never_redirected(served: Served) -> None:
    for path in ("/v1", "/v1/", "/v1/foo", "/v1/foo/bar", CHAT + "/", "/v1/models/"):
        for method in ("GET", "POST", "DELETE", "PUT"):
            answer = served.request(method, path, b"{}" if method in ("POST", "PUT") else None)
            told(answer, 404, INVALID, None, says=re.escape(f"Invalid URL ({method} {path})"))
            assert "location" not in answer.headers


def test_a_wrong_method(served: Served) -> None:
    for method, path, allowed in (
        ("GET", CHAT, "POST"),
        ("DELETE", "/v1/embeddings", "POST"),
        ("OPTIONS", "/v1/completions", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", f"/v1/models/{ROUTE}", "GET, HEAD"),
        ("POST", "/v1/openapi.json", "GET, HEAD"),
    ):
        answer = served.request(method, path, b"{}" if method == "POST" else None)
        told(answer, 405, INVALID, "method_not_supported", says=f"Method {method} is not allowed here.")
        assert answer.headers["allow"] == allowed


def test_what_a_client_accepts_decides_nothing(served: Served) -> None:
    for accept in ("application/json", "text/html", "text/event-stream", "*/*", "image/png"):
        header = f"Accept: {accept}"
        assert served.request("GET", "/v1/models", None, header).status == 200
        assert served.chat(say("hi", stream=True), header).status == 200
        missing = served.request("GET", "/v1/models/nobody", None, header)
        told(missing, 404, INVALID, "model_not_found", "model")


# -- what is not the client's fault


def without_workers(served: Served, **wish: Any) -> None:
    WorkerRow.objects.all().delete()
    Deployment.objects.update(**wish)
    publish_change("deployment", "1")
    fleet = served.front.gateway.fleet if served.front else None
    assert fleet is not None
    eventually(lambda: not fleet.route(ROUTE).targets[0][0].workers, "the gateway knows")


@pytest.mark.parametrize("stream", [False, True])
def test_nobody_is_there_and_nobody_will_come(served: Served, stream: bool) -> None:
    without_workers(served, replicas=0)
    began = time.monotonic()
    answer = served.chat(say("hi", stream=stream))
    assert time.monotonic() - began < 1
    told(
        answer,
        503,
        OVERLOADED,
        "server_is_overloaded",
        says=rf"No worker serves the model `{ROUTE}` now, and none is about to\. Please try again later\.",
    )
    assert 1 <= int(answer.headers["retry-after"]) <= 60


@pytest.mark.parametrize("stream", [False, True])
def test_nobody_is_free(served: Served, stream: bool) -> None:
    without_workers(served, queue_seconds=1)
    began = time.monotonic()
    answer = served.chat(say("hi", stream=stream))
    assert 1 <= time.monotonic() - began < 5, "one is about to be started: its queue is waited in"
    told(
        answer,
        503,
        OVERLOADED,
        "server_is_overloaded",
        says=r"The server is currently overloaded with other requests\. Please try again later\.",
    )
    assert 1 <= int(answer.headers["retry-after"]) <= 60


@pytest.mark.parametrize("stream", [False, True])
def test_a_worker_that_dies_before_the_first_byte(facts: str, stream: bool) -> None:
    with worker_process() as mortal:
        WorkerRow.objects.filter(pk=WORKER_ID).update(url=mortal.url)
        front = make_application()
        with serving(front) as port:
            answer = Served(port, facts, front).chat(say("!crash", stream=stream))
    error = told(answer, 503, OVERLOADED, "server_is_overloaded")
    assert mortal.url.rpartition(":")[2] not in error["message"]
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/canary", "canary"])
def test_a_worker_that_cannot_be_reached(facts: str, url: str) -> None:
    WorkerRow.objects.filter(pk=WORKER_ID).update(url=url)
    front = make_application()
    with serving(front) as port:
        answer = Served(port, facts, front).chat(say("hi"))
    told(answer, 503, OVERLOADED, "server_is_overloaded")
    assert b"canary" not in answer.body


@pytest.fixture
def crashing(served: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    async def crash(self: KeyRing, text: str | None) -> None:
        raise RuntimeError(f"canary {settings.BASE_DIR}")

    monkeypatch.setattr(KeyRing, "authenticate", crash)
    return served


def test_a_fault_of_ours_says_nothing(crashing: Served) -> None:
    says = r"The server had an error while processing your request\. Please try again\."
    for method, path in (("POST", CHAT), ("POST", "/v1/embeddings"), ("GET", "/v1/models")):
        answer = crashing.request(method, path, b"{}" if method == "POST" else None)
        told(answer, 500, "server_error", None, says=says)
        assert b"canary" not in answer.body


# -- what is looked at first


def test_the_order_of_the_checks(served: Served) -> None:
    """Key, size, JSON, fields, model, rights: a request that is wrong in several ways is told the first,
    so that who has no key learns nothing, and who may not use a model learns of it last."""
    make_deployment(route="other")
    publish_change("route", "other")
    held = make_api_key(name="held", routes=["other"])[1]

    def code(body: Any, key: str | None = held, length: int | None = None) -> str | None:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        if length is None:
            answer = served.chat(text, key=key)
        else:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
            answer = served.raw(f"{head}Authorization: Bearer {key}\r\n\r\n".encode())
        seen: str | None = answer.error()["code"]
        return seen or str(answer.status)

    too_long = limits.BODY_BYTES + 1
    assert code(b"", key="sk-wrong", length=too_long) == "invalid_api_key"
    assert code(b"{", key="sk-wrong") == "invalid_api_key"
    assert code(b"{", length=too_long) == "request_too_large"
    assert code(b'{"model":"nobody","temperature":1') == "400"
    assert code(say("hi", temperature=9) | {"model": "nobody"}) == "decimal_above_max_value"
    assert code(say("hi") | {"model": ROUTE, "messages": []}) == "empty_array"
    assert served.chat(say("hi") | {"model": "nobody"}, key=held).status == 404
    # Even what no worker of a model can do is not told to those who may not use it.
    assert served.chat(say("hi", min_p=0.5), key=held).status == 403
    assert served.chat(say("hi", min_p=0.5)).error()["code"] == "unsupported_value"


def test_a_wrong_key_on_an_endpoint_is_told_before_the_body_came(served: Served) -> None:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
        "Authorization: Bearer sk-x\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as connected:
        began = time.monotonic()
        connected.sendall(head.encode())
        assert connected.recv(65536).startswith(b"HTTP/1.1 401 ")
        assert time.monotonic() - began < 1


# -- browsers of other origins

ORIGIN = "https://pages.example"
READ_BY_CLIENTS = ["x-request-id", "request-id", "retry-after", "x-should-retry", "openai-processing-ms"]
READ_BY_CLIENTS += [
    f"x-ratelimit-{figure}-{of}"
    for figure in ("limit", "remaining", "reset")
    for of in ("requests", "tokens")
]


@pytest.fixture
def served_across_origins(facts: str) -> Iterator[Served]:
    front = make_application(cors_origins=[ORIGIN])
    with serving(front) as port:
        yield Served(port, facts, front)


def test_cors_is_closed_unless_it_was_opened(served: Served) -> None:
    asks = (f"Origin: {ORIGIN}", "Access-Control-Request-Method: POST")
    preflight = served.request("OPTIONS", CHAT, None, *asks, key=None)
    assert preflight.status == 405
    for answer in (
        preflight,
        served.chat(say("hi"), asks[0]),
        served.request("GET", "/v1/models", None, asks[0]),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_a_preflight_needs_no_key_and_admits_what_the_browsers_client_sends(
    served_across_origins: Served,
) -> None:
    asked = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-retry-count"
    headers = (
        f"Origin: {ORIGIN}",
        "Access-Control-Request-Method: POST",
        f"Access-Control-Request-Headers: {asked}",
    )
    for path in (CHAT, "/v1/models", f"/v1/models/{ROUTE}", "/v1/embeddings", "/v2/rerank"):
        answer = served_across_origins.request("OPTIONS", path, None, *headers, key=None)
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert answer.headers["access-control-allow-headers"] == asked
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "access-control-allow-credentials" not in answer.headers
        assert answer.headers["vary"] == "origin"


def test_answers_errors_and_streams_may_be_read_by_the_origin(served_across_origins: Served) -> None:
    served, origin = served_across_origins, f"Origin: {ORIGIN}"
    answers = {
        200: served.chat(say("hi"), origin),
        400: served.chat(b"{", origin),
        401: served.chat(say("hi"), origin, key=None),
        404: served.request("GET", "/v1/foo", None, origin),
        405: served.request("GET", CHAT, None, origin),
    }
    answers_seen = [*answers.items(), (200, served.chat(say("hi", stream=True), origin))]
    answers_seen.append((200, served.request("GET", "/v1/models", None, origin)))
    for status, answer in answers_seen:
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert set(READ_BY_CLIENTS) <= set(answer.headers["access-control-expose-headers"].split(", "))


def test_another_origin_gets_nothing(served_across_origins: Served) -> None:
    for origin in ("https://evil.example", "null", ORIGIN + ".evil.example", ORIGIN + ":8443"):
        for method in ("OPTIONS", "GET"):
            answer = served_across_origins.request(method, "/v1/models", None, f"Origin: {origin}")
            assert "access-control-allow-origin" not in answer.headers, origin
