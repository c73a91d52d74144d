"""S29, S33: nothing that is secret reaches a log, and nothing that is logged can forge a line."""

from __future__ import annotations

import inspect
import io
import json
import logging
import os
import re
import smtplib
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from celery import current_app
from celery.signals import before_task_publish
from django.contrib.auth import get_user_model
from django.db import DatabaseError, connection
from django.test import Client

from config.logs import JsonFormatter, LineFormatter
from inference import tasks
from inference.http import request_id_now
from inference.nudges import send_nudges
from inference.reconcile import reconcile
from registry.actions.budgets import save_budget
from registry.actions.notices import deliver_notices, note_thresholds
from registry.actions.own_keys import issue_own_key
from registry.actions.projects import set_role
from registry.actions.usage import record_usage
from registry.models import ApiKey, Budget, BudgetNotice, JoinToken
from registry.querysets import database_now
from tests.api.conftest import (
    ROOT,
    ROUTE,
    Served,
    eventually,
    facts,  # noqa: F401
    say,
    served,  # noqa: F401
    worker,  # noqa: F401
    worker_process,
)
from tests.factories import LONG_AGO, make_deployment, make_node, make_project
from tests.integration.test_chat_socket import page_of
from tests.usage import make_event
from webchat.actions import create_conversation

PASSWORD = "canary-password-5Zq"
PROMPT = "canary-prompt-7Xw"
KEY = "sk-canarycanary-" + "k" * 49


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Everything that anybody logs, at DEBUG, as both formats write it."""
    # As in production: of a line that cannot be written nothing is printed.
    monkeypatch.setattr(logging, "raiseExceptions", False)
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

    eventually(lambda: logged.getvalue().count('"event":"request"') >= 6, "the requests are logged")
    text = logged.getvalue() + "".join(capfd.readouterr())
    assert "request_crashed" in text, "the fault was logged"
    secrets = [PASSWORD, PROMPT, KEY, served.api_key, served.api_key[-20:], issued, issued[-20:], session]
    assert [secret for secret in secrets if secret in text] == []


HOOK_SECRET = "canary-hook-3Rt"
MAIL_PASSWORD = "canary-mail-8Yu"


class Keeper:
    """Collects secrets, and looks for them in what was logged."""

    def __init__(self, logged: io.StringIO, capfd: pytest.CaptureFixture[str]) -> None:
        self._logged, self._capfd = logged, capfd
        self.secrets: list[str] = []

    def keep(self, *texts: str) -> None:
        """Of keys the end tells as much as the whole."""
        for text in texts:
            assert len(text) > 7, "a canary that is told by chance"
            self.secrets += [text, text[-20:]] if len(text) > 40 else [text]

    def check(self, *expected: str) -> None:
        text = self._logged.getvalue() + "".join(self._capfd.readouterr())
        for one in expected:
            assert one in text, f"nothing was logged of {one}"
        assert self.secrets, "nothing to look for"
        assert [secret for secret in self.secrets if secret in text] == []


@pytest.fixture
def keeper(logged: io.StringIO, capfd: pytest.CaptureFixture[str]) -> Keeper:
    return Keeper(logged, capfd)


KEYS = re.compile(r"sk-[0-9A-Za-z]{12}-[0-9A-Za-z]{49}")


def client_of(user: Any) -> Client:
    client = Client(headers={"host": "localhost"}, raise_request_exception=False)
    client.force_login(user)
    return client


@pytest.mark.django_db(transaction=True)
def test_no_secret_of_the_keys_pages_and_their_api_reaches_a_log(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    people, project = get_user_model().objects, make_project(name="a")
    olga = people.create_superuser("olga", password=PASSWORD)
    set_role(project=project, user=olga, role="owner", by="test")
    browser = client_of(olga)
    keeper.keep(browser.cookies["sessionid"].value, PASSWORD, PROMPT)

    def send(path: str, body: Any) -> Any:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        return browser.post(f"/api/v1/{path}", text, content_type="application/json")

    def shown(page: Any) -> str:
        found = KEYS.search(page.content.decode())
        assert found is not None, page.content
        keeper.keep(found[0])
        return found[0]

    new = {"name": "n", "project": project.pk, "metadata": {"note": PROMPT}}
    public_id = send("keys", new).json()["id"]
    text = shown(send("keys", new))
    shown(send(f"keys/{public_id}/rotate", {"overlap_seconds": 60}))
    by_page = shown(browser.post("/keys/", {"name": "n", "project": project.pk}, follow=True))[3:15]
    shown(browser.post(f"/keys/{by_page}/rotate/", {"overlap": "24"}, follow=True))
    api_key = ApiKey.objects.get(public_id=by_page)
    shown(browser.post(f"/admin/registry/apikey/{api_key.pk}/rotate/", {"overlap": "24"}, follow=True))
    joined = browser.post("/admin/registry/jointoken/add/", {"uses": 1, "hours": 1}, follow=True)
    token = re.search(r"--join (\S+) ", joined.content.decode())
    assert token is not None
    assert JoinToken.objects.count() == 1
    keeper.keep(token[1])
    passwords = {"password1": PASSWORD + "new", "password2": PASSWORD + "new"}
    ann = people.create_user("ann", password=PASSWORD)
    assert browser.post(f"/admin/auth/user/{ann.pk}/password/", passwords).status_code in (200, 302)
    ben = {"username": "ben", "usable_password": "true", **passwords}
    assert browser.post("/admin/auth/user/add/", ben).status_code in (200, 302)

    # Refused for what it says, and in every other way.
    for body in (
        b'{"name": "' + PROMPT.encode(),
        {"name": [PROMPT], "project": project.pk},
        {PROMPT: PROMPT},
        {**new, "expires_at": PROMPT},
        {**new, "routes": [f"{PROMPT} {PROMPT}"]},
        {**new, "addresses": [PROMPT]},
        {**new, "metadata": {PROMPT: 5}},
    ):
        assert send("keys", body).status_code == 400, body
    # The whole key where its public part was wanted.
    for path in (f"/api/v1/keys/{text}", f"/keys/{text}/", f"/admin/nothing/{text}"):
        assert browser.get(path).status_code == 404
    assert browser.get("/api/v1/keys", {PROMPT: PROMPT}).status_code == 400
    anybody = Client(headers={"host": "localhost"})
    assert anybody.get("/api/v1/keys", headers={"authorization": f"Bearer {PROMPT}"}).status_code == 401

    # A fault in mid-way, the secret made already.
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("registry.actions.api_keys.publish_change", fails)
    assert send("keys", new).status_code == 500
    assert send(f"keys/{public_id}/rotate", {}).status_code == 500
    assert browser.post("/keys/", {"name": PROMPT, "project": project.pk}).status_code == 500
    assert browser.post(f"/keys/{by_page}/rotate/", {"overlap": "24"}).status_code == 500
    keeper.check("a fault of ours", "view_crashed")


@pytest.mark.django_db(transaction=True)
def test_no_secret_of_a_notice_reaches_a_log(keeper: Keeper, settings: Any) -> None:
    settings.ROUNDHOUSE_MAIL = True
    settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
    settings.EMAIL_HOST, settings.EMAIL_PORT, settings.EMAIL_TIMEOUT = "127.0.0.1", 1, 2
    settings.EMAIL_HOST_USER, settings.EMAIL_HOST_PASSWORD = "roundhouse", MAIL_PASSWORD
    keeper.keep(HOOK_SECRET, MAIL_PASSWORD)
    browser = client_of(get_user_model().objects.create_superuser("olga", password=PASSWORD))
    hooks = {
        "closed": f"https://127.0.0.1:1/{HOOK_SECRET}",
        "with a password": f"https://{HOOK_SECRET}:{HOOK_SECRET}@127.0.0.1:1/",
        "no host": f"https://[{HOOK_SECRET}/",
        "not there": f"https://nowhere.invalid/?token={HOOK_SECRET}",
    }
    for name, url in hooks.items():
        budget = Budget(
            scope="key",
            subject=name[:16],
            unit="tokens",
            limit=100,
            starts_at=LONG_AGO,
            mail_to="a@example.org",
        )
        save_budget(budget=budget, by="test")
        # Also what the form would not take.
        Budget.objects.filter(pk=budget.pk).update(webhook_url=url)
        browser.get(f"/admin/registry/budget/{budget.pk}/change/")
        record_usage([make_event(key_public_id=name[:16], completion_tokens=100, started_at=database_now())])
    form = {"scope": "route", "subject": "x", "unit": "tokens", "period": "month", "amount": "5"}
    for url in (f"ftp://{HOOK_SECRET}/", f"https://example.org/{HOOK_SECRET}"):
        browser.post("/admin/registry/budget/add/", {**form, "webhook_url": url})
    assert note_thresholds() >= len(hooks)
    deliver_notices()

    def refuses(*_: Any) -> None:
        raise smtplib.SMTPAuthenticationError(535, f"wrong: {MAIL_PASSWORD}".encode())

    def fails(url: str, _: Any) -> None:
        raise ValueError(f"could not parse {url}")

    BudgetNotice.objects.filter(next_try_at__isnull=False).update(next_try_at=database_now())
    deliver_notices(mail=refuses, post=fails)
    keeper.check("notice_failed", "SMTPAuthenticationError", "budget_threshold")


@pytest.mark.django_db(transaction=True)
def test_no_secret_is_an_argument_of_a_task(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the broker reads ids and times."""
    for name, task in current_app.tasks.items():
        if name.startswith(("inference.", "openai_api.", "webchat.", "registry.")):
            parameters = inspect.signature(task.run).parameters
            kinds = {str(one.annotation) for one in parameters.values()}
            assert kinds <= {"int", "None"}, (name, parameters)
    published: list[Any] = []

    def note(body: Any = None, headers: Any = None, **_: Any) -> None:
        published.append((body, headers))

    node = make_node(secret_digest="canary-digest-9Po")
    make_deployment(environment={"HF_TOKEN": "canary-token-2Lk"}, replicas=2)
    keeper.keep("canary-digest-9Po", "canary-token-2Lk")
    before_task_publish.connect(note)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(current_app.conf, "broker_url", "memory://")
            reconcile(send_nudges)
            send_nudges([node.name])
    finally:
        before_task_publish.disconnect(note)
    assert published, "the nodes were nudged"
    for body, headers in published:
        assert [type(one) for one in body[0]] == [int]
        told = repr((body, headers))
        assert not any(secret in told for secret in keeper.secrets)

    # A task that fails says why, and comes again.
    def fails() -> None:
        raise RuntimeError("a fault of ours")

    tasks.one_at_a_time(fails)()
    keeper.check("fails_failed", "a fault of ours")


@pytest.mark.django_db(transaction=True)
def test_no_message_of_a_chat_reaches_a_log(
    # First: it sets Django's logging up anew.
    served: Served,  # noqa: F811
    keeper: Keeper,
    logged: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ann = get_user_model().objects.create_user("ann", password=PASSWORD)
    conversation = create_conversation(user=ann, model=ROUTE)
    keeper.keep(PROMPT)
    # The browser's side is this test's own.
    logging.getLogger("websockets.client").setLevel(logging.WARNING)
    with page_of(ann, served.port) as page:
        keeper.keep(page.client.cookies["sessionid"].value)
        user, assistant = page.send(conversation, PROMPT)
        assert page.hear_all(assistant["id"])[-1]["type"] == "end"
        page.say(type=PROMPT, content=PROMPT)
        page.hear()
        page.socket.send("{" + PROMPT)
        page.hear()

        async def fails(*_: Any) -> None:
            raise RuntimeError("a fault of ours")

        monkeypatch.setattr("webchat.consumers.ChatSocket._begin", fails)
        page.say(type="send", conversation=str(conversation.pk), content=PROMPT)
        eventually(lambda: "chat_frame_crashed" in logged.getvalue(), "the fault is logged")
    browser = client_of(ann)
    assert browser.get("/chat/api/conversations", {"q": PROMPT}).status_code == 200
    change = json.dumps({"title": PROMPT})
    address = f"/chat/api/conversations/{conversation.pk}"
    assert browser.patch(address, change, content_type="application/json").status_code == 200
    assert user["id"] != assistant["id"]
    keeper.check("chat_frame_crashed", "a fault of ours")


@pytest.mark.django_db(transaction=True)
def test_what_the_database_refused_is_not_logged(keeper: Keeper) -> None:
    """PostgreSQL tells with its error the whole row that it refused."""
    ann = get_user_model().objects.create_user("ann", password=PASSWORD)
    set_role(project=make_project(name="a"), user=ann, role="owner", by="test")
    conversation = create_conversation(user=ann, model=ROUTE)
    keeper.keep(f"{PROMPT}\nsecond {PROMPT}")
    key, _ = issue_own_key(user=ann, project=make_project(name="a"), name="n")
    of_conversation = [f"{PROMPT}\nsecond {PROMPT}", conversation.pk.hex]
    with pytest.raises(DatabaseError) as refused, connection.cursor() as cursor:
        cursor.execute(
            "UPDATE webchat_conversation SET title = %s, model = NULL WHERE id = %s", of_conversation
        )
    if connection.vendor == "postgresql":
        assert PROMPT in str(refused.value), "it tells the row"
    log = logging.getLogger("roundhouse.test")
    log.error("the row was refused", exc_info=refused.value)
    log.error("it was refused: %s", refused.value)
    try:
        raise RuntimeError("while that was handled") from refused.value
    except RuntimeError:
        log.exception("and again")
    assert key.usable(database_now() + timedelta(days=1))
    keeper.check("the row was refused", "it was refused", "and again", "while that was handled", "model")


def test_no_prompt_reaches_a_workers_log(keeper: Keeper) -> None:
    keeper.keep(PROMPT)
    for command in ("", "!error 2", "!crash 2"):
        with worker_process() as running:
            direct = Served(int(running.url.rpartition(":")[2]), running.secret)
            keeper.keep(running.secret)
            body = {"model": "sim", "messages": [{"role": "user", "content": f"{command} {PROMPT}"}]}
            for bad in (body | {"max_tokens": PROMPT}, body | {"model": [PROMPT]}, {"messages": PROMPT}):
                assert direct.chat(bad).status == 400, bad
            answer = direct.chat(body | {"max_tokens": 8})
            assert answer.status == {"": 200, "!error 2": 500, "!crash 2": 0}[command]
    keeper.check()


@pytest.mark.django_db(transaction=True)
def test_each_line_of_a_request_carries_its_id(served: Served, logged: io.StringIO) -> None:  # noqa: F811
    answer = served.chat(say("hello", max_tokens=2))
    answer_of_django = served.request("GET", "/admin/nothing/", key=None)
    eventually(lambda: '"event":"request"' in logged.getvalue(), "the request is logged")
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


def test_a_line_that_cannot_be_written_is_not_printed_raw() -> None:
    program = (
        "import django, logging; django.setup(); "
        f"logging.getLogger('roundhouse.test').warning('%d tokens', {PROMPT!r})"
    )
    path = f"{ROOT}:{ROOT / 'platform'}"
    told = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "config.settings.production", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert PROMPT not in told.stdout + told.stderr
