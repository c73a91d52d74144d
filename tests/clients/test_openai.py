"""openai-python, two major versions of it: whole answers, streams, many at once, vectors, errors, retries."""

from __future__ import annotations

import pytest

from tests.clients.programs import python_program, run_program

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.timeout(300)]

ENVIRONMENTS = ["openai-2"]


@pytest.mark.parametrize("major", [pytest.param("2", marks=pytest.mark.full), "3"])
def test_a_program_on_openai_python_runs(major: str, told: dict[str, str]) -> None:
    command = python_program("openai_program.py", environment="openai-2" if major == "2" else None)
    run_program(command, told, version=f"{major}.")
