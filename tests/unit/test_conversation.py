"""A conversation at the terminal: what is part of it, what is kept, what a file may hold."""

from __future__ import annotations

import io
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from config.asking import Answer, Api, Unanswered
from config.conversation import Conversation, Unusable
from config.management.commands.chat import _message


class Scripted:
    """Answers with the next text of its list; None is no answer."""

    def __init__(self, *texts: str | None) -> None:
        self.texts = list(texts)
        self.asked: list[list[dict[str, str]]] = []

    def chat(self, model: str, messages: list[dict[str, str]], **_: Any) -> Iterator[Answer]:
        self.asked.append(messages)
        text = self.texts.pop(0)
        if text is None:
            raise Unanswered("Overloaded.", 503)
        answer = Answer()
        for word in text.split():
            answer.text = f"{answer.text} {word}".strip()
            yield answer


def talk(*texts: str | None, system: str = "") -> tuple[Conversation, Scripted]:
    api = Scripted(*texts)
    return Conversation(api, "m", system, {}), api  # type: ignore[arg-type]


def said(conversation: Conversation) -> list[str]:
    return [one["content"] for one in conversation.said]


def test_another_answer_takes_the_place_of_the_first():
    conversation, api = talk("one", "two", "three", system="Be brief.")
    with pytest.raises(LookupError):
        conversation.ask_again()
    list(conversation.ask("a"))
    list(conversation.ask("b"))
    list(conversation.ask_again())
    assert said(conversation) == ["a", "one", "b", "three"]
    assert api.asked[-1] == api.asked[-2]
    assert api.asked[-1][0] == {"role": "system", "content": "Be brief."}


def test_the_answer_before_stays_when_no_other_comes():
    conversation, _ = talk("one", None)
    list(conversation.ask("a"))
    with pytest.raises(Unanswered):
        list(conversation.ask_again())
    assert said(conversation) == ["a", "one"]


def test_a_message_without_an_answer_can_be_asked_again():
    conversation, api = talk("one", None, "two")
    list(conversation.ask("a"))
    with pytest.raises(Unanswered):
        list(conversation.ask("b"))
    assert said(conversation) == ["a", "one"]
    list(conversation.ask_again())
    assert said(conversation) == ["a", "one", "b", "two"]
    assert [one["content"] for one in api.asked[-1]] == ["a", "one", "b"]


def test_a_message_that_was_said_before_is_not_taken_for_the_one_without_an_answer():
    conversation, api = talk("one", None, "two")
    list(conversation.ask("a"))
    with pytest.raises(Unanswered):
        list(conversation.ask("a"))
    list(conversation.ask_again())
    assert said(conversation) == ["a", "one", "a", "two"]
    assert [one["content"] for one in api.asked[-1]] == ["a", "one", "a"]


def test_what_came_before_a_stop_is_what_was_said():
    conversation, _ = talk("one two three")
    pieces = conversation.ask("a")
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert said(conversation) == ["a", "one"]


def test_a_conversation_is_kept_and_gone_on_with(tmp_path: Path):
    path = tmp_path / "kept.json"
    conversation, _ = talk("one", "two", system="Be brief.")
    list(conversation.ask("a"))
    conversation.save(path)
    list(conversation.ask("b"))
    conversation.save(path)  # its own file: it is written anew
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    other, _ = talk("three")
    other.load(path)
    assert (said(other), other.system) == (["a", "one", "b", "two"], "Be brief.")
    list(other.ask_again())
    assert said(other) == ["a", "one", "b", "three"]


def test_half_a_character_is_kept_too(tmp_path: Path):
    conversation, _ = talk("half \ud83d of it, ü")
    list(conversation.ask("a"))
    conversation.save(tmp_path / "kept.json")
    assert "ü" in (tmp_path / "kept.json").read_text(encoding="utf-8")
    other, _ = talk()
    other.load(tmp_path / "kept.json")
    assert said(other) == said(conversation)


def test_a_file_of_something_else_is_left_alone(tmp_path: Path):
    path = tmp_path / "thesis.txt"
    path.write_text("all of it")
    conversation, _ = talk("one")
    with pytest.raises(Unusable, match="exists already"):
        conversation.save(path)
    assert path.read_text() == "all of it"
    with pytest.raises(Unusable, match="cannot be written"):
        conversation.save(tmp_path / "no" / "folder.json")


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[]",
        json.dumps({"messages": []}),
        json.dumps({"system": "", "messages": [{"role": "user", "content": "alone"}]}),
        json.dumps({"system": "", "messages": [{"role": "system", "content": "a"}] * 2}),
        json.dumps({"system": 1, "messages": []}),
        json.dumps({"system": "", "messages": [{"role": "user"}]}),
        "[" * 200_000,
    ],
)
def test_what_is_no_conversation_is_not_loaded(tmp_path: Path, content: str):
    path = tmp_path / "file.json"
    path.write_text(content)
    conversation, _ = talk("one")
    list(conversation.ask("a"))
    with pytest.raises(Unusable, match="no saved conversation"):
        conversation.load(path)
    assert said(conversation) == ["a", "one"]
    with pytest.raises(Unusable, match="cannot be read"):
        conversation.load(tmp_path / "missing.json")


def test_servers_that_write_null_and_errors_as_text_are_understood(monkeypatch: pytest.MonkeyPatch):
    lines = [
        b'data: {"choices": null, "error": null}\n',
        b'data: {"choices": [{"delta": null}]}\n',
        b'data: {"choices": [{"delta": {"content": "one"}}]}\n',
        b'data: {"error": "Overloaded."}\n',
    ]
    monkeypatch.setattr(Api, "_send", lambda *_: (io.BytesIO(), lines))
    pieces = Api("http://127.0.0.1:9/v1", "sk").chat("m", [])
    assert next(pieces).text == "one"
    with pytest.raises(Unanswered, match="Overloaded"):
        next(pieces)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "http://[::1/v1", "http://host:99999/v1", "http://host:x/v1"]
)
def test_a_url_that_is_none_is_refused_in_a_sentence(url: str):
    with pytest.raises(Unanswered, match="must be like"):
        Api(url, "sk")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["  hello "], "hello"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""', "one", "", "  two", '"""'], "one\n\n  two"),
        (['"""one', 'two"""'], "one\ntwo"),
        (['"""one"""'], "one"),
    ],
)
def test_a_message_may_be_of_several_lines(
    monkeypatch: pytest.MonkeyPatch, typed: list[str], message: str
) -> None:
    lines = iter(typed)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert _message(at_terminal=True) == message
    assert next(lines, None) is None
