"""S33: nothing that somebody sends forges a line of the log or a header of an answer.

The formatters themselves are looked at in test_s29_secrets_in_logs.py; here it is what clients send.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.test import Client

from openai_api.endpoints import ENDPOINTS
from tests.api.conftest import Answer, Served, eventually, facts, say, served, worker  # noqa: F401
from tests.security.test_s29_secrets_in_logs import logged  # noqa: F401

pytestmark = pytest.mark.django_db(transaction=True)

CONTROLS = [
    *map(chr, range(0x20)),
    "\x7f",
    "\x85",
    "\u2028",
    "\u2029",
    "\u202e",
    "\x1b[2K\x1b[1A",
    "\r\n",
    "\x9b31m",
]
FORGED = 'x{0}2026-01-01T00:00:00Z ERROR forged event="forged"{0}{{"level":"FORGED","event":"request"}}'


def each_field(served: Served) -> Iterator[Callable[[str], Answer | None]]:  # noqa: F811
    """Everything that clients can write into a log."""

    def in_body(name: str) -> Callable[[str], Answer]:
        return lambda text: served.chat(say("hi", max_tokens=1) | {name: text})

    def in_head(line: str) -> Callable[[str], Answer]:
        body = json.dumps(say("hi", max_tokens=1)).encode()
        head = f"Host: localhost\r\nAuthorization: Bearer {served.api_key}\r\nContent-Length: {len(body)}"
        return lambda text: served.raw(
            (line.replace("TEXT", text) + f"\r\n{head}\r\n\r\n").encode("utf-8", "replace") + body
        )

    yield in_body("model")
    yield in_body("user")
    yield lambda text: served.chat(say(text, max_tokens=1))
    yield lambda text: served.chat(say("hi") | {text: 1})
    yield lambda text: served.chat(say("hi"), key=text.replace("\n", "").replace("\r", "") or "x")
    for endpoint in ENDPOINTS[1:]:
        yield lambda text, path=endpoint.path: served.request(
            "POST", path, json.dumps({"input": "x", "prompt": "x", "query": "x", "model": text}).encode()
        )
    yield in_head("POST /v1/chat/completions?TEXT HTTP/1.1")
    yield in_head("POST /v1/TEXT HTTP/1.1")
    yield in_head("POST /TEXT HTTP/1.1")
    yield in_head("TEXT /v1/chat/completions HTTP/1.1")
    yield in_head("POST /v1/chat/completions TEXT")
    for name in (
        "User-Agent",
        "X-Request-Id",
        "Referer",
        "X-Forwarded-For",
        "Content-Type",
        "Origin",
        "TEXT",
    ):
        yield in_head(f"POST /v1/chat/completions HTTP/1.1\r\n{name}: TEXT")
    percent = str.maketrans({chr(at): f"%{at:02X}" for at in (*range(0x21), 0x22, 0x7F)})
    yield lambda text: served.request(
        "GET", f"/v1/models/{text.translate(percent)}".encode().decode("latin-1")
    )
    yield lambda text: served.request("POST", f"/v1/engines/{text.translate(percent)}/embeddings", b"{}")
    yield lambda text: served.request("GET", f"/nothing/{text.translate(percent)}", key=None)


def test_what_clients_send_stays_in_its_line(served: Served, logged: io.StringIO) -> None:  # noqa: F811
    asked = 0
    for ask in each_field(served):
        for control in CONTROLS[:: 1 if asked < 3 else 5]:
            answer = ask(FORGED.format(control))
            asked += 1
            assert answer is None or not any("forged" in value for value in answer.headers.values())
            assert answer is None or "level" not in answer.headers
    assert asked > 150
    browser = Client(headers={"host": "localhost"}, raise_request_exception=False)
    get_user_model().objects.create_user("ann", password="x")
    for control in CONTROLS:
        browser.post("/login/", {"username": FORGED.format(control), "password": "y"})
        browser.get("/nothing/", {"q": FORGED.format(control)})
    eventually(lambda: logged.getvalue().count('"event":"request"') > 20, "the requests are logged")
    lines = logged.getvalue().split("\n")
    assert len(lines) > 100
    for line in filter(None, lines):
        assert line.isprintable(), line
        if line.startswith("{"):
            told: dict[str, Any] = json.loads(line)
            assert told["level"] in ("DEBUG", "INFO", "WARNING", "ERROR"), line
            assert told.get("event") != "forged"
        else:
            # A line of its own, or one of a traceback.
            assert line.startswith(("    ", "20")), line
            assert not line.startswith("2026-01-01T00:00:00Z ERROR forged"), line


@pytest.mark.parametrize("control", ["\r\n", "\n", "\r", "\r\n\r\n", "\x00", "\x0b", "\u2028", "\x85"])
def test_nothing_sent_becomes_a_header_of_the_answer(served: Served, control: str) -> None:  # noqa: F811
    evil = f"x{control}Set-Cookie: evil=1{control}{control}<html>"
    for answer in (
        served.chat(say("hi", max_tokens=1) | {"model": evil}),
        served.chat(say("hi", max_tokens=1), f"X-Request-Id: {evil}"),
        served.chat(say("hi", max_tokens=1), f"Origin: {evil}"),
        served.request("OPTIONS", "/v1/models", None, f"Access-Control-Request-Headers: {evil}"),
        served.request(
            "GET", "/login/?next=" + evil.replace("\r", "%0d").replace("\n", "%0a").replace(" ", "+")
        ),
        served.request("GET", "/chat%0d%0aSet-Cookie:evil=1"),
        served.request("GET", "/%0d%0aSet-Cookie:%20evil=1/", key=None),
    ):
        assert "evil" not in answer.headers.get("set-cookie", "")
        assert not any("evil" in value for name, value in answer.headers.items() if name != "location")
        assert "\n" not in answer.headers.get("location", "")
        assert (
            "evil=1" not in answer.headers.get("location", "") or "%0d" in answer.headers["location"].lower()
        )
