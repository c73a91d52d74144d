"""The chat over its real socket: a real gateway, a real worker of the simulated engine, a real Redis."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import websockets
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.test import Client
from websockets.sync.client import ClientConnection, connect

from config.front import Front, make_application
from config.server import WEBSOCKETS
from registry.actions.events import publish_change
from registry.models import DeploymentRevision, UsageEvent
from registry.states import Outcome
from tests import services
from tests.api.conftest import (
    CAPABILITIES,
    ROUTE,
    WORKER_ID,
    Worker,
    eventually,
    process_serving,
    serving,
    worker_process,
)
from tests.factories import make_deployment, make_worker
from webchat import bounds
from webchat.actions import create_conversation
from webchat.consumers import ChatSocket, origin_is_ours
from webchat.log import AnswerLog
from webchat.models import Conversation, Message, MessageState
from webchat.runner import ChatRunner

pytestmark = pytest.mark.django_db(transaction=True)

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with worker_process() as running:
        yield running


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with services.shared_redis() as url:
        if url is None:
            services.missing("no Redis answers, and none is installed")
        yield url


@pytest.fixture
def people(transactional_db: None, worker: Worker) -> dict[str, User]:
    """A route with one ready worker, and two people."""
    make_worker(
        deployment=make_deployment(route=ROUTE), id=WORKER_ID, url=worker.url, capabilities=CAPABILITIES
    )
    publish_change("route", ROUTE)
    return {name: User.objects.create_user(name, password="a password") for name in ("ann", "bob")}


@contextlib.contextmanager
def gateway(redis_url: str | None = None) -> Iterator[tuple[int, Front]]:
    before = django_settings.ROUNDHOUSE_REDIS_URL
    django_settings.ROUNDHOUSE_REDIS_URL = redis_url
    try:
        front = make_application()
    finally:
        django_settings.ROUNDHOUSE_REDIS_URL = before
    with serving(front) as port:
        yield port, front


@pytest.fixture
def chat(people: dict[str, User], redis_url: str) -> Iterator[int]:
    with gateway(redis_url) as (port, _):
        yield port


@dataclass
class Page:
    """A browser's page: its session, and its socket when it has one."""

    user: User
    client: Client
    port: int
    socket: ClientConnection

    def say(self, **frame: Any) -> None:
        self.socket.send(json.dumps(frame))

    def hear(self, timeout: float = 10.0) -> dict[str, Any]:
        frame: dict[str, Any] = json.loads(self.socket.recv(timeout=timeout))
        return frame

    def hear_all(self, message: str, until: Callable[[dict[str, Any]], bool] | None = None) -> list[Any]:
        """Frames about a message, to its end, or to the first for which `until` is true."""
        frames = []
        while True:
            frame = self.hear()
            if frame.get("message") == message:
                frames.append(frame)
                if frame["type"] == "end" or (until is not None and until(frame)):
                    return frames

    def send(self, conversation: Conversation, content: str, **fields: Any) -> tuple[Any, Any]:
        self.say(type="send", conversation=str(conversation.pk), content=content, **fields)
        sent = self.hear()
        assert sent["type"] == "sent", sent
        return sent["user"], sent["assistant"]


@contextlib.contextmanager
def page_of(user: User, port: int, **handshake: Any) -> Iterator[Page]:
    client = Client()
    client.force_login(user)
    cookie = f"sessionid={client.cookies['sessionid'].value}"
    options: dict[str, Any] = {
        "origin": f"http://127.0.0.1:{port}",
        "additional_headers": {"Cookie": cookie},
        "close_timeout": 2,
    }
    with connect(f"ws://127.0.0.1:{port}/chat/ws", **options | handshake) as connected:
        yield Page(user, client, port, connected)


def text_of(frames: list[dict[str, Any]]) -> str:
    return "".join(frame["text"] for frame in frames if frame["type"] == "delta")


def test_a_message_is_answered_in_pieces_and_kept(chat: int, people: dict[str, User]) -> None:
    conversation = create_conversation(user=people["ann"])
    assert conversation.model == ROUTE
    with page_of(people["ann"], chat) as page:
        user, assistant = page.send(conversation, "!tokens 12 !slow 0.06")
        assert (user["content"], user["role"], user["parent"]) == ("!tokens 12 !slow 0.06", "user", None)
        assert (assistant["parent"], assistant["state"]) == (user["id"], "generating")
        frames = page.hear_all(assistant["id"])
    deltas, end = frames[:-1], frames[-1]
    assert len(deltas) >= 10
    assert [frame["seq"] for frame in frames] == sorted(frame["seq"] for frame in frames)
    assert len({frame["seq"] for frame in deltas}) == len(deltas)
    assert end["state"] == "complete"
    assert (end["prompt_tokens"], end["completion_tokens"]) == (4, 12)
    assert 0 < end["ttft_ms"] <= end["duration_ms"]
    assert end["title"] == "!tokens 12 !slow 0.06"
    shown = page.client.get(f"/chat/api/conversations/{conversation.pk}").json()
    assert shown["leaf"] == assistant["id"]
    kept = next(message for message in shown["messages"] if message["id"] == assistant["id"])
    assert kept["content"] == text_of(frames)
    assert (kept["state"], kept["error"], kept["completion_tokens"]) == ("complete", None, 12)


def test_each_answer_is_in_the_ledger_once_in_its_persons_name(chat: int, people: dict[str, User]) -> None:
    conversation = create_conversation(user=people["ann"])
    with page_of(people["ann"], chat) as page:
        for tokens in (3, 5):
            _, assistant = page.send(conversation, f"!tokens {tokens}")
            page.hear_all(assistant["id"])
        page.say(type="regenerate", message=assistant["id"])
        again = page.hear()["assistant"]
        page.hear_all(again["id"])
    eventually(lambda: UsageEvent.objects.count() == 3, "the ledger has all of them")
    events = UsageEvent.objects.order_by("started_at")
    assert [event.completion_tokens for event in events] == [3, 5, 5]
    assert {event.key_public_id for event in events} == {f"user-{people['ann'].pk}"}
    assert {(event.key_name, event.project_name) for event in events} == {("ann", "Chat")}
    assert {event.outcome for event in events} == {Outcome.OK}
    written = set(Message.objects.exclude(request_id="").values_list("request_id", flat=True))
    assert {event.request_id for event in events} == written


def test_a_page_that_comes_back_in_mid_answer_gets_the_same_text_once(
    chat: int, people: dict[str, User]
) -> None:
    conversation = create_conversation(user=people["ann"])
    with page_of(people["ann"], chat) as page:
        _, assistant = page.send(conversation, "!tokens 60 !slow 0.03")
        before = page.hear_all(assistant["id"], lambda frame: len(frame.get("text", "")) > 0)
        before += page.hear_all(assistant["id"], lambda frame: True)
    # Nobody watches now; it goes on.
    time.sleep(0.4)
    with page_of(people["ann"], chat) as page:
        page.say(type="attach", message=assistant["id"], after=before[-1]["seq"])
        after = page.hear_all(assistant["id"])
        page.say(type="attach", message=assistant["id"], after="0")
        whole = page.hear_all(assistant["id"])
    kept = Message.objects.get(pk=assistant["id"])
    assert after[-1]["completion_tokens"] == 60
    assert len(after) > 5
    assert text_of(before) + text_of(after) == text_of(whole) == kept.content
    assert whole[-1] == after[-1]


def test_a_second_gateway_streams_what_the_first_one_writes(
    chat: int, people: dict[str, User], redis_url: str
) -> None:
    conversation = create_conversation(user=people["ann"])
    with gateway(redis_url) as (other, _), page_of(people["ann"], chat) as page:
        _, assistant = page.send(conversation, "!tokens 50 !slow 0.04")
        with page_of(people["ann"], other) as elsewhere:
            elsewhere.say(type="attach", message=assistant["id"], after="0")
            there = elsewhere.hear_all(assistant["id"])
        here = page.hear_all(assistant["id"])
    assert text_of(there) == text_of(here)
    assert there[-1] == here[-1]
    # Not two seconds at a time from the database, but as it came.
    assert len(there) > 20


def test_a_second_gateway_stops_what_the_first_one_writes_within_a_second(
    chat: int, people: dict[str, User], redis_url: str
) -> None:
    conversation = create_conversation(user=people["ann"])
    with gateway(redis_url) as (other, _), page_of(people["ann"], chat) as page:
        _, assistant = page.send(conversation, "!tokens 400 !slow 0.03")
        page.hear_all(assistant["id"], lambda frame: True)
        with page_of(people["ann"], other) as elsewhere:
            elsewhere.say(type="stop", message=assistant["id"])
            began = time.monotonic()
            end = page.hear_all(assistant["id"])[-1]
    assert end["state"] == "stopped"
    assert time.monotonic() - began < 1.5


def test_a_stopped_answer_keeps_its_text_and_reaches_the_engine(
    chat: int, people: dict[str, User], worker: Worker
) -> None:
    conversation = create_conversation(user=people["ann"])
    with page_of(people["ann"], chat) as page:
        _, assistant = page.send(conversation, "!tokens 500 !slow 0.03")
        frames = page.hear_all(assistant["id"], lambda frame: True)
        page.say(type="stop", message=assistant["id"])
        began = time.monotonic()
        frames += page.hear_all(assistant["id"])
        assert time.monotonic() - began < 2
        # A stopped answer is a turn like any other.
        _, next_one = page.send(conversation, "!tokens 2")
        assert page.hear_all(next_one["id"])[-1]["state"] == "complete"
    assert frames[-1]["state"] == "stopped"
    assert "error" not in frames[-1]
    eventually(lambda: worker.load()["running"] == 0, "the engine stopped")
    kept = Message.objects.get(pk=assistant["id"])
    assert (kept.state, kept.content) == (MessageState.STOPPED, text_of(frames))
    event = eventually(
        lambda: UsageEvent.objects.filter(request_id=kept.request_id).first(), "the ledger has it"
    )
    assert event.outcome == Outcome.ABORTED
    assert 1 <= event.completion_tokens < 200
    assert event.completion_tokens == kept.completion_tokens


def test_regenerating_adds_a_sibling_and_tells_the_model_what_came_before(
    chat: int, people: dict[str, User]
) -> None:
    conversation = create_conversation(user=people["ann"])
    with page_of(people["ann"], chat) as page:
        user, first = page.send(conversation, "hello there")
        page.hear_all(first["id"])
        page.say(type="regenerate", message=first["id"], model=ROUTE)
        sent = page.hear()
        assert sent["type"] == "sent"
        assert "user" not in sent
        second = sent["assistant"]
        end = page.hear_all(second["id"])[-1]
    assert second["parent"] == user["id"] == first["parent"]
    assert second["id"] != first["id"]
    assert end["prompt_tokens"] == 2
    assert str(Conversation.objects.get().leaf_id) == second["id"]
    positions = (
        Message.objects.filter(parent_id=user["id"]).order_by("position").values_list("pk", "position")
    )
    assert [(str(pk), position) for pk, position in positions] == [(first["id"], 0), (second["id"], 1)]


def test_an_edited_first_message_begins_a_branch_of_its_own(chat: int, people: dict[str, User]) -> None:
    conversation = create_conversation(user=people["ann"])
    conversation.settings = {"system": "be brief please", "max_tokens": 4}
    conversation.save()
    with page_of(people["ann"], chat) as page:
        _, first = page.send(conversation, "one two three")
        assert page.hear_all(first["id"])[-1]["completion_tokens"] == 4
        user, second = page.send(conversation, "four", parent=None)
        # The system prompt and the one word: nothing of the other branch.
        assert page.hear_all(second["id"])[-1]["prompt_tokens"] == 4
        assert user["parent"] is None
        _, third = page.send(conversation, "five", parent=first["id"])
        assert page.hear_all(third["id"])[-1]["prompt_tokens"] == 3 + 3 + 4 + 1


def test_a_failed_answer_says_why_and_is_not_told_to_the_model(chat: int, people: dict[str, User]) -> None:
    conversation = create_conversation(user=people["ann"])
    with page_of(people["ann"], chat) as page:
        _, lost = page.send(conversation, "hello you", model="org/none")
        end = page.hear_all(lost["id"])[-1]
        assert end["state"] == "failed"
        assert "`org/none` does not exist" in end["error"]
        _, answer = page.send(conversation, "again", model=ROUTE)
        # Both stand together, for nothing was answered between them.
        assert page.hear_all(answer["id"])[-1]["prompt_tokens"] == 2 + 1
        _, broken = page.send(conversation, "!tokens 9 !slow 0.02 !error 3", parent=None)
        frames = page.hear_all(broken["id"])
        assert frames[-1]["state"] == "interrupted"
        assert "interrupted" in frames[-1]["error"]
        assert text_of(frames)
        _, answer = page.send(conversation, "and now")
        # What came of a broken answer was said.
        assert page.hear_all(answer["id"])[-1]["prompt_tokens"] == 6 + 3 + 2
    assert Message.objects.get(pk=broken["id"]).content == text_of(frames)


def test_an_answer_is_not_continued_while_it_is_written(chat: int, people: dict[str, User]) -> None:
    conversation = create_conversation(user=people["ann"])
    with page_of(people["ann"], chat) as page:
        _, assistant = page.send(conversation, "!tokens 200 !slow 0.05")
        for frame in (
            {"type": "send", "conversation": str(conversation.pk), "content": "and?"},
            {"type": "regenerate", "message": assistant["id"]},
        ):
            page.say(**frame)
            heard = page.hear()
            while heard["type"] == "delta":
                heard = page.hear()
            assert heard["type"] == "error"
            assert "still being written" in heard["text"]
        page.say(type="stop", message=assistant["id"])
        page.hear_all(assistant["id"])


def test_text_that_breaks_careless_relays_arrives_and_is_kept(chat: int, people: dict[str, User]) -> None:
    conversation = create_conversation(user=people["ann"])
    with page_of(people["ann"], chat) as page:
        _, assistant = page.send(conversation, "!garbage")
        frames = page.hear_all(assistant["id"])
    kept = Message.objects.get(pk=assistant["id"])
    assert frames[-1]["state"] == "complete"
    assert kept.content == text_of(frames)
    assert "<script>alert(1)</script>" in kept.content
    assert "data: [DONE]" in kept.content
    assert "\x00" not in kept.content


# -- whose


def test_what_is_another_persons_is_not_there(chat: int, people: dict[str, User]) -> None:
    conversation = create_conversation(user=people["ann"])
    with page_of(people["ann"], chat) as ann, page_of(people["bob"], chat) as bob:
        _, assistant = ann.send(conversation, "!tokens 40 !slow 0.05")
        for frame in (
            {"type": "attach", "message": assistant["id"], "after": "0"},
            {"type": "stop", "message": assistant["id"]},
            {"type": "regenerate", "message": assistant["id"]},
            {"type": "send", "conversation": str(conversation.pk), "content": "mine now"},
        ):
            bob.say(**frame)
            heard = bob.hear()
            assert heard["type"] == "error"
            assert heard["text"].startswith("There is no such")
        own = create_conversation(user=people["bob"])
        bob.say(type="send", conversation=str(own.pk), content="hi", parent=assistant["id"])
        assert bob.hear()["text"] == "There is no such message."
        assert bob.client.get(f"/chat/api/conversations/{conversation.pk}").status_code == 404
        assert ann.hear_all(assistant["id"])[-1]["state"] == "complete"
    assert Message.objects.count() == 2


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1", "https://127.0.0.1", None]
)
def test_a_foreign_page_gets_no_socket(chat: int, people: dict[str, User], origin: str | None) -> None:
    with (
        pytest.raises(websockets.exceptions.InvalidStatus) as refused,
        page_of(people["ann"], chat, origin=origin),
    ):
        pass
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize("cookie", [None, "sessionid=nothing", "sessionid=", "other=1"])
def test_who_is_not_logged_in_gets_no_socket(chat: int, people: dict[str, User], cookie: str | None) -> None:
    headers = {"Cookie": cookie} if cookie else None
    with (
        pytest.raises(websockets.exceptions.InvalidStatus) as refused,
        page_of(people["ann"], chat, additional_headers=headers),
    ):
        pass
    assert refused.value.response.status_code == 403


def test_a_wrong_host_or_path_gets_no_socket(chat: int, people: dict[str, User]) -> None:
    for url, host in (
        ("/chat/ws", "evil.example"),
        ("/chat/other", f"127.0.0.1:{chat}"),
        ("/v1/x", "localhost"),
    ):
        with socket.create_connection(("127.0.0.1", chat), timeout=5) as connected:
            connected.sendall(
                f"GET {url} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nConnection: Upgrade\r\n"
                "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
            )
            assert connected.recv(4096).startswith(b"HTTP/1.1 403")


def test_an_origin_is_ours_only_if_it_names_the_very_host() -> None:
    def ask(origin: str, host: str) -> bool:
        return origin_is_ours([(b"host", host.encode()), (b"origin", origin.encode())])

    assert ask("https://chat.example", "chat.example")
    assert ask("https://chat.example", "chat.example:443")
    assert ask("http://Chat.example:8000", "chat.example:8000")
    assert not ask("https://chat.example.evil", "chat.example")
    assert not ask("file://chat.example", "chat.example")
    assert not ask("https://", "")
    assert not ask("http://chat.example:8001", "chat.example:8000")
    assert not origin_is_ours([(b"host", b"a"), (b"origin", b"http://a"), (b"origin", b"http://b")])


@pytest.mark.parametrize("change", ["disabled", "logged out", "password"])
def test_a_person_who_may_no_more_is_cut_off(
    people: dict[str, User], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    assert bounds.USER_CHECK_SECONDS < 5
    monkeypatch.setattr(ChatSocket, "check_seconds", 0.2)
    ann = people["ann"]
    with gateway() as (port, _), page_of(ann, port) as page:
        if change == "disabled":
            User.objects.filter(pk=ann.pk).update(is_active=False)
        elif change == "logged out":
            page.client.logout()
        else:
            ann.set_password("another password")
            ann.save()
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            page.hear()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4401


def test_f56_the_answer_of_a_person_who_is_disabled_ends_with_what_there_is(
    chat: int, people: dict[str, User]
) -> None:
    ann, bob = people["ann"], people["bob"]
    ours, theirs = create_conversation(user=ann), create_conversation(user=bob)
    with page_of(ann, chat) as page, page_of(bob, chat) as other:
        _, assistant = page.send(ours, "!tokens 2000 !slow 0.02")
        _, untouched = other.send(theirs, "!tokens 2000 !slow 0.02")
        page.hear_all(assistant["id"], until=lambda frame: bool(frame.get("text")))
        began = time.monotonic()
        ann.is_active = False
        ann.save()
        saved = eventually(
            lambda: Message.objects.exclude(state=MessageState.GENERATING).filter(pk=assistant["id"]).first(),
            "the answer has ended",
        )
        assert time.monotonic() - began < 5
        assert (saved.state, bool(saved.content)) == (MessageState.INTERRUPTED, True)
        assert "not valid any more" in saved.error
        assert Message.objects.get(pk=untouched["id"]).state == MessageState.GENERATING
        other.say(type="stop", message=untouched["id"])
        other.hear_all(untouched["id"])


# -- bounds


def test_frames_that_are_none_are_told_and_the_socket_goes_on(chat: int, people: dict[str, User]) -> None:
    conversation = create_conversation(user=people["ann"])
    mine = str(conversation.pk)
    with page_of(people["ann"], chat) as page:
        for frame in (
            "{",
            "[]",
            '{"type":"nothing"}',
            '{"type":"send"}',
            '{"type":"send","conversation":"x","content":"y"}',
            json.dumps({"type": "send", "conversation": mine, "content": "x", "user_id": 1}),
            json.dumps({"type": "send", "conversation": mine, "content": "  \n"}),
            json.dumps({"type": "send", "conversation": mine, "content": "a\x00b"}),
            json.dumps({"type": "send", "conversation": mine, "content": "a" * 200_001}),
            json.dumps({"type": "attach", "message": mine, "after": "-1"}),
            "[" * 100_000,
            b"binary",
        ):
            page.socket.send(frame)
            assert page.hear()["type"] == "error"
        assert not Message.objects.exists()
        _, assistant = page.send(conversation, "hello")
        page.hear_all(assistant["id"])


def test_a_frame_beyond_the_bound_ends_the_socket(chat: int, people: dict[str, User]) -> None:
    with page_of(people["ann"], chat) as page:
        page.socket.send('"' + "a" * (WEBSOCKETS["ws_max_size"] - 2) + '"')
        assert page.hear()["type"] == "error"
        page.socket.send('"' + "a" * WEBSOCKETS["ws_max_size"] + '"')
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            page.hear()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009


def test_a_page_that_speaks_too_fast_is_slowed_and_then_cut_off(chat: int, people: dict[str, User]) -> None:
    with page_of(people["ann"], chat) as page:
        for _ in range(60):
            page.say(type="detach", message="00000000-0000-4000-8000-000000000000")
        assert "slow down" in page.hear()["text"]
        for _ in range(bounds.FRAMES_REFUSED):
            page.say(type="detach", message="00000000-0000-4000-8000-000000000000")
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            page.hear_all("nothing")


def test_an_eleventh_page_is_told_why_it_is_closed(chat: int, people: dict[str, User]) -> None:
    with contextlib.ExitStack() as stack:
        pages = [stack.enter_context(page_of(people["ann"], chat)) for _ in range(bounds.SOCKETS_PER_USER)]
        with page_of(people["ann"], chat) as one_more:
            assert "close one" in one_more.hear()["text"]
            with pytest.raises(websockets.exceptions.ConnectionClosed):
                one_more.hear()
        with page_of(people["bob"], chat) as other:
            other.say(type="stop", message=str(other.user.pk))
            assert other.hear()["type"] == "error"
        pages[0].socket.close()

        def there_is_room() -> bool:
            with page_of(people["ann"], chat) as again:
                again.say(type="nothing")
                return "close one" not in again.hear()["text"]

        eventually(there_is_room, "a place is free again")


# -- parts that are away


@pytest.mark.parametrize("url", [None, NOWHERE])
def test_without_redis_answers_still_stream(people: dict[str, User], url: str | None) -> None:
    conversation = create_conversation(user=people["ann"])
    with gateway(url) as (port, _), page_of(people["ann"], port) as page:
        _, assistant = page.send(conversation, "!tokens 20 !slow 0.06")
        frames = page.hear_all(assistant["id"])
        assert len(frames) > 10
        assert frames[-1]["state"] == "complete"
        page.say(type="attach", message=assistant["id"], after=frames[4]["seq"])
        assert text_of(frames[:5]) + text_of(page.hear_all(assistant["id"])) == text_of(frames)


def test_without_redis_a_second_gateway_follows_from_the_database(people: dict[str, User]) -> None:
    conversation = create_conversation(user=people["ann"])
    with gateway() as (port, _), gateway() as (other, _), page_of(people["ann"], port) as page:
        _, assistant = page.send(conversation, "!tokens 70 !slow 0.05")
        with page_of(people["ann"], other) as elsewhere:
            elsewhere.say(type="attach", message=assistant["id"], after="0")
            there = elsewhere.hear_all(assistant["id"])
        here = page.hear_all(assistant["id"])
    assert text_of(there) == text_of(here)
    assert len(there) >= 2


def test_redis_may_go_and_come_back_empty_in_mid_answer(people: dict[str, User], tmp_path: Path) -> None:
    binary = shutil.which("redis-server")
    if binary is None:
        services.missing("no redis-server is installed")
    port_of_redis = services.free_port()
    command = [
        binary,
        "--port",
        str(port_of_redis),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        str(tmp_path),
    ]
    url = f"redis://127.0.0.1:{port_of_redis}/0"
    conversation = create_conversation(user=people["ann"])
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with gateway(url) as (one, _), gateway(url) as (other, _), page_of(people["ann"], one) as page:
            _, assistant = page.send(conversation, "!tokens 120 !slow 0.04")
            with page_of(people["ann"], other) as elsewhere:
                elsewhere.say(type="attach", message=assistant["id"], after="0")
                there = elsewhere.hear_all(assistant["id"], lambda frame: True)
                server.kill()
                server.wait(10)
                there += elsewhere.hear_all(assistant["id"], lambda frame: True)
                server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
                there += elsewhere.hear_all(assistant["id"])
            here = page.hear_all(assistant["id"])
    finally:
        server.kill()
        server.wait(10)
    assert here[-1]["state"] == there[-1]["state"] == "complete"
    assert here[-1]["completion_tokens"] == 120
    assert text_of(there) == text_of(here)


def test_the_log_in_redis_ends_by_itself(chat: int, people: dict[str, User], redis_url: str) -> None:
    conversation = create_conversation(user=people["ann"])
    with page_of(people["ann"], chat) as page:
        _, assistant = page.send(conversation, "!tokens 8 !slow 0.06")
        page.hear_all(assistant["id"])
    with redis.Redis.from_url(redis_url) as client:
        keys = eventually(lambda: list(client.scan_iter(f"*{assistant['id']}")), "the log is there")
        assert 0 < client.ttl(keys[0]) <= 3600
        eventually(lambda: b"e" in client.xrevrange(keys[0], count=1)[0][1], "its end is there")
        client.delete(*keys)


def test_an_answer_whose_gateway_died_is_interrupted_and_keeps_its_text(
    people: dict[str, User], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webchat.runner.ORPHANS_SECONDS", 0.2)
    conversation = create_conversation(user=people["ann"])
    said = Message.objects.create(conversation=conversation, position=0, role="user", content="hi")
    lost = Message.objects.create(
        conversation=conversation,
        parent=said,
        position=0,
        role="assistant",
        content="Once upon",
        state=MessageState.GENERATING,
        gateway="gone",
        alive_at="2020-01-01T00:00:00Z",
    )
    key = AnswerLog(redis_url)._key(lost.pk)
    with redis.Redis.from_url(redis_url) as client:
        # The log had more than the database: an entry reaches back into what is known.
        client.xadd(key, {"t": "upon a time"}, id="16-0")
        with gateway(redis_url) as (port, _), page_of(people["ann"], port) as page:
            page.say(type="attach", message=str(lost.pk), after="0")
            frames = page.hear_all(str(lost.pk))
        client.delete(key)
    assert frames[-1]["state"] == "interrupted"
    assert "Regenerate" in frames[-1]["error"]
    assert text_of(frames) == "Once upon a time"
    lost.refresh_from_db()
    assert (lost.state, lost.content) == (MessageState.INTERRUPTED, "Once upon a time")


def test_a_gateway_that_ends_keeps_what_was_written(
    people: dict[str, User], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webchat.runner.STOP_SECONDS", 0.3)
    conversation = create_conversation(user=people["ann"])
    with gateway(redis_url) as (port, _), page_of(people["ann"], port) as page:
        _, assistant = page.send(conversation, "!tokens 500 !slow 0.05")
        frames = page.hear_all(assistant["id"], lambda frame: True)
    kept = Message.objects.get(pk=assistant["id"])
    assert kept.state == MessageState.INTERRUPTED
    assert kept.content.startswith(text_of(frames))
    assert kept.error
    event = UsageEvent.objects.get(request_id=kept.request_id)
    assert event.outcome == Outcome.INTERRUPTED
    assert event.completion_tokens >= 1


def test_an_answer_of_a_deleted_conversation_ends(chat: int, people: dict[str, User], worker: Worker) -> None:
    conversation = create_conversation(user=people["ann"])
    with page_of(people["ann"], chat) as page:
        _, assistant = page.send(conversation, "!tokens 500 !slow 0.03")
        page.hear_all(assistant["id"], lambda frame: True)
        assert page.client.delete(f"/chat/api/conversations/{conversation.pk}").status_code == 204
        assert page.hear_all(assistant["id"])[-1]["state"] == "stopped"
    eventually(lambda: worker.load()["running"] == 0, "the engine stopped")
    assert not Message.objects.exists()
    eventually(lambda: UsageEvent.objects.count() == 1, "the ledger has it all the same")


def test_what_was_written_is_saved_at_least_every_two_seconds(chat: int, people: dict[str, User]) -> None:
    conversation = create_conversation(user=people["ann"])
    with page_of(people["ann"], chat) as page:
        _, assistant = page.send(conversation, "!tokens 300 !slow 0.02")
        saved = eventually(
            lambda: Message.objects.filter(pk=assistant["id"]).exclude(content="").first(),
            "a draft is saved",
            seconds=3.5,
        )
        assert saved.state == MessageState.GENERATING
        assert saved.alive_at is not None
        page.say(type="stop", message=assistant["id"])
        page.hear_all(assistant["id"])


def test_the_chat_works_under_daphne_too(people: dict[str, User], tmp_path: Path) -> None:
    conversation = create_conversation(user=people["ann"])
    port = services.free_port()
    command = ("-m", "daphne", "-b", "127.0.0.1", "-p", str(port), "-v", "0", "config.asgi:application")
    with process_serving(*command, port=port, data=tmp_path):
        with pytest.raises(websockets.exceptions.InvalidStatus):
            page_of(people["ann"], port, origin="http://evil.example").__enter__()
        with page_of(people["ann"], port) as page:
            _, assistant = page.send(conversation, "!tokens 20 !slow 0.06")
            frames = page.hear_all(assistant["id"])
    assert len(frames) > 10
    assert frames[-1]["state"] == "complete"


def test_the_runner_says_that_it_accepts_nothing_before_its_start() -> None:
    front = make_application()
    assert isinstance(front.chat.runner, ChatRunner)
    assert not front.chat.runner.accepting


def test_a_page_hears_its_place_while_all_workers_are_busy(people: dict[str, User], redis_url: str) -> None:
    DeploymentRevision.objects.update(slots=1)
    one, other = create_conversation(user=people["ann"]), create_conversation(user=people["ann"])
    with (
        gateway(redis_url) as (port, _),
        page_of(people["ann"], port) as page,
        page_of(people["ann"], port) as second,
    ):
        _, busy = page.send(one, "!tokens 40 !slow 0.05")
        page.hear_all(busy["id"], lambda frame: frame["type"] == "delta")
        _, waiting = second.send(other, "!tokens 2")
        frames = second.hear_all(waiting["id"])
    assert (frames[0]["type"], frames[0]["ahead"], frames[0]["seconds"]) == ("waiting", 0, None)
    assert [frame["type"] for frame in frames].count("delta") >= 1
    assert frames[-1]["state"] == "complete"
