"""`manage.py chat` at a real terminal, against a real gateway and engine."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from registry.models import UsageEvent
from tests.api.conftest import ROUTE, Served, Worker, eventually, facts, served, worker

__all__ = ["facts", "served", "worker"]  # the fixtures, found by their names

pytestmark = pytest.mark.django_db(transaction=True)

ROOT = Path(__file__).resolve().parents[2]


class Terminal:
    """A program at the other end of a pseudo-terminal."""

    def __init__(self, *command: str, environment: dict[str, str], folder: Path) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            cwd=folder,
            start_new_session=True,
            preexec_fn=_control_terminal,
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self._ours, text.encode())

    def until(self, pattern: str, seconds: float = 20) -> str:
        """Everything that is shown since the last typing, once the pattern is."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.seen):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} is not in {self.seen!r}"
            if select.select([self._ours], [], [], left)[0]:
                self.seen += os.read(self._ours, 4096).decode(errors="replace")
        return self.seen

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)


def _control_terminal() -> None:
    """The terminal's Ctrl-C reaches the program only when it is its controlling terminal; a shell that has
    begun these tests in the background has told them to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_person_talks_stops_asks_again_and_keeps_it(served: Served, worker: Worker, tmp_path: Path) -> None:
    terminal = Terminal(
        *(sys.executable, str(ROOT / "manage.py"), "chat", ROUTE),
        *("--url", served.base_url, "--key", served.api_key),
        environment={
            **os.environ,
            "TERM": "dumb",
            "ROUNDHOUSE_DATA": str(tmp_path / "data"),
            "DJANGO_SETTINGS_MODULE": "config.settings.production",
        },
        folder=tmp_path,
    )
    try:
        terminal.until(r"/help tells the commands.*\n(.*\n)*.*> ", seconds=60)
        terminal.type("/system Be brief.\n")
        terminal.until(r"with this system prompt\)\r\n> ")

        # Several lines, then Ctrl-C in the answer: it stops here and in the engine, the program goes on.
        terminal.type('"""!tokens 60 !slow 0.03\n')
        terminal.until(r"\. $")
        terminal.type('second line"""\n')
        terminal.until(r'line"""\r\n\w+ \w+ \w+')
        terminal.type("\x03")
        assert "Traceback" not in terminal.until(r"\(stopped; .*\)\r\n> ")
        eventually(lambda: worker.load().get("running", 0) == 0, "the engine stopped", seconds=2)

        # At the prompt Ctrl-C drops what was typed.
        terminal.type("never sent\x03")
        terminal.until(r"Ctrl-D leaves\)\r\n> ")

        terminal.type("/regenerate\n")
        terminal.until(r"\(60 tokens, first after \d+\.\d\d s, \d+\.\d tok/s\)\r\n> ", seconds=30)
        terminal.type("/save kept.json\n")
        terminal.until(r"\(2 messages kept in kept\.json\)\r\n> ")
        terminal.type("/reset\n")
        terminal.until(r"new conversation\)\r\n> ")
        terminal.type("/load kept.json\n")
        terminal.until(r"\(2 messages loaded from kept\.json\)\r\n> ")
        terminal.type("/history\n")
        shown = terminal.until(r"\(2 messages\)\r\n> ")
        assert "system: Be brief." in shown
        assert "user: !tokens 60 !slow 0.03\r\nsecond line" in shown
        terminal.type("/nonsense\n")
        terminal.until(r"no command /nonsense")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.close()
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert [one["role"] for one in kept["messages"]] == ["user", "assistant"]
    assert kept["messages"][0]["content"] == "!tokens 60 !slow 0.03\nsecond line"
    assert len(kept["messages"][1]["content"].split()) == 60
    eventually(lambda: UsageEvent.objects.count() == 2, "both answers are in the ledger")
    cut, whole = UsageEvent.objects.order_by("id").values_list("completion_tokens", flat=True)
    assert 0 < cut < 60 == whole
