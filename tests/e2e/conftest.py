"""A real Roundhouse: `manage.py up --detach` on a data folder of its own, with the database and Redis
of the environment (SQLite and a private Redis when that names none)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import psycopg
import pytest

from registry.keys import worker_secret

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 300


@pytest.fixture(scope="session")
def django_db_setup() -> None:
    """These tests look at a real database from outside; Django's test database is not made."""


def eventually(question: Callable[[], Any], *, seconds: float, what: str, every: float = 0.05) -> Any:
    """Ask until the answer is true and return it; fail with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        answer = question()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(every)


@dataclasses.dataclass
class Roundhouse:
    """A running one, seen from outside: its processes, its database, its HTTP."""

    data: Path
    environment: dict[str, str]
    output: str = ""
    _clients: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    def manage(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "manage.py"), *arguments],
            env=self.environment,
            cwd=self.data,
            capture_output=True,
            text=True,
            check=check,
            timeout=START_SECONDS,
        )

    def up(self) -> float:
        """Start it; returns the seconds until a chat request could be answered."""
        started = time.monotonic()
        result = self.manage("up", "--detach", "--timeout", str(START_SECONDS - 20), check=False)
        self.output = result.stdout
        assert result.returncode == 0, result.stdout + result.stderr + self.logs()
        return time.monotonic() - started

    def down(self) -> None:
        self._clients.close()
        self.manage("down")

    def logs(self) -> str:
        return "".join(
            f"\n--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            for log in sorted(self.data.glob("log/*.log"))
        )

    @property
    def credentials(self) -> dict[str, Any]:
        return json.loads((self.data / "credentials.json").read_text())  # type: ignore[no-any-return]

    def client(self, **options: Any) -> openai.OpenAI:
        """Closed when this goes down, if not before."""
        return self._clients.enter_context(
            openai.OpenAI(
                base_url=self.credentials["base_url"], api_key=self.credentials["api_key"], **options
            )
        )

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=self.credentials["base_url"], api_key=self.credentials["api_key"], **options
        )

    def rows(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Ask its database directly, past all of its own code. Parameters are written as %s."""
        url = self.environment.get("DATABASE_URL")
        if url:
            with psycopg.connect(url) as connection:
                return connection.execute(sql, parameters).fetchall()
        with contextlib.closing(sqlite3.connect(self.data / "roundhouse.sqlite3", timeout=10)) as connection:
            return connection.execute(sql.replace("%s", "?"), parameters).fetchall()

    def worker(self, deployment: str) -> Worker | None:
        """The newest worker of a deployment."""
        found = self.rows(
            "SELECT w.id, w.epoch, w.state, w.pid, w.engine_pid, w.url FROM registry_worker w "
            "JOIN registry_deployment d ON d.id = w.deployment_id WHERE d.name = %s "
            "ORDER BY w.id DESC LIMIT 1",
            deployment,
        )
        return Worker(*found[0]) if found else None

    def worker_events(self, worker_id: int) -> list[str]:
        rows = self.rows(
            "SELECT what FROM registry_event WHERE kind = 'worker' AND object_id = %s ORDER BY id", worker_id
        )
        return [what for (what,) in rows]

    def running(self, worker: Worker) -> int:
        """What the worker itself says it is doing."""
        key = (self.data / "secret_key").read_text().strip()
        request = urllib.request.Request(
            f"{worker.url}/load",
            headers={"Authorization": f"Bearer {worker_secret(key, worker.id, worker.epoch)}"},
        )
        with urllib.request.urlopen(request, timeout=5) as response:
            load = json.load(response)
        return int(load.get("running", 0)) + int(load.get("waiting", 0))

    def part(self, name: str) -> psutil.Process:
        """The process of one part (`gateway`, `control`, `agent`)."""
        return psutil.Process(self.part_pid(name))

    def part_pid(self, name: str) -> int:
        return int(json.loads((self.data / "run" / f"{name}.json").read_text())["pid"])

    def deploy_simulated(self, name: str, *, replicas: int = 1, **arguments: Any) -> None:
        """Deploy the simulated engine under a route of that name and wait until it is ready."""
        self.manage(
            "shell",
            "-v0",
            "-c",
            "from registry.actions.language_models import add_language_model\n"
            "from registry.actions.deployments import deploy\n"
            f"model = add_language_model(name={name!r}, source='/simulated', by='test')\n"
            f"deploy(name={name!r}, language_model=model, engine='simulated', route={name!r}, by='test', "
            f"replicas={replicas}, slots=64, arguments={arguments!r})",
        )
        eventually(
            lambda: (
                self.rows(
                    "SELECT count(*) FROM registry_worker WHERE state = 'ready' AND name LIKE %s", f"{name}-%"
                )[0][0]
                == replicas
            ),
            seconds=40,
            what=f"{name} is ready {self.logs()}",
        )
        # The gateway reads the routes twice a second.
        eventually(lambda: self.answers(name), seconds=5, what=f"{name} answers")

    def answers(self, model: str) -> bool:
        """Does it answer a chat request now, at the first attempt?"""
        try:
            with self.client(max_retries=0, timeout=20) as client:
                client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=2
                )
        except openai.APIError as error:
            print(f"{model} does not answer: {error!r}")  # pytest shows it where the test fails
            return False
        return True


@dataclasses.dataclass(frozen=True)
class Worker:
    id: int
    epoch: int
    state: str
    pid: int
    engine_pid: int
    url: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def new_roundhouse(data: Path, **settings: str) -> Roundhouse:
    environment = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    environment |= {"ROUNDHOUSE_DATA": str(data), "ROUNDHOUSE_PORT": str(free_port()), **settings}
    return Roundhouse(data=data, environment=environment)


@pytest.fixture(scope="session")
def roundhouse() -> Iterator[Roundhouse]:
    """One Roundhouse for the tests that leave it as they found it."""
    # Not pytest's own folder: its path is too long for a reader, and the data holds secrets.
    data = Path(tempfile.mkdtemp(prefix="rh-e2e-"))
    roundhouse = new_roundhouse(data)
    try:
        roundhouse.up()
        yield roundhouse
    finally:
        roundhouse.down()
        shutil.rmtree(data, ignore_errors=True)
