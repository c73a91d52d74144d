"""The README's examples, run as they stand there (with this test's port instead of 8000)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Roundhouse
from tests.e2e.documented import block, blocks, clone, run, with_facts_of

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(600)]

MAKE = [one for one in blocks("README", "bash") if one.text.startswith("make")]
CURL = block("README", "curl http")
PYTHON = block("README", "import openai")
RUN = [*MAKE, CURL, PYTHON]


def test_make_knows_how_to_run_its_two_commands(roundhouse: Roundhouse, tmp_path: Path):
    """What they start is run by the tests beside this one; here, that they are these words."""
    assert [one.text for one in MAKE] == ["make up\n", "make test\n"]
    folder = clone(tmp_path, roundhouse.data)
    planned = [run(one.text.replace("make", "make -n"), folder, {**roundhouse.environment}) for one in MAKE]
    assert "manage.py up" in planned[0].stdout
    assert "-m tests.run" in planned[1].stdout


def test_its_curl_answers(roundhouse: Roundhouse, tmp_path: Path):
    folder = clone(tmp_path, roundhouse.data)
    assert "Tokyo" in run(with_facts_of(roundhouse, CURL), folder, roundhouse.environment).stdout


def test_its_python_answers(roundhouse: Roundhouse, tmp_path: Path):
    folder = clone(tmp_path, roundhouse.data)
    (folder / "example.py").write_text(PYTHON.text)
    assert "Tokyo" in run(f"{sys.executable} example.py", folder, roundhouse.environment).stdout
