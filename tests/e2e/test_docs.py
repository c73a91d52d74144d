"""The examples of docs/connect.md for programs that we have, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.conftest import ROOT, Roundhouse

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(600)]

CONNECT = (ROOT / "docs" / "connect.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", CONNECT, re.MULTILINE | re.DOTALL)


PYTHON = dict(zip(("Tokyo", "Paris", "True"), blocks("python openai"), strict=True))
CURL = dict(zip(("text_completion", "relevance_score"), blocks("bash"), strict=False))


@pytest.fixture
def clone(roundhouse: Roundhouse, tmp_path: Path) -> Path:
    """A folder in which `var/` is the data folder, as in a clone."""
    (tmp_path / "var").symlink_to(roundhouse.data)
    return tmp_path


@pytest.mark.parametrize("said", PYTHON)
def test_a_python_example_answers(clone: Path, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PYTHON[said]],
        cwd=clone,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


@pytest.mark.parametrize("said", CURL)
def test_a_curl_example_answers(roundhouse: Roundhouse, said: str) -> None:
    facts = roundhouse.credentials
    command = CURL[said].replace("YOUR_KEY", facts["api_key"])
    command = command.replace(":8000/", f":{urlsplit(facts['base_url']).port}/")
    done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, check=True)
    assert said in done.stdout
