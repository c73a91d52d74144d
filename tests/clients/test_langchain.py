"""langchain-openai: every check of langchain-tests' standard suites for chat models and embeddings, tools and
structured output among them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.conftest import HERE
from tests.clients.environments import python_with

ONE_LOOP = (
    "-o",
    "asyncio_default_test_loop_scope=session",
    "-o",
    "asyncio_default_fixture_loop_scope=session",
)
"""LangChain keeps its connections for as long as the process lives; a loop per test would end them."""

SKIPPED = [
    *("Model does not support PDF inputs", "Model does not support audio inputs"),
    *("Model does not support image message", "Model does not support image tool message"),
    "Model does not support PDF tool message",
    "Model does not explicitly support Anthropic inputs",
    "VCR not set up",
]
"""Pictures, sounds and documents are nothing the simulated engine reads, and so are the pictures in the
suite's messages of Anthropic's kind; the last plays back recordings and needs no server."""

ENVIRONMENTS = ["langchain"]

pytestmark = [pytest.mark.full, pytest.mark.django_db(transaction=True), pytest.mark.timeout(600)]


def test_the_standard_suites_pass(told: dict[str, str], tmp_path: Path) -> None:
    # Beside our conftest.py it could not be run without Django.
    suite = shutil.copy(HERE / "langchain_suite.py", tmp_path)
    options = ("-q", "-rs", "-c", "/dev/null", "--rootdir", str(tmp_path), "--asyncio-mode=auto", *ONE_LOOP)
    done = subprocess.run(
        [str(python_with("langchain")), "-m", "pytest", *options, suite],
        cwd=tmp_path,
        env=told,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    # The suites skip what a model says it has not: that must not grow.
    skipped = re.findall(r"^SKIPPED \[1\] .*: (.*)\.$", done.stdout, re.MULTILINE)
    assert sorted(skipped) == sorted(SKIPPED)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 48, done.stdout[-2000:]
