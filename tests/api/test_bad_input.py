"""What is wrong with a request is told in OpenAI's shape, quickly, and nothing else happens."""

from __future__ import annotations

import json
import socket
import time
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from openai_api import limits
from registry.actions.api_keys import revoke_api_key
from registry.actions.events import publish_change
from registry.models import ApiKey, UsageEvent
from tests.api.conftest import ROUTE, Answer, Served, eventually, say
from tests.factories import make_api_key, make_deployment

pytestmark = pytest.mark.django_db(transaction=True)


def refused(answer: Answer, status: int, code: str | None = None, param: str | None = None) -> None:
    assert answer.status == status, answer.body
    error = answer.error()
    assert (error["code"], error["param"]) == (code, param), error
    assert not UsageEvent.objects.exists()


def test_a_body_of_10_mb_is_refused_in_100_ms_without_being_read(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as connected:
        began = time.monotonic()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {served.api_key}\r\nContent-Length: {10 * 1024 * 1024}\r\n\r\n"
        )
        # Not a byte of the body is sent: the refusal does not wait for it.
        connected.sendall(head.encode())
        received = b""
        while part := connected.recv(65536):
            received += part
        answer = Answer.of(received, time.monotonic() - began)
    refused(answer, 413, "request_too_large")
    assert answer.seconds < 0.1
    assert answer.headers["connection"] == "close"


def test_a_body_of_64_mb_without_a_length_is_cut_off_at_the_bound(served: Served) -> None:
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        f"Authorization: Bearer {served.api_key}\r\n\r\n"
    ).encode()
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connected:
        connected.sendall(head)
        sent = 0
        try:
            while sent < 1024:
                connected.sendall(chunk)
                sent += 1
        except ConnectionError:
            pass
    # 64 chunks are the bound; the sockets' buffers hold up to 10 MB more on their way.
    assert sent < 1024


def test_a_body_at_the_bound_is_read_and_one_byte_more_is_not(served: Served) -> None:
    empty = len(json.dumps(say("")))
    whole = json.dumps(say("x" * (limits.BODY_BYTES - empty))).encode()
    assert len(whole) == limits.BODY_BYTES
    assert served.chat(whole).status == 200
    answer = served.chat(whole + b" ")
    assert answer.status in (413, 0)  # 0: the connection was closed while we still sent


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "a" "b"}',
        b'{"model": NaN}',
        b'{"temperature": Infinity}',
        b"\xff\xfe",
        b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"model":"m"} trailing',
    ],
)
def test_a_body_that_is_not_json_is_400(served: Served, body: bytes) -> None:
    answer = served.chat(body)
    refused(answer, 400)
    assert "could not parse the JSON body" in answer.error()["message"]
    assert answer.seconds < 0.1


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"messages": None}, "missing_required_parameter", "messages"),
        ({"model": None}, "missing_required_parameter", "model"),
        ({"messages": []}, "empty_array", "messages"),
        ({"messages": "hi"}, "invalid_type", "messages"),
        ({"messages": [USER] * 4097}, "array_above_max_length", "messages"),
        ({"messages": [USER, {"content": "x"}]}, "missing_required_parameter", "messages[1].role"),
        ({"messages": [USER, USER, {"role": "user"}]}, "missing_required_parameter", "messages[2].content"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "empty_array", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
            "missing_required_parameter",
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "unsupported_value",
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "missing_required_parameter",
            "messages[0].tool_call_id",
        ),
        ({"messages": [{"role": "user", "content": "a\x00b"}]}, "invalid_value", "messages[0].content"),
        ({"temperature": 2.1}, "decimal_above_max_value", "temperature"),
        ({"temperature": -0.1}, "decimal_below_min_value", "temperature"),
        ({"temperature": "hot"}, "invalid_type", "temperature"),
        ({"top_p": 1.5}, "decimal_above_max_value", "top_p"),
        ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
        ({"max_tokens": 1.5}, "invalid_type", "max_tokens"),
        ({"max_tokens": 2**63}, "integer_above_max_value", "max_tokens"),
        ({"seed": 2**63}, "integer_above_max_value", "seed"),
        ({"stop": ["x"] * 17}, "array_above_max_length", "stop"),
        ({"stop": "x" * 257}, "string_above_max_length", "stop"),
        ({"stop": [1]}, "invalid_type", "stop[0]"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"n": 0}, "integer_below_min_value", "n"),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"presence_penalty": 3}, "decimal_above_max_value", "presence_penalty"),
        ({"logit_bias": {"5": 10}}, "unsupported_value", "logit_bias"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"chat_template": "{{ x }}"}, "unsupported_value", "chat_template"),
        ({"min_p": 0.2}, "unsupported_value", "min_p"),
    ],
)
def test_a_bad_field_is_named(served: Served, change: dict[str, Any], code: str, param: str) -> None:
    refused(served.chat(say("hi") | change), 400, code, param)


def test_values_that_ask_for_nothing_pass_and_so_do_unknown_fields(served: Served) -> None:
    answer = served.chat(
        say(
            "hi",
            n=1,
            logprobs=False,
            top_logprobs=None,
            presence_penalty=0,
            frequency_penalty=0.0,
            logit_bias={},
            tools=[],
            tool_choice="auto",
            response_format={"type": "text"},
            stop=None,
            seed=5,
            user="u",
            metadata={"a": "b"},
            stream_options=None,
            parallel_tool_calls=False,
            no_such_field={"deep": [1, 2, {}]},
        )
    )
    assert answer.status == 200, answer.body


def test_nesting_is_bounded(served: Served) -> None:
    def nested(levels: int) -> bytes:
        deep = b"[" * levels + b"]" * levels
        return json.dumps(say('text with "[[[[" and \\"{{ inside')).encode()[:-1] + b',"x":' + deep + b"}"

    # The body's own object is the first level.
    assert served.chat(nested(limits.JSON_DEPTH - 1)).status == 200
    refused_answers = [served.chat(nested(levels)) for levels in (limits.JSON_DEPTH, 5_000, 1_000_000)]
    assert [answer.status for answer in refused_answers] == [400] * 3
    assert all("nested deeper than 64" in answer.error()["message"] for answer in refused_answers)


def test_roles_and_text_parts_are_understood(served: Served) -> None:
    conversation = [
        {"role": "developer", "content": "be brief"},
        {"role": "system", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "kind"}]},
        {"role": "user", "content": "one two"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]},
        {"role": "user", "content": "and", "name": "ann"},
    ]
    answer = served.chat({"model": ROUTE, "messages": conversation})
    assert answer.status == 200, answer.body
    assert answer.json()["usage"]["prompt_tokens"] == 8


# -- keys


def test_no_key_wrong_keys_and_odd_headers_are_401(served: Served) -> None:
    none = served.chat(say("hi"), key=None)
    refused(none, 401)
    assert none.headers["www-authenticate"] == "Bearer"
    refused(served.chat(say("hi"), "Authorization: Basic abc", key=None), 401)
    for text in ("sk-wrong", "x", served.api_key[:-1] + "!", served.api_key + "a", "é" * 40):
        answer = served.chat(say("hi"), key=text)
        refused(answer, 401, "invalid_api_key")
        assert text not in answer.error()["message"] or text == "x"
    # Well-formed, never issued.
    from registry.keys import generate_key

    refused(served.chat(say("hi"), key=generate_key().text), 401, "invalid_api_key")


def test_the_scheme_may_be_written_in_any_case(served: Served) -> None:
    answer = served.chat(say("hi"), f"AUTHORIZATION: bEaReR {served.api_key}", key=None)
    assert answer.status == 200


def test_a_key_is_checked_before_the_body_is_read(served: Served) -> None:
    refused(served.chat(b"{not json", key="sk-wrong"), 401, "invalid_api_key")


def test_a_revoked_key_is_refused_within_a_second(served: Served) -> None:
    assert served.chat(say("hi")).status == 200
    revoke_api_key(api_key=ApiKey.objects.get(), by="test")
    began = time.monotonic()
    eventually(lambda: served.chat(say("hi")).status == 401, "the key is refused", seconds=3)
    assert time.monotonic() - began < 1.0
    assert served.request("GET", "/v1/models").status == 401


def test_a_key_just_issued_works_and_an_expired_one_does_not(served: Served) -> None:
    text = make_api_key(name="new", expires_at=timezone.now() + timedelta(seconds=1))[1]
    assert served.chat(say("hi"), key=text).status == 200
    eventually(lambda: served.chat(say("hi"), key=text).status == 401, "the key expires", seconds=4)


def test_a_keys_last_use_is_noted(served: Served) -> None:
    served.chat(say("hi"))
    eventually(lambda: ApiKey.objects.get().last_used_at is not None, "last_used_at is written")


def test_a_key_may_be_held_to_some_routes(served: Served) -> None:
    make_deployment(route="other")
    publish_change("route", "other")
    text = make_api_key(name="held", routes=["other"])[1]
    refused(served.chat(say("hi"), key=text), 403, "model_not_found")
    refused(served.chat(say("hi") | {"model": "nobody"}, key=text), 404, "model_not_found")
    listed = served.request("GET", "/v1/models", key=text).json()["data"]
    assert [model["id"] for model in listed] == ["other"]
    assert served.request("GET", f"/v1/models/{ROUTE}", key=text).status == 404


# -- URLs and methods


def test_an_unknown_model_is_404(served: Served) -> None:
    refused(served.chat(say("hi") | {"model": "nobody"}), 404, "model_not_found")


@pytest.mark.parametrize("path", ["/v1/foo", "/v1/chat/completions/", "/v1", "/v1/", "/fleet/nothing"])
def test_an_unknown_url_is_404_in_json(served: Served, path: str) -> None:
    for method in ("GET", "POST"):
        answer = served.request(method, path, b"{}" if method == "POST" else None)
        refused(answer, 404)
        assert answer.error()["message"] == f"Invalid URL ({method} {path})"


def test_a_wrong_method_is_405_with_allow(served: Served) -> None:
    answer = served.request("GET", "/v1/chat/completions")
    refused(answer, 405, "method_not_supported")
    assert answer.headers["allow"] == "POST"
    answer = served.request("POST", "/v1/models", b"{}")
    refused(answer, 405, "method_not_supported")
    assert "GET" in answer.headers["allow"]
    assert served.request("OPTIONS", "/v1/chat/completions").status == 405


def test_another_host_is_refused(served: Served) -> None:
    for hosts in ("Host: evil.example", "X-None: 1", "Host: localhost\r\nHost: evil.example", "Host: "):
        answer = served.raw(f"GET /v1/models HTTP/1.1\r\n{hosts}\r\n\r\n".encode())
        assert answer.status == 400, hosts
        assert answer.headers["x-request-id"]
    page = served.raw(b"GET /admin/login/ HTTP/1.1\r\nHost: evil.example\r\n\r\n")
    assert page.status == 400
    assert page.headers["content-type"].startswith("text/plain")
    # Probes come by address.
    assert served.raw(b"GET /healthz HTTP/1.1\r\nHost: 10.0.0.1\r\n\r\n").status == 200
