"""openai-python, two major versions of it: whole answers, streams, many at once, vectors, errors, retries."""

from __future__ import annotations

import subprocess
import sys

import pytest

from registry.actions.events import publish_change
from registry.models import Deployment, Route, RouteTarget, UsageEvent
from tests.api.conftest import ROUTE, eventually
from tests.clients.conftest import HERE
from tests.clients.environments import python_with

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.timeout(300)]


@pytest.mark.parametrize("major", ["2", "3"])
def test_a_program_on_openai_python_runs(major: str, told: dict[str, str]) -> None:
    python = str(python_with("openai-2")) if major == "2" else sys.executable
    program = subprocess.Popen(
        [python, str(HERE / "openai_program.py")],
        env=told,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        assert program.stdin is not None
        version = program.stdout.readline()
        assert version.startswith(f"{major}."), version or program.communicate(timeout=10)[1]
        program.stdin.write("\n")
        program.stdin.flush()
        eventually(
            lambda: UsageEvent.objects.filter(route="later", status=503).exists(), "it was refused at first"
        )
        RouteTarget.objects.create(
            route=Route.objects.get(name="later"), deployment=Deployment.objects.get(routes__name=ROUTE)
        )
        publish_change("route", "later")
        _, errors = program.communicate(timeout=60)
    finally:
        if program.poll() is None:
            program.kill()
            program.communicate()
    assert program.returncode == 0, errors
