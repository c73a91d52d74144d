"""Notices: each threshold once per period, tried again when it cannot be sent, and no secret in a log."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from django.core import mail

from registry import webhooks
from registry.actions.notices import TRIES, deliver_notices, note_thresholds
from registry.actions.usage import record_usage
from registry.models import Budget, BudgetNotice, Event
from registry.querysets import database_now
from registry.webhooks import WebhookFailed, post_json
from tests.factories import make_budget
from tests.usage import make_event

HOOK = "https://hooks.example/s3cr3t"


@pytest.fixture(autouse=True)
def _mail_is_set(settings: Any) -> None:
    settings.ROUNDHOUSE_MAIL = True


class Outbox:
    """What was sent; `fails` makes each way refuse."""

    def __init__(self) -> None:
        self.mails: list[tuple[str, str, list[str]]] = []
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.fails: set[str] = set()

    def mail(self, subject: str, text: str, recipients: list[str]) -> None:
        if "mail" in self.fails:
            raise OSError(f"could not log in with password hunter2 to send to {recipients}")
        self.mails.append((subject, text, recipients))

    def post(self, url: str, payload: Mapping[str, Any]) -> None:
        if "post" in self.fails:
            raise WebhookFailed(f"{url} does not answer")
        self.posts.append((url, dict(payload)))

    def look(self) -> int:
        """One beat."""
        note_thresholds()
        return deliver_notices(mail=self.mail, post=self.post)


def spend(tokens: int) -> None:
    record_usage([make_event(started_at=database_now(), prompt_tokens=tokens)])


def due() -> None:
    """The pause after a failed try is over."""
    past = database_now() - timedelta(seconds=1)
    BudgetNotice.objects.exclude(next_try_at=None).update(next_try_at=past)


@pytest.mark.django_db
def test_each_threshold_is_told_once_per_period() -> None:
    outbox = Outbox()
    make_budget(limit=100, hard=False, mail_to="a@example.org, b@example.org", webhook_url=HOOK)
    told = []
    for tokens in (49, 1, 0, 29, 1, 19, 1, 500):
        spend(tokens)
        outbox.look()
        told.append([payload["percent"] for _, payload in outbox.posts])
    assert told == [[], [50], [50], [50], [50, 80], [50, 80], [50, 80, 100], [50, 80, 100]]
    assert [recipients for *_, recipients in outbox.mails] == [["a@example.org", "b@example.org"]] * 3
    subject, text, _ = outbox.mails[0]
    assert subject == "Roundhouse: 50 % of the budget of key abc used"
    assert "50 tokens are used" in text
    assert len({payload["id"] for _, payload in outbox.posts}) == 3


@pytest.mark.django_db
def test_of_several_thresholds_at_once_the_highest_is_told() -> None:
    outbox = Outbox()
    make_budget(limit=100, webhook_url=HOOK)
    spend(90)
    assert outbox.look() == 1
    assert [payload["percent"] for _, payload in outbox.posts] == [80]
    assert sorted(BudgetNotice.objects.values_list("percent", flat=True)) == [50, 80]


@pytest.mark.django_db
def test_money_is_told_in_the_currency() -> None:
    from tests.factories import make_price

    outbox = Outbox()
    make_price("chat", input_micros=1_000_000)
    make_budget(limit=2_000_000, unit="money", webhook_url=HOOK)
    spend(1_500_000)
    outbox.look()
    payload = outbox.posts[0][1]
    assert (payload["budget"]["unit"], payload["budget"]["limit"], payload["spent"]) == ("USD", 2.0, 1.5)
    assert json.loads(json.dumps(payload)) == payload


@pytest.mark.django_db
def test_what_cannot_be_sent_is_tried_again_and_what_was_sent_is_not() -> None:
    outbox = Outbox()
    make_budget(limit=100, mail_to="a@example.org", webhook_url=HOOK)
    spend(50)
    outbox.fails = {"post"}
    assert outbox.look() == 0
    assert outbox.look() == 0
    assert len(outbox.mails) == 1, "not before the pause is over"
    outbox.fails = set()
    due()
    assert outbox.look() == 1
    assert (len(outbox.mails), len(outbox.posts)) == (1, 1)
    due()
    assert outbox.look() == 0
    assert (len(outbox.mails), len(outbox.posts)) == (1, 1)


@pytest.mark.django_db
def test_in_the_end_it_is_given_up_and_no_log_tells_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    outbox = Outbox()
    budget = make_budget(limit=100, mail_to="a@example.org", webhook_url=HOOK)
    spend(50)
    outbox.fails = {"mail", "post"}
    with caplog.at_level("DEBUG"):
        for _ in range(TRIES + 2):
            outbox.look()
            due()
    notice = BudgetNotice.objects.get()
    assert (notice.tries, notice.next_try_at) == (TRIES, None)
    given_up = Event.objects.get(kind="budget", object_id=budget.pk, what="notice given up")
    logged = caplog.text + " ".join(str(record.__dict__) for record in caplog.records) + given_up.reason
    assert "could not be sent by web hook" in logged
    assert "s3cr3t" not in logged
    assert "hunter2" not in logged


@pytest.mark.django_db
def test_a_notice_that_another_control_has_claimed_is_not_sent_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = Outbox()
    make_budget(limit=100, webhook_url=HOOK)
    spend(50)
    note_thresholds()
    sent = []

    def post(url: str, payload: Mapping[str, Any]) -> None:
        # In the middle of this try the other one looks.
        sent.append(deliver_notices(mail=outbox.mail, post=outbox.post))

    assert deliver_notices(mail=outbox.mail, post=post) == 1
    assert sent == [0]
    assert outbox.posts == []


@pytest.mark.django_db
def test_a_mail_goes_out_by_djangos_mail() -> None:
    make_budget(limit=100, mail_to="a@example.org")
    Budget.objects.update(subject_name="Team\nBcc: x@example.org")
    spend(100)
    note_thresholds()
    assert deliver_notices() == 1
    [message] = mail.outbox
    assert message.to == ["a@example.org"]
    assert message.subject == "Roundhouse: 100 % of the budget of key Team Bcc: x@example.org used"


@pytest.mark.django_db
def test_without_a_mail_server_only_the_web_hook_is_called(settings: Any) -> None:
    settings.ROUNDHOUSE_MAIL = False
    outbox = Outbox()
    make_budget(limit=100, mail_to="a@example.org", webhook_url=HOOK)
    spend(50)
    assert outbox.look() == 1
    assert (outbox.mails, len(outbox.posts)) == ([], 1)


# -- the web hook itself


@contextmanager
def listening(answer: bytes, *, drip: bool = False) -> Iterator[tuple[str, list[bytes]]]:
    """A server that reads one request after the other and answers each with these bytes."""
    server = socket.create_server(("127.0.0.1", 0))
    heard: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                data = b""
                while b"}}" not in data and (more := connection.recv(65536)):
                    data += more
                heard.append(data)
                for piece in [answer[at : at + 1] for at in range(len(answer))] if drip else [answer]:
                    try:
                        connection.sendall(piece)
                    except OSError:
                        break
                    if drip:
                        time.sleep(0.05)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/hook", heard
    finally:
        server.close()


PAYLOAD = {"a": {"b": 1}}


def test_the_web_hook_gets_json() -> None:
    with listening(b"HTTP/1.1 204 No Content\r\n\r\n") as (url, heard):
        post_json(url, PAYLOAD)
    head, _, body = heard[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /hook HTTP/1.1")
    assert b"application/json" in head
    assert json.loads(body) == PAYLOAD


def test_no_redirect_is_followed() -> None:
    with listening(b"HTTP/1.1 204 No Content\r\n\r\n") as (elsewhere, heard):
        redirect = f"HTTP/1.1 307 Over There\r\nLocation: {elsewhere}\r\ncontent-length: 0\r\n\r\n"
        with listening(redirect.encode()) as (url, _), pytest.raises(WebhookFailed, match="307"):
            post_json(url, PAYLOAD)
    assert heard == []


@pytest.mark.parametrize("answer", [b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n", b"\x00nonsense", b""])
def test_any_other_answer_is_a_failure(answer: bytes) -> None:
    with listening(answer) as (url, _), pytest.raises(WebhookFailed) as failed:
        post_json(url, PAYLOAD)
    assert url not in str(failed.value)


def test_a_web_hook_that_drips_its_answer_takes_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "SECONDS", 0.5)
    began = time.monotonic()
    with (
        listening(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 500, drip=True) as (url, _),
        pytest.raises(WebhookFailed),
    ):
        post_json(url, PAYLOAD)
    assert time.monotonic() - began < 5
