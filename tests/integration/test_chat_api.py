"""The chat page's JSON API, its page, and logging in."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from pytest_django import DjangoAssertNumQueries

from registry.states import WorkerState
from tests.factories import make_deployment, make_worker
from webchat import login
from webchat.actions import Draft, create_conversation, finish, regenerate, save_drafts, send
from webchat.errors import NotNow
from webchat.models import Conversation, Message, MessageState
from webchat.views import POLICY

pytestmark = pytest.mark.django_db

API = "/chat/api/conversations"


@pytest.fixture
def ann() -> User:
    return User.objects.create_user("ann", password="a password")


@pytest.fixture
def page(ann: User) -> Client:
    client = Client()
    client.force_login(ann)
    return client


def say(user: User, conversation: Conversation, content: str, answer: str | None = "yes") -> Message:
    """A message and its answer, written at once; without an answer it is being written."""
    job = send(
        user_id=user.pk,
        conversation_id=conversation.pk,
        content=content,
        parent=Conversation.objects.get(pk=conversation.pk).leaf_id,
        model="org/sim",
        gateway="g",
    )
    if answer is not None:
        draft = Draft(content=answer, state=MessageState.COMPLETE)
        finish(gateway="g", message_id=job.message_id, draft=draft)
    return Message.objects.get(pk=job.message_id)


def patch(client: Client, conversation: Conversation, **change: Any) -> Any:
    return client.patch(f"{API}/{conversation.pk}", json.dumps(change), content_type="application/json")


def test_a_conversation_is_made_listed_renamed_and_deleted(page: Client, ann: User) -> None:
    made = page.post(API, json.dumps({"model": "org/sim"}), content_type="application/json")
    assert made.status_code == 201
    assert set(made.json()) == {
        *("id", "title", "model", "settings", "created_at", "updated_at", "messages", "leaf")
    }
    assert (made.json()["model"], made.json()["messages"], made.json()["leaf"]) == ("org/sim", [], None)
    conversation = Conversation.objects.get()
    assert (
        patch(page, conversation, title="  Trains \n and stations ").json()["title"] == "Trains and stations"
    )
    listed = page.get(API).json()["conversations"]
    assert [(one["id"], one["title"], one["model"]) for one in listed] == [
        (str(conversation.pk), "Trains and stations", "org/sim")
    ]
    assert page.delete(f"{API}/{conversation.pk}").status_code == 204
    assert page.get(API).json() == {"conversations": []}
    assert page.get(f"{API}/{conversation.pk}").status_code == 404


def test_the_list_is_newest_first_and_searched_in_titles_and_text(page: Client, ann: User) -> None:
    old, new = create_conversation(user=ann, model="m"), create_conversation(user=ann, model="m")
    say(ann, old, "The speed of a Locomotive")
    say(ann, new, "Recipes", answer="Bread, not locomotives.")
    say(ann, create_conversation(user=ann, model="m"), "Weather")

    def found(query: str) -> list[str]:
        return [one["id"] for one in page.get(API, {"q": query}).json()["conversations"]]

    assert len(found("")) == 3
    assert found("locomotive") == [str(new.pk), str(old.pk)]
    assert found("recipes") == [str(new.pk)]
    assert found("nowhere") == found("%") == []
    assert len(found("\x00")) == 3


def test_the_first_message_gives_a_title_of_at_most_60_characters(ann: User) -> None:
    conversation = create_conversation(user=ann, model="m")
    say(ann, conversation, "How  do\nI " + "fix a boiler " * 20)
    conversation.refresh_from_db()
    assert conversation.title == "How do I fix a boiler fix a boiler fix a boiler fix a…"
    assert len(conversation.title) <= 60
    say(ann, conversation, "Another question")
    conversation.refresh_from_db()
    assert conversation.title.startswith("How do I")


def test_a_branch_is_chosen_to_its_newest_end(page: Client, ann: User) -> None:
    conversation = create_conversation(user=ann, model="m")
    first = say(ann, conversation, "one")
    second = say(ann, conversation, "two")
    other = regenerate(user_id=ann.pk, message_id=first.pk, model=None, gateway="g")
    conversation.refresh_from_db()
    assert conversation.leaf_id == other.message_id
    assert patch(page, conversation, leaf=str(first.pk)).json()["leaf"] == str(second.pk)
    assert patch(page, conversation, leaf=str(other.message_id)).json()["leaf"] == str(other.message_id)
    assert patch(page, conversation, leaf=str(uuid.uuid4())).status_code == 404
    strange = say(ann, create_conversation(user=ann, model="m"), "else")
    assert patch(page, conversation, leaf=str(strange.pk)).status_code == 404


def test_settings_keep_what_was_given_and_name_what_is_wrong(page: Client, ann: User) -> None:
    conversation = create_conversation(user=ann, model="m")
    given = {"system": "Be brief.", "temperature": 0.5, "top_p": 1, "max_tokens": 100}
    assert patch(page, conversation, settings=given).json()["settings"] == given
    fewer = {"system": "", "temperature": None, "top_p": 0.9}
    assert patch(page, conversation, settings=fewer).json()["settings"] == {"top_p": 0.9}
    for wrong, name in (
        ({"settings": {"temperature": 3}}, "settings.temperature"),
        ({"settings": {"system": "a\x00"}}, "settings.system"),
        ({"settings": {"other": 1}}, "settings"),
        ({"title": " "}, "title"),
        ({"title": "x" * 201}, "title"),
        ({"leaf": "x"}, "leaf"),
        ({"user": 1}, "user"),
        ({"user_id": 1}, "user_id"),
        ({"id": str(uuid.uuid4())}, "id"),
        ({"model": ""}, "model"),
    ):
        answer = patch(page, conversation, **wrong)
        assert answer.status_code == 400
        assert name in answer.json()["error"]["message"]
    for body in ("{", "[]", "[" * 50_000, '"x"'):
        bad = page.patch(f"{API}/{conversation.pk}", body, content_type="application/json")
        assert bad.status_code == 400
        assert bad.json()["error"]["message"]
    assert Conversation.objects.get().settings == {"top_p": 0.9}
    big = page.post(API, "x" * 200_000, content_type="application/json")
    assert (big.status_code, "larger" in big.json()["error"]["message"]) == (400, True)


def test_what_is_another_persons_is_not_there(page: Client, ann: User) -> None:
    bob = User.objects.create_superuser("bob")
    theirs = create_conversation(user=bob, model="m")
    said = say(bob, theirs, "a secret")
    mine = create_conversation(user=ann, model="m")
    before = list(Conversation.objects.order_by("pk").values())
    assert page.get(f"{API}/{theirs.pk}").status_code == 404
    assert patch(page, theirs, title="mine now").status_code == 404
    assert patch(page, mine, leaf=str(said.pk)).status_code == 404
    assert page.delete(f"{API}/{theirs.pk}").status_code == 404
    assert page.get(f"/chat/{theirs.pk}/").status_code == 404
    assert page.get(API, {"q": "secret"}).json() == {"conversations": []}
    assert list(Conversation.objects.order_by("pk").values()) == before
    # Nor is being an administrator a reason to read along.
    administrator = Client()
    administrator.force_login(bob)
    assert administrator.get(f"{API}/{mine.pk}").status_code == 404


def test_who_is_not_logged_in_gets_401_or_the_login_page(ann: User) -> None:
    conversation = create_conversation(user=ann, model="m")
    nobody = Client()
    for method, path in (
        ("get", API),
        ("post", API),
        ("get", f"{API}/{conversation.pk}"),
        ("patch", f"{API}/{conversation.pk}"),
        ("delete", f"{API}/{conversation.pk}"),
        ("get", "/chat/api/models"),
        ("get", "/chat/api/other"),
    ):
        answer = getattr(nobody, method)(path)
        assert answer.status_code == 401
        assert answer.json()["error"]["message"]
    for path in ("/chat/", f"/chat/{conversation.pk}/"):
        answer = nobody.get(path)
        assert (answer.status_code, answer["Location"]) == (302, f"/login/?next={path}")


def test_a_change_needs_the_pages_token(ann: User) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(ann)
    conversation = create_conversation(user=ann, model="m")
    assert client.post(API).status_code == 403
    assert client.delete(f"{API}/{conversation.pk}").status_code == 403
    client.get("/chat/")
    token = client.cookies["csrftoken"].value
    assert client.delete(f"{API}/{conversation.pk}", headers={"X-CSRFToken": token}).status_code == 204


def test_the_page_has_a_strict_policy_and_the_root_leads_to_it(page: Client, ann: User) -> None:
    conversation = create_conversation(user=ann, model="m")
    for path in ("/chat/", f"/chat/{conversation.pk}/"):
        answer = page.get(path)
        assert answer.status_code == 200
        assert answer["Content-Security-Policy"] == POLICY
        assert "csrftoken" in answer.cookies
    assert "require-trusted-types-for 'script'" in POLICY
    assert "unsafe" not in POLICY
    assert page.get("/")["Location"] == page.get("/chat")["Location"] == "/chat/"
    assert page.post("/chat/").status_code == 405
    assert page.put(API).json()["error"]["message"] == "Method PUT is not allowed here."
    assert page.get("/chat/api/other").status_code == 404


def test_the_picker_lists_models_that_chat_with_their_state(page: Client) -> None:
    make_worker(deployment=make_deployment(route="a/ready"), capabilities=["endpoint:chat", "stop"])
    make_worker(deployment=make_deployment(route="b/embeds"), capabilities=["endpoint:embeddings"])
    make_worker(
        deployment=make_deployment(route="c/loads"),
        state=WorkerState.LOADING,
        progress_step="loading weights",
        progress_done=43,
        progress_total=100,
    )
    make_deployment(route="d/stopped", replicas=0)
    assert page.get("/chat/api/models").json() == {
        "models": [
            {"name": "a/ready", "state": "ready", "detail": ""},
            {"name": "c/loads", "state": "starting", "detail": "loading weights, 43 %"},
            {"name": "d/stopped", "state": "stopped", "detail": "scaled to 0"},
        ]
    }


def test_the_number_of_queries_does_not_grow_with_what_is_shown(
    page: Client, ann: User, django_assert_max_num_queries: DjangoAssertNumQueries
) -> None:
    for number in range(8):
        make_worker(deployment=make_deployment(route=f"m{number}"))
        conversation = create_conversation(user=ann, model="m")
        for _ in range(3):
            say(ann, conversation, "hello")
    with django_assert_max_num_queries(12):
        page.get("/chat/api/models")
    with django_assert_max_num_queries(3):
        page.get(API)
    with django_assert_max_num_queries(4):
        page.get(f"{API}/{conversation.pk}")


def test_a_draft_that_comes_after_the_end_changes_nothing(ann: User) -> None:
    conversation = create_conversation(user=ann, model="m")
    answer = say(ann, conversation, "hello", answer="whole")
    late = Draft(content="who")
    save_drafts(gateway="g", drafts={answer.pk: late}, alive=[answer.pk])
    answer.refresh_from_db()
    assert (answer.content, answer.state) == ("whole", MessageState.COMPLETE)


def test_one_person_has_a_bounded_number_of_answers_being_written(ann: User) -> None:
    for _ in range(8):
        say(ann, create_conversation(user=ann, model="m"), "hello", answer=None)
    with pytest.raises(NotNow, match="8 answers are being written"):
        say(ann, create_conversation(user=ann, model="m"), "hello")


# -- logging in


def test_a_person_logs_in_and_out(ann: User) -> None:
    client = Client()
    assert client.get("/login/").status_code == 200
    answer = client.post("/login/", {"username": "ann", "password": "a password", "next": "/chat/"})
    assert (answer.status_code, answer["Location"]) == (302, "/chat/")
    assert client.get("/chat/").status_code == 200
    assert client.get("/login/")["Location"] == "/chat/"
    assert client.get("/logout/").status_code == 405
    assert client.post("/logout/")["Location"] == "/login/"
    assert client.get(API).status_code == 401


@pytest.mark.parametrize("to", ["https://evil.example/", "//evil.example", "/\\evil.example", "javascript:x"])
def test_logging_in_leads_nowhere_else(ann: User, to: str) -> None:
    answer = Client().post("/login/", {"username": "ann", "password": "a password", "next": to})
    assert answer["Location"] == "/chat/"


def test_five_wrong_passwords_close_the_door_for_a_while(ann: User, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()

    def attempt(password: str, name: str = "ann", address: str = "10.0.0.1") -> Any:
        return client.post("/login/", {"username": name, "password": password}, REMOTE_ADDR=address)

    for _ in range(5):
        assert attempt("wrong").status_code == 200
    refused = attempt("a password", name="ANN")
    assert refused.status_code == 429
    assert 0 < int(refused["Retry-After"]) <= 15 * 60
    assert "Too many wrong passwords" in refused.content.decode()
    # Not for another name, nor for the same person from elsewhere.
    assert attempt("wrong", name="bob").status_code == 200
    assert attempt("a password", address="10.0.0.2").status_code == 302
    client.logout()
    monkeypatch.setattr(login, "OF_NAME", login.Bound(5, 0.0))
    assert attempt("a password").status_code == 302
