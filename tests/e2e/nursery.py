"""Gateways that a test may kill by the hundred: forked from one process that has imported everything, each is
`manage.py gateway` all the same, and there within a moment."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from tests.e2e.conftest import Roundhouse

ROOT = Path(__file__).resolve().parents[2]


class Nursery:
    """The process from which they are forked. `gateways` makes one."""

    def __init__(self, roundhouse: Roundhouse, process: subprocess.Popen[str]) -> None:
        self.roundhouse = roundhouse
        self.log = roundhouse.data / "nursery.log"
        self._process = process

    def start(self, port: int) -> psutil.Process:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(port, file=self._process.stdin, flush=True)
        return psutil.Process(int(self._process.stdout.readline()))


@contextlib.contextmanager
def gateways(roundhouse: Roundhouse) -> Iterator[Nursery]:
    """Gateways of a running Roundhouse. Whoever starts one ends it."""
    with (
        (roundhouse.data / "nursery.log").open("ab") as log,
        subprocess.Popen(
            [sys.executable, __file__],
            cwd=roundhouse.data,
            env=roundhouse.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        yield Nursery(roundhouse, process)


def main() -> None:
    """Each line read is a port; the answer is the pid of the gateway that gets it."""
    # As `manage.py` has it.
    sys.path[:1] = [str(ROOT), str(ROOT / "platform")]
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings.production")
    import django
    from django.core.management import execute_from_command_line

    django.setup()
    # Not `config.asgi`: it makes a gateway, with a name of its own, and each child must have its own.
    import config.front
    import config.urls  # noqa: F401
    import inference.http

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here asks how they ended
    for line in sys.stdin:
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # What was drawn at the import must not be the same in each: request ids come of it.
        random.seed()
        inference.http._random.seed()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(2, 1)
        execute_from_command_line(["manage.py", "gateway", "--host", "127.0.0.1", "--port", line.strip()])
        os._exit(1)


if __name__ == "__main__":
    main()
