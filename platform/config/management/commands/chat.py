"""`manage.py chat MODEL`: talk to a model from the terminal, through the public API as any client does."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from config.asking import Answer, Api, Unanswered
from config.first_run import read_credentials
from config.printing import printable

HELP = "/reset starts anew, /system TEXT sets the system prompt, /exit leaves; Ctrl-C stops an answer."


class Command(BaseCommand):
    help = (
        "Talk to a model. Ctrl-C stops the answer, Ctrl-D or /exit ends the program. Input that is no "
        "terminal is taken line by line, each line a message."
    )
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("model", nargs="?", help="Default: the model that `manage.py up` deployed.")
        parser.add_argument("--system", default="", help="The system prompt.")
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
            api = Api(url, key)
        except Unanswered as error:
            raise CommandError(str(error)) from error
        self._talk(_Conversation(api, model, options["system"], sampling))

    def _talk(self, conversation: _Conversation) -> None:
        at_terminal = sys.stdin.isatty()
        if at_terminal:
            with contextlib.suppress(ImportError):
                # Only to be there: input() then has line editing and a history.
                import readline  # noqa: F401
            self.stdout.write(f"{conversation.model}. {HELP}")
        while True:
            try:
                text = self._read(at_terminal)
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
            if command == "/reset":
                conversation.reset()
                self.stdout.write("(a new conversation)")
            elif command == "/system":
                conversation.system = rest.strip()
                conversation.reset()
                self.stdout.write("(a new conversation with this system prompt)")
            elif command in ("/help", "/?"):
                self.stdout.write(HELP)
            elif text:
                self._answer(conversation, text, at_terminal)

    def _read(self, at_terminal: bool) -> str:
        if at_terminal:
            return input("> ").strip()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.strip()

    def _answer(self, conversation: _Conversation, text: str, at_terminal: bool) -> None:
        shown, answer, stopped = 0, Answer(), False
        pieces = conversation.ask(text)
        try:
            for answer in pieces:
                # Text of a model must not command the terminal.
                piece = "".join(char for char in answer.text[shown:] if char in "\n\t" or printable(char))
                shown = len(answer.text)
                self.stdout.write(piece, ending="")
                self.stdout.flush()
        except KeyboardInterrupt:
            stopped = True
        except Unanswered as error:
            if not at_terminal:
                raise CommandError(str(error)) from error
            self.stdout.write(f"({error})")
            return
        finally:
            pieces.close()
        note = f"stopped; {answer.speed()}" if stopped else answer.speed()
        self.stdout.write(f"\n({note})")


class _Conversation:
    """What was said so far. A message that got no answer is not part of it."""

    def __init__(self, api: Api, model: str, system: str, sampling: dict[str, Any]) -> None:
        self.api = api
        self.model = model
        self.system = system
        self._sampling = sampling
        self._said: list[dict[str, str]] = []

    def reset(self) -> None:
        self._said.clear()

    def ask(self, text: str) -> Any:
        """Yield the growing answer; closed early, what came so far is what was said."""
        asked = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        pieces = self.api.chat(self.model, [*system, *self._said, asked], **self._sampling)
        answer = Answer()
        try:
            for answer in pieces:
                yield answer
        finally:
            pieces.close()  # type: ignore[attr-defined]
            if answer.text:
                self._said += [asked, {"role": "assistant", "content": answer.text}]
