"""A Roundhouse of the benchmark's own, everything on, and the loads that are put on it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from bench.load import Tally, Target, run
from registry.keys import worker_secret
from tests.e2e.conftest import Roundhouse, eventually, new_roundhouse

TOKENS = 64

KEY = """
from registry.actions.api_keys import issue_api_key
from registry.actions.budgets import save_budget
from registry.actions.limits import save_limit
from registry.models import Budget, Limit, Project
key, text = issue_api_key(name="bench", project=Project.objects.first(), by="bench")
"""

# Where a deployment is, a new Roundhouse makes none of its own.
NO_MODELS = """
from registry.actions.deployments import deploy
from registry.actions.language_models import add_language_model
model = add_language_model(name="none", source="/simulated", by="bench")
deploy(name="none", language_model=model, engine="simulated", replicas=0, by="bench")
"""

STOP_ALL = """
from registry.models import Deployment
from registry.actions.deployments import scale_deployment
for deployment in Deployment.objects.all():
    scale_deployment(deployment=deployment, replicas=0, by="bench")
"""


def cpu(*processes: psutil.Process) -> float:
    """Seconds that these have used, in user and in system."""
    return float(sum(times.user + times.system for times in map(psutil.Process.cpu_times, processes)))


def body(*, stream: bool, model: str, tokens: int = TOKENS, more: str = "") -> dict[str, object]:
    """A question for the simulated engine; `more` are commands for it."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": f"!tokens {tokens} {more}".strip()}],
        "stream": stream,
    }


def python(roundhouse: Roundhouse, code: str) -> str:
    """See `Stage.python`; the Roundhouse need not run."""
    done = roundhouse.manage("shell", "-v0", "-c", code, check=False)
    if done.returncode:
        raise SystemExit(f"{code}\n{done.stderr}")
    return done.stdout


class Stage:
    """Loads one Roundhouse and reads what that cost its gateway."""

    def __init__(self, roundhouse: Roundhouse) -> None:
        self.roundhouse = roundhouse
        self.gateway = roundhouse.part("gateway")

    @property
    def base_url(self) -> str:
        return str(self.roundhouse.credentials["base_url"])

    @property
    def key(self) -> str:
        return str(self.roundhouse.credentials["api_key"])

    def python(self, code: str) -> str:
        """Run it where Roundhouse's own code runs; returns what it printed."""
        return python(self.roundhouse, code)

    def new_key(self, code: str = "") -> str:
        """The text of a new key, of which `code` makes something more."""
        return self.python(f"{KEY}{code}\nprint(text)").strip()

    def deploy(
        self, name: str, *, slots: int = 64, replicas: int = 1, seconds: float = 60, **wish: object
    ) -> None:
        """Deploy under a route of that name and wait until all replicas are ready. The engine is the
        simulated one, unless `wish` says otherwise."""
        wish = {"engine": "simulated", "arguments": {}} | wish
        source = wish.pop("model", None)
        self.python(
            "from registry.models import LanguageModel\n"
            "from registry.actions.language_models import add_language_model\n"
            "from registry.actions.deployments import deploy\n"
            f"model = LanguageModel.objects.get(name={source!r}) if {source!r} else "
            f"add_language_model(name={name!r}, source='/simulated', by='bench')\n"
            f"deploy(name={name!r}, language_model=model, route={name!r}, by='bench', "
            f"replicas={replicas}, slots={slots}, **{wish!r})"
        )
        self.ready(name, replicas=replicas, seconds=seconds)

    def scale(self, name: str, replicas: int, *, seconds: float = 300) -> None:
        """Start or stop replicas; returns when so many run."""
        self.python(
            "from registry.models import Deployment\n"
            "from registry.actions.deployments import scale_deployment\n"
            f"deployment = Deployment.objects.get(name={name!r})\n"
            f"scale_deployment(deployment=deployment, replicas={replicas}, by='bench')"
        )
        self.ready(name, replicas=replicas, seconds=seconds)

    def ready(self, name: str, *, replicas: int, seconds: float) -> None:
        """Wait until so many replicas are ready, or, for none, until the last process is gone."""
        live = "state = 'ready'" if replicas else "state NOT IN ('stopped', 'failed')"
        sql = (
            "SELECT count(*) FROM registry_worker w JOIN registry_deployment d ON d.id = w.deployment_id "
            f"WHERE w.{live} AND d.name = %s"
        )
        eventually(
            lambda: self.roundhouse.rows(sql, name)[0][0] == replicas,
            seconds=seconds,
            what=f"{name} has {replicas} workers {self.roundhouse.logs()}",
            every=0.2,
        )
        if replicas:
            time.sleep(1.5)  # the gateway reads the routes twice a second

    def model_folder(self, name: str) -> Path:
        """A language model of the registry as it lies in the user's cache."""
        [(source,)] = self.roundhouse.rows("SELECT source FROM registry_languagemodel WHERE name = %s", name)
        cache = os.environ.get("ROUNDHOUSE_CACHE", str(Path.home() / ".cache" / "roundhouse"))
        command = [sys.executable, "-m", "inference.sources", "--model", name, "--source", source]
        done = subprocess.run([*command, "--cache", cache], capture_output=True, check=True, text=True)
        return Path(json.loads(done.stdout.splitlines()[-1])["path"])

    def direct(self, name: str, question: dict[str, object]) -> Target:
        """Straight to the newest worker of a deployment, past the gateway."""
        return Target(*self.port_of(name), question)

    def port_of(self, name: str) -> tuple[str, str]:
        """The base URL of a deployment's newest worker, and the key to its port."""
        worker = self.roundhouse.worker(name)
        assert worker is not None
        secret_key = (self.roundhouse.data / "secret_key").read_text().strip()
        return f"{worker.url}/v1", worker_secret(secret_key, worker.id, worker.epoch)

    def through(self, question: dict[str, object], *, key: str = "") -> Target:
        """To the gateway."""
        return Target(self.base_url, key or self.key, question)

    def load(
        self,
        *,
        requests: int,
        connections: int,
        stream: bool,
        model: str = "instant",
        tokens: int = TOKENS,
        key: str = "",
    ) -> tuple[Tally, float]:
        """Run one load; returns what the clients saw and the gateway's CPU seconds until all is in the
        ledger."""
        before = self.settled_events()
        target = self.through(body(stream=stream, model=model, tokens=tokens), key=key)
        started = cpu(self.gateway)
        tally = asyncio.run(run(target, requests=requests, connections=connections))
        self.accounted(requests, before)
        return tally, cpu(self.gateway) - started

    def first_bytes(self, *, rounds: int, model: str = "instant") -> tuple[float, float]:
        """Median seconds to a stream's first byte when idle: through the gateway, and straight to the worker.

        The two are asked in turn, so that a machine that changes its speed changes both.
        """
        question = body(stream=True, model=model, tokens=2)
        return in_turn(self.through(question), self.direct(model, question), rounds=rounds)

    def parsing(self) -> dict[str, float]:
        """Seconds to read a request of each kind."""
        environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "config.settings.production",
            "ROUNDHOUSE_DATA": str(self.roundhouse.data),
        }
        command = [sys.executable, "-m", "bench.parsing"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        seconds: dict[str, float] = json.loads(done.stdout)
        return seconds

    def accounted(self, requests: int, before: int) -> None:
        """Wait until the ledger has as many new events as requests were sent; it must not be one more.
        `before`: what it had."""
        eventually(
            lambda: self.events() - before >= requests, seconds=20, what="every request is in the ledger"
        )
        if (found := self.events() - before) != requests:
            raise SystemExit(f"the ledger holds {found} new events for {requests} requests")

    def settled_events(self) -> int:
        """The ledger's count once nothing is on its way any more (it is at most 250 ms behind)."""
        before = -1
        while before != (before := self.events()):
            time.sleep(0.6)
        return before

    def events(self) -> int:
        return int(self.roundhouse.rows("SELECT count(*) FROM registry_usageevent")[0][0])


def in_turn(one: Target, other: Target, *, rounds: int) -> tuple[float, float]:
    """The medians of both first bytes."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for target, found in zip((one, other), seconds, strict=True):
            found += asyncio.run(run(target, requests=10, connections=1)).first_seconds
    return statistics.median(seconds[0]), statistics.median(seconds[1])


@contextmanager
def stage(*, models: bool = False, **settings: str) -> Iterator[Stage]:
    """A Roundhouse that runs, without workers; `models`: it knows those that come along, and has had them
    running. `settings` are its environment's."""
    data = Path(tempfile.mkdtemp(prefix="rh-bench-"))
    roundhouse = new_roundhouse(data, **settings)
    try:
        if not models:
            roundhouse.manage("migrate", "-v0")
            python(roundhouse, NO_MODELS)
        roundhouse.up()
        if models:
            python(roundhouse, STOP_ALL)
        yield Stage(roundhouse)
        log = (data / "log" / "gateway.log").read_text(errors="replace")
        if (at := log.find('event="request_crashed"')) >= 0:
            # What was measured then is mostly the writing of such lines.
            raise SystemExit(f"requests failed by a fault of ours:\n{log[max(0, at - 200) : at + 3000]}")
    finally:
        roundhouse.down()
        shutil.rmtree(data, ignore_errors=True)
