"""S5: nothing of ours makes objects, or code, out of bytes that came from elsewhere."""

from __future__ import annotations

import ast
import os
import pickle
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from django.conf import settings
from kombu import Connection

from inference.agent.app import queue_of
from inference.agent.identity import Identity, write_identity
from tests import services
from tests.api.conftest import Served, facts, served, worker

__all__ = ["facts", "served", "worker"]  # the fixtures, found by their names

ROOT = Path(__file__).resolve().parents[2]
OURS = ("manage.py", "platform", "registry", "inference", "openai_api", "webchat", "bench")

MODULES = frozenset(
    {"pickle", "_pickle", "cPickle", "pickle5", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    | {"jsonpickle", "dbm", "pandas.io.pickle"}
)
# Its queues and pipes are pickles; what runs beside us is started by `subprocess`.
PIPES = frozenset({"multiprocessing.connection", "multiprocessing.managers"})
CALLS = frozenset({"eval", "exec", "compile", "__import__"})
METHODS = frozenset(
    {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.load", "joblib.load"}
    | {"pd.read_pickle", "pandas.read_pickle", "builtins.eval", "builtins.exec"}
)


def faults_of(source: str) -> list[str]:
    """What a text of Python has that this project has not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [name for name in names if name in MODULES | PIPES or name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS | METHODS:
                found.append(called)
            found += [
                f"{called} with {keyword.arg}"
                for keyword in node.keywords
                if (
                    keyword.arg in ("allow_pickle", "trust_remote_code")
                    and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                )
                or (keyword.arg == "weights_only" and ast.unparse(keyword.value) != "True")
            ]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, marshal as m",
        "from dill import loads",
        "from joblib.numpy_pickle import load",
        "import shelve",
        "from multiprocessing import connection",
        "def f(x):\n    return eval(x)",
        "exec('1')",
        "import yaml\nyaml.load('a')",
        "import torch\ntorch.load('a')",
        "numpy.load('a', allow_pickle=True)",
        "AutoModel.from_pretrained('a', trust_remote_code=given)",
    ],
)
def test_the_lint_finds(source: str) -> None:
    assert faults_of(source) != []


def test_the_lint_lets_pass_what_is_safe() -> None:
    assert (
        faults_of("import json\nmodel.eval()\nre.compile('a')\nyaml.safe_load('a')\nf(allow_pickle=False)")
        == []
    )


def test_nothing_of_ours_reads_pickles_or_runs_texts() -> None:
    files = [ROOT / "manage.py", *(file for name in OURS for file in (ROOT / name).rglob("*.py"))]
    assert len(files) > 300
    faults = {str(file.relative_to(ROOT)): faults_of(file.read_text()) for file in files}
    assert {name: found for name, found in faults.items() if found} == {}


def test_sessions_and_messages_are_json() -> None:
    assert settings.SESSION_SERIALIZER == "django.contrib.sessions.serializers.JSONSerializer"
    assert settings.CELERY_ACCEPT_CONTENT == ["json"]
    assert settings.CELERY_TASK_SERIALIZER == "json"
    assert getattr(settings, "CELERY_RESULT_BACKEND", None) is None


# -- a message that is a pickle


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def broker() -> Iterator[str]:
    with services.shared_redis() as url:
        if url is None:
            services.missing("Redis is not installed; install the package `redis-server`")
        yield url


def hostile_then_honest(broker: str, queue: str, task: str, canary: Path) -> None:
    """Pickles in each place of a message that has one, then what its receiver waits for."""
    proof = canary.with_name("proof")
    pickle.loads(pickle.dumps(Canary(proof)))
    assert proof.exists()  # so the canary is a live one
    with Celery("attacker", broker=broker, set_as_current=False) as app:
        app.conf.accept_content = ["json", "pickle"]
        app.send_task(task, args=[Canary(canary)], serializer="pickle", queue=queue)
        app.send_task("no.such.task", args=[Canary(canary)], serializer="pickle", queue=queue)
        with Connection(broker) as connection, connection.Producer() as producer:
            for kind in ("application/x-python-serialize", "application/x-yaml", "application/x-nothing"):
                producer.publish(
                    pickle.dumps(Canary(canary)),
                    content_type=kind,
                    content_encoding="binary",
                    routing_key=queue,
                    headers={"task": task, "id": str(uuid.uuid4()), "lang": "py"},
                )
            producer.publish(
                pickle.dumps(Canary(canary)),
                content_type="application/json",  # a lie
                content_encoding="binary",
                routing_key=queue,
                headers={"task": task, "id": str(uuid.uuid4()), "lang": "py"},
            )
        app.send_task(task, args=[7], serializer="json", queue=queue)


def forget(broker: str, queue: str) -> int:
    """Remove the queue; returns how much was left in it."""
    with redis.Redis.from_url(broker) as client:
        left = int(client.llen(queue))  # type: ignore[arg-type]
        client.delete(queue, f"_kombu.binding.{queue}")
        return left


def ended(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def test_an_agent_throws_pickles_away_and_hears_the_next_nudge(broker: str, tmp_path: Path) -> None:
    name = f"s05-{uuid.uuid4().hex[:12]}"
    identity = Identity(
        url="http://127.0.0.1:9", node_id=1, name=name, address="127.0.0.1", secret="s", broker_url=broker
    )
    write_identity(tmp_path, identity)
    log = tmp_path / "log"
    with log.open("wb") as errors:
        agent = subprocess.Popen(
            [sys.executable, "-m", "inference.agent.app", str(tmp_path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    try:
        hostile_then_honest(broker, queue_of(name), "inference.agent.nudge", tmp_path / "canary")
        os.set_blocking(agent.stdout.fileno(), False)  # type: ignore[union-attr]
        heard, deadline = b"", time.monotonic() + 60
        while b"7\n" not in heard and time.monotonic() < deadline:
            heard += agent.stdout.read() or b""  # type: ignore[union-attr]
            time.sleep(0.05)
        assert heard == b"7\n", log.read_text()
        assert agent.poll() is None
    finally:
        ended(agent)
        left = forget(broker, queue_of(name))
    assert not (tmp_path / "canary").exists()
    assert left == 0


CONTROL = """
import django
import sys
from pathlib import Path
django.setup()
from config.celery import app

@app.task(name="s05.hello", ignore_result=True)
def hello(number):
    Path(sys.argv[2]).write_text(str(number))

worker = app.Worker(pool="solo", queues=[sys.argv[1]], quiet=True,
                    without_gossip=True, without_mingle=True, without_heartbeat=True)
worker.start()
"""


@pytest.mark.full
def test_control_throws_pickles_away_and_does_its_next_task(broker: str, tmp_path: Path) -> None:
    queue, done, log = f"s05-{uuid.uuid4().hex[:12]}", tmp_path / "done", tmp_path / "log"
    with log.open("wb") as output:
        control = subprocess.Popen(
            [sys.executable, "-c", CONTROL, queue, str(done)],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
                "DJANGO_SETTINGS_MODULE": "config.settings.test",
                "REDIS_URL": broker,
            },
            stdout=output,
            stderr=output,
        )
    try:
        hostile_then_honest(broker, queue, "s05.hello", tmp_path / "canary")
        deadline = time.monotonic() + 60
        while not (done.exists() and done.read_text()) and time.monotonic() < deadline:
            assert control.poll() is None, log.read_text()
            time.sleep(0.05)
        assert done.read_text() == "7", log.read_text()
    finally:
        ended(control)
        left = forget(broker, queue)
    assert not (tmp_path / "canary").exists()
    assert left == 0


KINDS = (
    *("application/x-python-serialize", "application/octet-stream"),
    *("application/json", "application/x-yaml"),
)
PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"),
    *("/tokenize", "/fleet/join", "/fleet/node", "/fleet/worker", "/api/v1/keys"),
)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("path", PATHS)
def test_a_request_that_is_a_pickle_is_refused(served: Served, path: str, tmp_path: Path) -> None:
    body = pickle.dumps(Canary(tmp_path / "canary"))
    for kind in KINDS:
        for encoding in ("", "Content-Encoding: gzip"):
            head = [
                f"POST {path} HTTP/1.1",
                f"Host: 127.0.0.1:{served.port}",
                f"Authorization: Bearer {served.api_key}",
                f"Content-Type: {kind}",
                f"Content-Length: {len(body)}",
                *([encoding] if encoding else []),
            ]
            answer = served.raw("\r\n".join(head).encode() + b"\r\n\r\n" + body)
            assert 400 <= answer.status < 500, (path, kind, answer.status)
    assert not (tmp_path / "canary").exists()
