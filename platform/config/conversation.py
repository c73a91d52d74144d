"""A conversation at the terminal: what was said, asking again, and a file of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config.asking import Answer, Api

LARGEST_FILE = 16 * 1024 * 1024
_ROLES = ("user", "assistant")


class Unusable(Exception):
    """A file that cannot be saved to or loaded, in a sentence."""


class Conversation:
    """What was said so far. A message that got no answer is not part of it, but can be asked again."""

    def __init__(self, api: Api, model: str, system: str, sampling: dict[str, Any]) -> None:
        self.api = api
        self.model = model
        self.system = system
        self._sampling = sampling
        self.said: list[dict[str, str]] = []
        self._asked = ""
        self._place = 0
        """Of the last question in `said`, whether it got an answer or not."""
        self._file: Path | None = None

    def reset(self) -> None:
        self.said.clear()
        self._asked, self._place = "", 0

    def ask(self, text: str) -> Iterator[Answer]:
        """Yield the growing answer; closed early, what came so far is what was said. Raises Unanswered."""
        self._asked, self._place = text, len(self.said)
        asked = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        pieces = self.api.chat(self.model, [*system, *self.said, asked], **self._sampling)
        answer = Answer()
        try:
            for answer in pieces:
                yield answer
        finally:
            pieces.close()  # type: ignore[attr-defined]
            if answer.text:
                self.said += [asked, {"role": "assistant", "content": answer.text}]

    def ask_again(self) -> Iterator[Answer]:
        """Another answer to the last message; the one before stays when none comes. Raises LookupError when
        nothing was asked."""
        if not self._asked:
            raise LookupError
        return self._again()

    def _again(self) -> Iterator[Answer]:
        before = self.said[self._place :]
        del self.said[self._place :]
        try:
            yield from self.ask(self._asked)
        finally:
            if len(self.said) == self._place:
                self.said += before

    def save(self, path: Path) -> None:
        """Write it to a file that only its owner reads. A file of something else is left alone."""
        whole = {"model": self.model, "system": self.system, "messages": self.said}
        text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
        ours = path.resolve() == self._file
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if ours else os.O_EXCL)
        try:
            # Half a surrogate pair, which no encoding takes, becomes the escape that JSON has for it.
            with open(os.open(path, flags, 0o600), "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except FileExistsError as error:
            raise Unusable(f"{path} exists already") from error
        except OSError as error:
            raise Unusable(f"{path} cannot be written: {error.strerror}") from error
        self._file = path.resolve()

    def load(self, path: Path) -> None:
        """Go on with what a file holds; the model stays the one that is talked to."""
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise Unusable(f"{path} is larger than any conversation")
            whole = json.loads(path.read_text(encoding="utf-8"))
            said = [{"role": one["role"], "content": one["content"]} for one in whole["messages"]]
            system = whole["system"]
        except OSError as error:
            raise Unusable(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Unusable(f"{path} is no saved conversation") from error
        roles = [_ROLES[at % 2] for at in range(len(said))]
        texts = [system, *(one["content"] for one in said)]
        all_text = all(isinstance(text, str) for text in texts)
        if not all_text or len(said) % 2 or [one["role"] for one in said] != roles:
            raise Unusable(f"{path} is no saved conversation")
        self.said, self.system, self._file = said, system, path.resolve()
        self._asked, self._place = (said[-2]["content"], len(said) - 2) if said else ("", 0)
