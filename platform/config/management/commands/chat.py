"""`manage.py chat MODEL`: talk to a model from the terminal, through the public API as any client does."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from config.asking import Answer, Api, Unanswered
from config.conversation import Conversation, Unusable
from config.first_run import read_credentials
from config.printing import printable

FENCE = '"""'
_COMMAND = re.compile(r"/[a-z?]+")
"""`/usr/bin is where?` is a question."""
SHORT_HELP = "/help tells the commands; Ctrl-C stops an answer, /exit or Ctrl-D leaves."
HELP = f"""\
/regenerate   another answer to the last message
/history      what was said so far
/system TEXT  set the system prompt (empty: none) and begin anew
/reset        begin anew
/save FILE    keep the conversation in a file
/load FILE    go on with one that was kept
/exit         leave
A line that ends with \\ goes on in the next; {FENCE} begins and ends a message of several lines.
Ctrl-C stops an answer and keeps what came; at the prompt it drops what was typed."""


class Command(BaseCommand):
    help = (
        "Talk to a model. Ctrl-C stops the answer, Ctrl-D or /exit ends the program. Input that is no "
        "terminal is taken line by line, each line a message."
    )
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("model", nargs="?", help="Default: the model that `manage.py up` deployed.")
        parser.add_argument("--system", default="", help="The system prompt.")
        parser.add_argument("--load", type=Path, metavar="FILE", help="Go on with a conversation of /save.")
        parser.add_argument(
            "--url", help="Default: this machine's gateway; else such as http://host:8000/v1."
        )
        parser.add_argument("--key", help="API key (default: the first one, from credentials.json).")
        parser.add_argument("--temperature", type=float, help="0 for the same answer each time.")
        parser.add_argument("--max-tokens", type=int, help="Most tokens of an answer.")

    def handle(self, *args: Any, **options: Any) -> None:
        credentials = read_credentials()
        url = options["url"] or (credentials.base_url if credentials else None)
        key = options["key"] or (credentials.api_key if credentials else None)
        model = options["model"] or (credentials.chat_model if credentials else None)
        if url is None or key is None:
            raise CommandError("Roundhouse was not started here yet: give --url and --key.")
        if model is None:
            raise CommandError("Which model? Name one; `manage.py status` shows the routes.")
        sampling = {
            name: options[name] for name in ("temperature", "max_tokens") if options[name] is not None
        }
        try:
            conversation = Conversation(Api(url, key), model, options["system"], sampling)
            if options["load"] is not None:
                conversation.load(options["load"])
        except (Unanswered, Unusable) as error:
            raise CommandError(str(error)) from error
        self._talk(conversation)

    def _talk(self, conversation: Conversation) -> None:
        at_terminal = sys.stdin.isatty()
        if at_terminal:
            with contextlib.suppress(ImportError):
                # Only to be there: input() then has line editing and a history.
                import readline  # noqa: F401
            self.stdout.write(f"{conversation.model}. {SHORT_HELP}")
        while True:
            try:
                text = _message(at_terminal)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not at_terminal:
                    return
                self.stdout.write("\n(/exit or Ctrl-D leaves)")
                continue
            command, _, rest = text.partition(" ")
            if command == "/exit":
                return
            if _COMMAND.fullmatch(command):
                self._obey(conversation, command, rest.strip(), at_terminal)
            elif text:
                self._answer(conversation.ask(text), at_terminal)

    def _obey(self, conversation: Conversation, command: str, rest: str, at_terminal: bool) -> None:
        match command:
            case "/reset":
                conversation.reset()
                self.stdout.write("(a new conversation)")
            case "/system":
                conversation.system = rest
                conversation.reset()
                what = "this" if rest else "no"
                self.stdout.write(f"(a new conversation with {what} system prompt)")
            case "/regenerate":
                try:
                    self._answer(conversation.ask_again(), at_terminal)
                except LookupError:
                    self.stdout.write("(nothing was asked yet)")
            case "/history":
                for one in [{"role": "system", "content": conversation.system}, *conversation.said]:
                    if one["content"]:
                        self.stdout.write(f"{one['role']}: {_shown(one['content'])}")
                self.stdout.write(f"({len(conversation.said)} messages)")
            case "/save" | "/load" if not rest:
                self.stdout.write(f"({command} FILE)")
            case "/save" | "/load":
                try:
                    # Path.expanduser raises for a name that nobody has.
                    path = Path(os.path.expanduser(rest))
                    (conversation.save if command == "/save" else conversation.load)(path)
                    done = "kept in" if command == "/save" else "loaded from"
                    self.stdout.write(f"({len(conversation.said)} messages {done} {rest})")
                except Unusable as error:
                    self.stdout.write(f"({error})")
            case "/help" | "/?":
                self.stdout.write(HELP)
            case _:
                self.stdout.write(f"(no command {command}; {SHORT_HELP})")

    def _answer(self, pieces: Iterator[Answer], at_terminal: bool) -> None:
        shown, answer, stopped = 0, Answer(), False
        try:
            for answer in pieces:
                self.stdout.write(_shown(answer.text[shown:]), ending="")
                self.stdout.flush()
                shown = len(answer.text)
        except KeyboardInterrupt:
            stopped = True
        except Unanswered as error:
            if not at_terminal:
                raise CommandError(str(error)) from error
            after_text = "\n" if shown else ""
            self.stdout.write(f"{after_text}({error})")
            return
        finally:
            pieces.close()  # type: ignore[attr-defined]
        note = f"stopped; {answer.speed()}" if stopped else answer.speed()
        self.stdout.write(f"\n({note})")


def _message(at_terminal: bool) -> str:
    """The next message, which may be of several lines. Raises EOFError, KeyboardInterrupt."""
    text = _line("> ", at_terminal)
    if not at_terminal:
        return text.strip()
    if text.strip().startswith(FENCE):
        lines = [text.strip().removeprefix(FENCE)]
        while not lines[-1].rstrip().endswith(FENCE):
            lines.append(_line(". ", at_terminal))
        lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
        return "\n".join(lines).strip("\n")
    while text.endswith("\\"):
        text = text[:-1] + "\n" + _line(". ", at_terminal)
    return text.strip()


def _line(prompt: str, at_terminal: bool) -> str:
    if at_terminal:
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _shown(text: str) -> str:
    """Text of a model must not command the terminal."""
    return "".join(char for char in text if char in "\n\t" or printable(char))
