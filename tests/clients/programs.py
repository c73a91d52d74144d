"""Running the programs of this folder: each does what its client's users do, then waits, then asks for a
model whose worker is late."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

from registry.actions.events import publish_change
from registry.models import Deployment, Route, RouteTarget, UsageEvent
from tests.api.conftest import ROUTE, eventually
from tests.clients.environments import Node, node_with_clients, python_with

HERE = Path(__file__).parent


def python_program(name: str, *, environment: str | None = None) -> list[str]:
    """The command that runs a program, with the packages of an environment or with ours."""
    return [str(python_with(environment)) if environment else sys.executable, str(HERE / name)]


def node_program(name: str, folder: Path) -> list[str]:
    """The command that runs a module. It is copied into the folder, as Node seeks packages beside it."""
    node: Node = node_with_clients()
    (folder / "node_modules").symlink_to(node.modules)
    return [str(node.binary), shutil.copy(HERE / name, folder)]


def run_program(command: list[str], told: dict[str, str], *, version: str) -> None:
    """Run a program to its end: all it asserts holds, its client's version begins so, and the request that
    was refused with 503 at first, and by a limit with 429 then, was answered in the end."""
    statuses: list[int] = []
    handler = logging.Handler()
    handler.emit = lambda record: statuses.append(record.__dict__["status"])  # type: ignore[method-assign]
    logging.getLogger("roundhouse.request").addHandler(handler)
    program = subprocess.Popen(
        command,
        env=told,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        assert program.stdin is not None
        said = program.stdout.readline()
        assert said.startswith(version), said or program.communicate(timeout=10)[1]
        program.stdin.write("\n")
        program.stdin.flush()
        eventually(
            lambda: (
                UsageEvent.objects.filter(route="later", status=503).exists() or program.poll() is not None
            ),
            "it was refused at first",
            seconds=30,
        )
        RouteTarget.objects.create(
            route=Route.objects.get(name="later"), deployment=Deployment.objects.get(routes__name=ROUTE)
        )
        publish_change("route", "later")
        _, errors = program.communicate(timeout=60)
    finally:
        logging.getLogger("roundhouse.request").removeHandler(handler)
        if program.poll() is None:
            program.kill()
            program.communicate()
    assert program.returncode == 0, errors
    asked = UsageEvent.objects.filter(route="later").order_by("started_at").values_list("status", flat=True)
    eventually(lambda: 200 in asked.all(), "the ledger has the answer")
    *refused, answered = asked.all()
    assert (set(refused), answered) == ({503}, 200)
    # What a limit refuses is not in the ledger.
    assert 429 in statuses
