"""`manage.py up` in a terminal: Ctrl-C stops everything; what a killed one left is taken over."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import ROOT, START_SECONDS, Roundhouse, eventually, new_roundhouse

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(600)]


@pytest.fixture
def own() -> Iterator[Roundhouse]:
    """A Roundhouse that the test itself starts and stops, always on SQLite: it must not share tables."""
    data = Path(tempfile.mkdtemp(prefix="rh-stop-"))
    roundhouse = new_roundhouse(data)
    roundhouse.environment.pop("DATABASE_URL", None)
    roundhouse.environment.pop("REDIS_URL", None)
    yield roundhouse
    roundhouse.manage("down", check=False)
    shutil.rmtree(data, ignore_errors=True)


def processes_of(roundhouse: Roundhouse) -> list[psutil.Process]:
    """Everything that runs for this data folder, found by what it was told, not by our records."""
    found = []
    for process in psutil.process_iter():
        try:
            told = [*process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if process.pid != os.getpid() and any(str(roundhouse.data) in text for text in told):
            found.append(process)
    return found


def start(roundhouse: Roundhouse) -> subprocess.Popen[bytes]:
    with (roundhouse.data / "terminal").open("ab") as terminal:
        up = subprocess.Popen(
            [sys.executable, str(ROOT / "manage.py"), "up"],
            env=roundhouse.environment,
            stdout=terminal,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    eventually(
        lambda: b"Roundhouse is running." in (roundhouse.data / "terminal").read_bytes(),
        seconds=START_SECONDS,
        what="it runs",
        every=0.2,
    )
    return up


def test_ctrl_c_stops_everything(own: Roundhouse):
    up = start(own)
    assert len(processes_of(own)) >= 6
    os.killpg(up.pid, signal.SIGINT)
    assert up.wait(60) == 0
    assert processes_of(own) == []
    states = own.rows("SELECT DISTINCT state FROM registry_worker")
    assert states == [("stopped",)]


def test_what_a_killed_up_left_running_is_taken_over(own: Roundhouse):
    up = start(own)
    up.kill()
    up.wait()
    left = processes_of(own)
    assert own.answers(own.credentials["chat_model"]), "without its starter everything goes on"
    (own.data / "terminal").unlink()
    again = start(own)
    assert own.answers(own.credentials["chat_model"])
    parts = {"gateway", "control", "inference.agent"}
    old = [process for process in left if process.is_running() and parts & set(process.cmdline())]
    assert old == []
    os.killpg(again.pid, signal.SIGINT)
    assert again.wait(60) == 0
    assert processes_of(own) == []
