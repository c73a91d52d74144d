"""The supervisor of `manage.py up`, with real processes."""

import json
import os
import signal
import sys
import time

import psutil
import pytest

from config.parts import Part, recorded_process, stop_recorded


@pytest.fixture
def make_part(tmp_path):
    parts = []

    def make(code, **options):
        part = Part(
            name="thing",
            command=[sys.executable, "-c", code],
            folder=tmp_path,
            environment=dict(os.environ),
            **options,
        )
        parts.append(part)
        return part

    yield make
    for part in parts:
        part.stop()


def wait_for(question, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.02)


SLEEP = "import time; print('started', flush=True); time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"


def test_a_part_that_ended_is_started_again(make_part):
    part = make_part(SLEEP)
    part.start()
    first = part.process.pid
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: part.ended() is not None)
    assert part.keep_alive()
    wait_for(lambda: part.keep_alive() is False and part.process is not None, seconds=5)
    assert part.process.pid != first


def test_a_part_that_ends_at_once_is_given_pauses_that_grow(make_part):
    part = make_part("raise SystemExit(3)")
    pauses = []
    for _ in range(3):
        part.not_before = 0
        part.start()
        wait_for(lambda: part.ended() is not None)
        assert part.keep_alive()
        pauses.append(round(part.not_before - time.monotonic()))
    assert pauses == [1, 2, 4]


def test_a_part_that_will_not_stop_is_killed(make_part):
    part = make_part(DEAF, stop_seconds=0.5)
    part.start()
    wait_for(lambda: part.last_lines() == ["started"])
    pid = part.process.pid
    part.stop()
    assert not psutil.pid_exists(pid)
    assert not part.record.exists()


def test_what_a_killed_up_left_is_found_and_stopped(make_part):
    part = make_part(SLEEP)
    part.start()
    assert recorded_process(part.record).pid == part.process.pid
    pid, part.process.returncode = part.process.pid, None
    assert stop_recorded(part.record)
    part.process.wait(5)
    assert not psutil.pid_exists(pid)
    assert not stop_recorded(part.record)


def test_a_stranger_with_the_same_pid_is_left_alone(make_part, tmp_path):
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"pid": os.getpid(), "started_at": 1.0}))
    assert recorded_process(record) is None
    assert not stop_recorded(record)
