"""The operator's commands on a running Roundhouse, first of all those that docs/operating.md shows."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Roundhouse, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(600)]

GUIDE = (ROOT / "docs" / "operating.md").read_text()
MANAGE = ".venv/bin/python manage.py"
MODEL = "smollm2-135m-instruct"


def blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module", autouse=True)
def tidy(roundhouse: Roundhouse) -> Iterator[None]:
    """Leave it as it was found: what these tests deploy is deleted when they are done."""
    before = json.loads(roundhouse.manage("status", "--json").stdout)["deployments"]
    yield
    kept = [one["name"] for one in before]
    roundhouse.manage(
        "shell",
        "-v0",
        "-c",
        "import time\n"
        "from registry.actions.deployments import delete_deployment, scale_deployment\n"
        "from registry.models import Deployment, Route, Worker\n"
        f"ours = list(Deployment.objects.exclude(name__in={kept!r}))\n"
        "for one in ours: scale_deployment(deployment=one, replicas=0, by='test')\n"
        "end = time.monotonic() + 60\n"
        "while Worker.objects.live().filter(deployment__in=ours).exists() and time.monotonic() < end:\n"
        "    time.sleep(0.2)\n"
        "Route.objects.filter(name__in=[one.name for one in ours]).delete()\n"
        "for one in ours: delete_deployment(deployment=one, by='test')\n",
    )


@pytest.fixture(scope="module")
def slow(roundhouse: Roundhouse) -> Iterator[str]:
    """A model that answers for a long time, gone afterwards."""
    roundhouse.manage("model", "add", "slow", "--source", "/simulated")
    roundhouse.manage(
        "deploy", "slow", "--model", "slow", "--engine", "simulated",
        "--argument", "tokens_per_second=10", "--wait", "60",
    )  # fmt: skip
    eventually(lambda: roundhouse.answers("slow"), seconds=5, what="slow answers")
    yield "slow"
    roundhouse.manage("scale", "slow", "0")


def test_each_command_of_the_guide_does_what_it_says(roundhouse: Roundhouse):
    assert len(blocks()) >= 8
    for block in blocks():
        assert MANAGE in block, f"no test runs this block:\n{block}"
        done = subprocess.run(
            ["bash", "-ec", block.replace(MANAGE, f"{sys.executable} {ROOT / 'manage.py'}")],
            cwd=roundhouse.data,
            env=roundhouse.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        if "chat" in block:
            assert "Tokyo" in done.stdout
            assert "tok/s" in done.stdout


def test_each_command_that_the_guide_names_is_there(roundhouse: Roundhouse):
    listed = roundhouse.manage("help", "--commands").stdout.split()
    named = set(re.findall(r"manage\.py ([a-z_]+)", GUIDE)) - {"node", "help"}
    assert named >= {"doctor", "status", "model", "key", "deploy", "scale", "chat", "gateway", "control"}
    assert named <= set(listed)


def test_doctor_finds_all_well_and_one_message_goes_through(roundhouse: Roundhouse):
    done = roundhouse.manage("doctor", check=False)
    assert done.returncode == 0, done.stdout
    for what in ("database", "Redis", "gateway", "migrations", "control", "agent", f"files of {MODEL}"):
        assert f"✓ {what}" in done.stdout
    done = roundhouse.manage("doctor", "--model", MODEL, check=False)
    assert done.returncode == 0, done.stdout
    assert f"✓ answer: {MODEL} answered" in done.stdout


def test_doctor_follows_a_failed_answer_to_its_cause(roundhouse: Roundhouse):
    roundhouse.manage("deploy", "wrong", "--model", MODEL, "--argument", "nonsense=1")
    failed = roundhouse.manage("deploy", "wrong", "--wait", "60", check=False)
    assert failed.returncode == 1
    assert "nonsense" in failed.stderr
    done = roundhouse.manage("doctor", "--model", "wrong", check=False)
    assert done.returncode == 1
    assert "✗ worker: wrong is failed" in done.stdout
    assert "Correct the deployment's engine arguments." in done.stdout
    roundhouse.manage("scale", "wrong", "0", "--wait", "30")
    done = roundhouse.manage("doctor", "--model", "wrong", check=False)
    assert "✗ deployment: wrong is scaled to 0." in done.stdout
    assert "manage.py scale wrong 1" in done.stdout


def test_doctor_tells_why_a_key_is_refused(roundhouse: Roundhouse):
    key = roundhouse.manage("key", "create", "short-lived").stdout.strip()
    assert roundhouse.manage("doctor", "--model", MODEL, "--key", key).returncode == 0
    roundhouse.manage("key", "revoke", key)

    def refused() -> bool:
        done = roundhouse.manage("doctor", "--model", MODEL, "--key", key, check=False)
        return done.returncode == 1 and "✗ key" in done.stdout and "was revoked" in done.stdout

    eventually(refused, seconds=10, what="the revoked key is refused, and why")


def test_a_key_for_one_model_is_told_so(roundhouse: Roundhouse):
    roundhouse.manage("model", "add", "other", "--source", "/simulated")
    roundhouse.manage("deploy", "other", "--model", "other", "--engine", "simulated", "--wait", "60")
    key = roundhouse.manage("key", "create", "narrow", "--routes", "other").stdout.strip()
    done = roundhouse.manage("doctor", "--model", MODEL, "--key", key, check=False)
    assert "may use only other" in done.stdout
    roundhouse.manage("scale", "other", "0")


def test_chat_remembers_what_was_said_and_forgets_on_reset(roundhouse: Roundhouse, slow: str):
    done = subprocess.run(
        [sys.executable, str(ROOT / "manage.py"), "chat", slow, "--max-tokens", "3", "--system", "Be brief."],
        env=roundhouse.environment,
        input="one\ntwo\n/reset\nthree\n/exit\nnever\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.count("3 tokens, first after") == 3
    usage = roundhouse.rows(
        "SELECT prompt_tokens FROM registry_usageevent WHERE route = %s AND outcome = 'ok' "
        "AND completion_tokens = 3 ORDER BY id DESC LIMIT 3",
        slow,
    )
    third, second, first = (tokens for (tokens,) in usage)
    assert second > first
    assert third < second


def test_ctrl_c_stops_the_answer_and_not_the_program(roundhouse: Roundhouse, slow: str):
    chat = subprocess.Popen(
        [sys.executable, str(ROOT / "manage.py"), "chat", slow, "--max-tokens", "500"],
        env={**roundhouse.environment, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert chat.stdin is not None
    assert chat.stdout is not None
    try:
        chat.stdin.write(b"Tell me a long story.\n")
        chat.stdin.flush()
        assert os.read(chat.stdout.fileno(), 1)
        chat.send_signal(signal.SIGINT)
        seen = b""
        while b"(stopped" not in seen:
            piece = os.read(chat.stdout.fileno(), 4096)
            assert piece, seen
            seen += piece
        worker = roundhouse.worker(slow)
        assert worker is not None
        eventually(lambda: roundhouse.running(worker) == 0, seconds=5, what="the engine stopped")
        rest, errors = chat.communicate(b"/exit\n", timeout=20)
    finally:
        if chat.poll() is None:
            chat.kill()
            chat.communicate()
    assert chat.returncode == 0, errors
    assert b"Traceback" not in errors
    assert not rest


def test_status_as_json_is_what_the_database_says(roundhouse: Roundhouse):
    facts = json.loads(roundhouse.manage("status", "--json").stdout)
    assert {one["status"] for one in facts["deployments"] if one["name"] == MODEL} == {"ready"}
    assert [node["state"] for node in facts["nodes"]] == ["online"]
    assert facts["usage_today"]["requests"] >= 0


def test_doctor_says_what_to_start_when_nothing_runs(roundhouse: Roundhouse, tmp_path: Path):
    environment = {**roundhouse.environment, "ROUNDHOUSE_DATA": str(tmp_path), "ROUNDHOUSE_PORT": "9"}
    environment.pop("REDIS_URL", None)
    done = subprocess.run(
        [sys.executable, str(ROOT / "manage.py"), "doctor"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "✗ gateway" in done.stdout
    assert "make up" in done.stdout
