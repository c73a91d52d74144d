"""A conversation at the terminal: what is part of it, what is kept, what a file may hold."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from config.asking import Answer, Unanswered
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
