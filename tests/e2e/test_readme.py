"""The README's examples, run as they stand there (with this test's port instead of 8000)."""

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

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def clone(roundhouse: Roundhouse, tmp_path: Path) -> Path:
    """A folder in which `var/` is the data folder, as in a clone."""
    (tmp_path / "var").symlink_to(roundhouse.data)
    return tmp_path


def test_its_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    commands = [block.strip() for block in blocks("bash") if block.startswith("make")]
    assert commands == ["make up", "make test"]
    for command in commands:
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


def test_its_curl_answers(roundhouse: Roundhouse, clone: Path):
    (example,) = [block for block in blocks("bash") if "curl" in block]
    port = urlsplit(roundhouse.credentials["base_url"]).port
    done = subprocess.run(
        ["bash", "-ec", example.replace(":8000/", f":{port}/")],
        cwd=clone,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Tokyo" in done.stdout


def test_its_python_answers(clone: Path):
    (example,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=clone,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Tokyo" in done.stdout
