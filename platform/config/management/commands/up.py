"""`manage.py up`: Roundhouse on this machine, from nothing to a first answer."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from config.first_run import Credentials
from config.up import CannotStart, Stopped, Up, only_one, stop_on_signals

WATCH_SECONDS = 0.5
FAILED = "\x00failed"
READY = "\x00ready"
"""How a detached `up` tells the command that started it how it went; every other line is for people."""


class Command(BaseCommand):
    help = (
        "Start everything on this machine (database, private Redis, gateway, control, one node), "
        "and say how to use it. Ctrl-C stops everything in order."
    )
    # `up` migrates by itself, and must start where nothing has been migrated yet.
    requires_migrations_checks = False

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--detach", action="store_true", help="Return as soon as a chat request can be answered."
        )
        parser.add_argument(
            "--timeout",
            type=float,
            default=900,
            help="Most seconds until the first answer (default: %(default)s).",
        )
        parser.add_argument("--report-to", type=int, default=None, help="Used by --detach itself.")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["detach"]:
            self._detach(options["timeout"])
        else:
            self._run(options["timeout"], options["report_to"])

    def _run(self, timeout: float, report_to: int | None) -> None:
        report = os.fdopen(report_to, "w", buffering=1) if report_to is not None else None

        def tell(line: str) -> None:
            (report or self.stdout).write(line + "\n")

        up = Up(tell)
        try:
            with only_one(up.data), stop_on_signals():
                try:
                    credentials, is_new = up.start()
                    up.wait_until_answering(credentials, timeout)
                    if (line := up.embedding_line(credentials)) is not None:
                        tell(line)
                    for line in _welcome(credentials, is_new, detached=report is not None):
                        tell(line)
                    if report is not None:
                        tell(READY)
                        report.close()
                        report = None
                    up.tell = self.stdout.write
                    while True:
                        up.keep_alive()
                        time.sleep(WATCH_SECONDS)
                except Stopped:
                    self.stdout.write("Stopping.")
                finally:
                    up.stop()
        except CannotStart as error:
            if report is not None:
                tell(str(error))
                tell(FAILED)
                raise SystemExit(1) from error
            raise CommandError(str(error)) from error

    def _detach(self, timeout: float) -> None:
        """Start a second `up` in the background and print what it reports, until it answers or fails."""
        log = settings.ROUNDHOUSE_DATA / "log" / "up.log"
        log.parent.mkdir(mode=0o700, exist_ok=True)
        reading, writing = os.pipe()
        command = [
            *(sys.executable, str(settings.BASE_DIR / "manage.py"), "up"),
            *("--timeout", str(timeout), "--report-to", str(writing)),
        ]
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                start_new_session=True,
            )
        os.close(writing)
        ready = False
        try:
            with os.fdopen(reading) as report:
                for line in report:
                    text = line.rstrip("\n")
                    if text == READY:
                        ready = True
                    elif text != FAILED:
                        self.stdout.write(text)
        except KeyboardInterrupt:
            child.terminate()
            child.wait()
            raise CommandError("Stopped before it was ready.") from None
        if not ready:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(60)
            raise CommandError(f"Roundhouse did not start; its log is {log}.")


def _welcome(credentials: Credentials, is_new: bool, *, detached: bool) -> list[str]:
    lines = ["", "Roundhouse is running.", "", f"  Chat:  {credentials.chat_url}"]
    lines.append(f"  Admin: {credentials.admin_url}")
    if is_new:
        lines.append(f"         user {credentials.admin_username}, password {credentials.admin_password}")
        lines.append("         (shown once; kept in credentials.json in the data folder)")
    if credentials.chat_model:
        lines += ["  Ask:", "", _curl(credentials)]
    stop = "Stop it with `make down`." if detached else "Stop it with Ctrl-C here, or with `make down`."
    return [*lines, "", f"  {stop}", ""]


def _curl(credentials: Credentials) -> str:
    body = (
        # Without chance in it, the first answer is the same for everybody.
        f'{{"model": "{credentials.chat_model}", "temperature": 0, '
        '"messages": [{"role": "user", "content": "What is the capital of Japan?"}]}'
    )
    return (
        f"curl {credentials.base_url}/chat/completions"
        f" -H 'Authorization: Bearer {credentials.api_key}'"
        f" -H 'Content-Type: application/json' -d '{body}'"
    )
