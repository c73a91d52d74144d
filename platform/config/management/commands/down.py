"""`manage.py down`: stop what `manage.py up --detach` started."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import psutil
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from config.parts import stop_recorded
from config.up import CannotStart, only_one
from inference.agent.processes import stop_all

STOP_SECONDS = 150.0


class Command(BaseCommand):
    help = "Stop everything that `manage.py up` runs on this data folder, in order."
    requires_migrations_checks = False

    def handle(self, *args: Any, **options: Any) -> None:
        data = Path(settings.ROUNDHOUSE_DATA)
        pid = _running_up(data)
        if pid is not None:
            process = psutil.Process(pid)
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except psutil.TimeoutExpired as error:
                raise CommandError(f"Process {pid} did not stop within {STOP_SECONDS:.0f} s.") from error
            self.stdout.write("Roundhouse has stopped.")
            return
        left = [record.stem for record in sorted((data / "run").glob("*.json")) if stop_recorded(record)]
        stop_all(data, grace_seconds=5)
        self.stdout.write(
            f"Stopped what an earlier start left: {', '.join(left)}."
            if left
            else "Roundhouse was not running."
        )


def _running_up(data: Path) -> int | None:
    """The process that holds the data folder, else None."""
    with contextlib.suppress(CannotStart), only_one(data):
        return None
    text = (data / "up.lock").read_text().strip()
    return int(text) if text.isdecimal() else None
