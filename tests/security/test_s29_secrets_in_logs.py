"""S29, S33: nothing that is secret reaches a log, and nothing that is logged can forge a line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.test import Client

from config.logs import JsonFormatter, LineFormatter
from inference.http import request_id_now
from tests.api.conftest import Served, eventually, facts, say, served, worker  # noqa: F401
from tests.factories import make_project

PASSWORD = "canary-password-5Zq"
PROMPT = "canary-prompt-7Xw"
KEY = "sk-canarycanary-" + "k" * 49


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """Everything that anybody logs, at DEBUG, as both formats write it."""
    written = io.StringIO()
    handlers = [logging.StreamHandler(written), logging.StreamHandler(written)]
    handlers[0].setFormatter(LineFormatter())
    handlers[1].setFormatter(JsonFormatter())
    root = logging.getLogger()
    names = ["", "roundhouse", "django", "django.request", "django.server", "aiohttp", "asyncio", "celery"]
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)
    for handler in handlers:
        root.addHandler(handler)
    yield written
    for handler in handlers:
        root.removeHandler(handler)
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.django_db(transaction=True)
def test_no_key_password_or_prompt_reaches_a_log(
    served: Served,  # noqa: F811
    logged: io.StringIO,
    capfd: pytest.CaptureFixture[str],
) -> None:
    chat = say(PROMPT, max_tokens=3, user=PROMPT)
    # Each way a request can go: answered, streamed, refused at every step, broken off by a fault.
    assert served.chat(chat).status == 200
    assert served.chat(chat | {"stream": True}).status == 200
    assert served.chat(chat, key=KEY).status == 401
    assert served.chat(chat, key=served.api_key[:-1] + "!").status == 401
    assert served.chat(chat | {"temperature": PROMPT}).status == 400
    assert served.chat(chat | {"model": "unknown"}).status == 404
    assert served.chat(f'{{"messages": ["{PROMPT}"'.encode()).status == 400
    assert served.request("GET", f"/v1/models?api_key={KEY}").status == 200
    assert served.request("GET", f"/v1/nothing?q={PROMPT}").status == 404
    broken = f"POST /v1/chat/completions HTTP/1.1\r\nAuthorization: {KEY}\r\nbroken {PROMPT}\r\n\r\n"
    assert served.raw(broken.encode()).status == 400
    assert served.front is not None

    async def fails(*_: Any) -> None:
        raise RuntimeError("a fault of ours")

    served.front.gateway.keys.authenticate = fails  # type: ignore[method-assign, assignment]
    assert served.chat(chat).status == 500

    people = get_user_model().objects
    people.create_superuser("olga", password=PASSWORD)
    browser = Client(headers={"host": "localhost"}, raise_request_exception=False)
    login = {"username": "olga", "password": PASSWORD}
    assert browser.post("/admin/login/?next=/admin/", login).status_code == 302
    assert browser.post("/admin/login/", login | {"password": PASSWORD + "x"}).status_code == 200
    form = {"name": "new", "project": make_project().pk, "expires_at_0": "", "expires_at_1": ""}
    page = browser.post("/admin/registry/apikey/add/", form, follow=True).content.decode()
    issued = page.partition("<code>")[2].partition("</code>")[0]
    assert issued.startswith("sk-")
    session = browser.cookies["sessionid"].value

    eventually(lambda: logged.getvalue().count('"event": "request"') >= 6, "the requests are logged")
    text = logged.getvalue() + "".join(capfd.readouterr())
    assert "request_crashed" in text, "the fault was logged"
    secrets = [PASSWORD, PROMPT, KEY, served.api_key, served.api_key[-20:], issued, issued[-20:], session]
    assert [secret for secret in secrets if secret in text] == []


@pytest.mark.django_db(transaction=True)
def test_each_line_of_a_request_carries_its_id(served: Served, logged: io.StringIO) -> None:  # noqa: F811
    answer = served.chat(say("hello", max_tokens=2))
    answer_of_django = served.request("GET", "/admin/nothing/", key=None)
    eventually(lambda: '"event": "request"' in logged.getvalue(), "the request is logged")
    lines = [json.loads(line) for line in logged.getvalue().splitlines() if line.startswith("{")]
    [of_request] = [line for line in lines if line.get("event") == "request"]
    assert of_request["request_id"] == answer.headers["x-request-id"]
    of_django = [line for line in lines if line["logger"] == "django.request"]
    for line in of_django:
        assert line["request_id"] == answer_of_django.headers["x-request-id"]


HOSTILE = 'a\nERROR forged\r\n\x1b[31m\x00\x85\u2028 "} {"level": "FORGED"'


def record(message: str, *arguments: object, **facts: Any) -> logging.LogRecord:  # noqa: F811
    made = logging.LogRecord("roundhouse.test", logging.INFO, "x.py", 1, message, arguments, None)
    vars(made).update(facts)
    return made


def test_nothing_that_is_logged_can_forge_a_line() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        failure = (type(error), error, error.__traceback__)
    for made in (
        record("said %s", HOSTILE),
        record("said", route=HOSTILE, event="request"),
        record("said", level=HOSTILE, logger=HOSTILE, listed=[HOSTILE]),
        record("failed"),
    ):
        if made.msg == "failed":
            made.exc_info = failure
        as_json = JsonFormatter().format(made)
        assert "\n" not in as_json
        assert as_json.isascii()
        told = json.loads(as_json)
        assert (told["level"], told["logger"]) == ("INFO", "roundhouse.test")
        first, *rest = LineFormatter().format(made).splitlines()
        assert first.isprintable()
        assert all(line.startswith("    ") for line in rest), "only a traceback has further lines"
        assert all(line.isprintable() for line in rest)


def test_the_request_of_the_task_is_added_unless_one_is_named() -> None:
    token = request_id_now.set("req_1")
    try:
        assert json.loads(JsonFormatter().format(record("x")))["request_id"] == "req_1"
        assert 'request_id="req_1"' in LineFormatter().format(record("x"))
        assert json.loads(JsonFormatter().format(record("x", request_id="req_2")))["request_id"] == "req_2"
    finally:
        request_id_now.reset(token)
    assert "request_id" not in json.loads(JsonFormatter().format(record("x")))


def test_objects_that_others_attach_are_not_written() -> None:
    class Carrier:
        def __str__(self) -> str:
            return "secret"

    for formatter in (LineFormatter(), JsonFormatter()):
        assert "secret" not in formatter.format(record("x", request=Carrier()))
