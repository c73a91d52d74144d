"""Starts a Roundhouse of its own, measures the gateway rows of the design's table, prints them."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import accounting, ledger
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
LIMITED = """
for metric in ("requests", "tokens"):
    save_limit(limit=Limit(api_key=key, metric=metric, per="minute", amount=10**9), by="bench")
"""
BUDGETED = """
save_budget(budget=Budget(scope="key", subject=key.public_id, unit="tokens", limit=10**12), by="bench")
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="What a request costs the gateway.")
    parser.add_argument("--requests", type=int, default=3000, help="plain requests per run (default 3000)")
    parser.add_argument("--events", type=int, help="only measure reports over so many events; takes long")
    parser.add_argument("--database", help="for --events: a PostgreSQL server's URL (default: SQLite)")
    arguments = parser.parse_args()
    if arguments.events:
        table(ledger.measured(arguments.events, arguments.database))
        return
    data = Path(tempfile.mkdtemp(prefix="rh-bench-"))
    roundhouse = new_roundhouse(data)
    try:
        roundhouse.up()
        # The real models only had to prove the start; their beats would be noise here.
        roundhouse.manage(
            "shell",
            "-v0",
            "-c",
            "from registry.models import Deployment\n"
            "from registry.actions.deployments import scale_deployment\n"
            "for deployment in Deployment.objects.all():\n"
            "    scale_deployment(deployment=deployment, replicas=0, by='bench')",
        )
        roundhouse.deploy_simulated("instant", token_seconds=0.0)
        roundhouse.deploy_simulated("paced", token_seconds=0.02)
        table(report(Bench(roundhouse), arguments.requests))
    finally:
        roundhouse.down()
        shutil.rmtree(data, ignore_errors=True)


class Bench:
    """Loads one Roundhouse and reads what that cost its gateway."""

    def __init__(self, roundhouse: Roundhouse) -> None:
        self.roundhouse = roundhouse
        self.gateway = roundhouse.part("gateway")

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
        """Run one load; returns what the clients saw and the gateway's CPU seconds meanwhile.

        The ledger must hold exactly as many new events afterwards.
        """
        facts = self.roundhouse.credentials
        before = self.settled_events()
        body = self.body(stream=stream, model=model, tokens=tokens)
        target = Target(facts["base_url"], key or facts["api_key"], body)
        started = self.cpu()
        tally = asyncio.run(run(target, requests=requests, connections=connections))
        eventually(
            lambda: self.events() - before >= requests, seconds=20, what="every request is in the ledger"
        )
        spent = self.cpu() - started
        found = self.events() - before
        if found != requests:
            raise SystemExit(f"the ledger holds {found} new events for {requests} requests")
        return tally, spent

    def new_key(self, code: str) -> str:
        """The text of a new key, of which `code` makes something more."""
        made = self.roundhouse.manage("shell", "-v0", "-c", KEY + code + "\nprint(text)")
        return made.stdout.strip()

    def first_bytes(self, *, rounds: int) -> tuple[float, float]:
        """Median seconds to a stream's first byte when idle: through the gateway, and straight to the worker.

        The two are asked in turn, so that a machine that changes its speed changes both.
        """
        facts = self.roundhouse.credentials
        worker = self.roundhouse.worker("instant")
        assert worker is not None
        secret_key = (self.roundhouse.data / "secret_key").read_text().strip()
        body = self.body(stream=True, model="instant", tokens=2)
        gateway = Target(facts["base_url"], facts["api_key"], body)
        straight = Target(f"{worker.url}/v1", worker_secret(secret_key, worker.id, worker.epoch), body)
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for target, found in zip((gateway, straight), seconds, strict=True):
                found += asyncio.run(run(target, requests=10, connections=1)).first_chunk_seconds
        return statistics.median(seconds[0]), statistics.median(seconds[1])

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

    @staticmethod
    def body(*, stream: bool, model: str, tokens: int) -> dict[str, object]:
        return {
            "model": model,
            "messages": [{"role": "user", "content": f"!tokens {tokens}"}],
            "stream": stream,
        }

    def cpu(self) -> float:
        times = self.gateway.cpu_times()
        return float(times.user + times.system)

    def settled_events(self) -> int:
        """The ledger's count once nothing is on its way any more (it is at most 250 ms behind)."""
        before = -1
        while before != (before := self.events()):
            time.sleep(0.6)
        return before

    def events(self) -> int:
        return int(self.roundhouse.rows("SELECT count(*) FROM registry_usageevent")[0][0])


def report(bench: Bench, requests: int) -> list[tuple[str, str, str]]:
    """Rows of what, how much, and the bar for it."""
    bench.load(requests=requests // 4, connections=8, stream=False)
    plain, plain_cpu = bench.load(requests=requests, connections=16, stream=False)
    per_plain = plain_cpu / requests
    more = {}
    for what, code in {"two limits": LIMITED, "a hard budget": BUDGETED}.items():
        _, cpu = bench.load(requests=requests, connections=16, stream=False, key=bench.new_key(code))
        more[what] = cpu / requests - per_plain
    streams = requests // 3
    stream, stream_cpu = bench.load(requests=streams, connections=16, stream=True)
    per_token = (stream_cpu / streams - per_plain) / TOKENS
    _, paced_cpu = bench.load(requests=100, connections=100, stream=True, model="paced")
    per_paced = (paced_cpu / 100 - per_plain) / TOKENS
    through, direct = bench.first_bytes(rounds=20)
    reading = bench.parsing()
    found = accounting.measured()
    on_the_path = found["spool"] + found["limits"]
    return [
        ("CPU per plain chat request", f"{per_plain * 1e3:.3f} ms", "0.40 ms"),
        ("CPU per streamed token, instant upstream", f"{per_token * 1e6:.1f} µs", "15 µs"),
        ("CPU per streamed token, 100 streams at 20 ms", f"{per_paced * 1e6:.1f} µs", "45 µs"),
        ("added time to first token, p50, idle", f"{(through - direct) * 1e3:.2f} ms", "1.0 ms"),
        ("parse a plain chat request", f"{reading['plain'] * 1e6:.1f} µs", "60 µs"),
        ("parse a 1 MB prompt", f"{reading['megabyte'] * 1e3:.2f} ms", "3 ms"),
        ("accounting on the request path, two limits", f"{on_the_path * 1e6:.1f} µs", "60 µs"),
        ("Redis commands per request, two limits", f"{found['Redis commands']:.2f}", "1"),
        ("more CPU per request of a key with two limits", f"{more['two limits'] * 1e6:.0f} µs", ""),
        ("more CPU per request of a key with a hard budget", f"{more['a hard budget'] * 1e6:.0f} µs", "1 ms"),
        ("an event into the ledger, in batches of 20", f"{found['event in batches of 20'] * 1e6:.0f} µs", ""),
        ("plain requests per second, 16 connections", f"{requests / plain.seconds:.0f}", ""),
        ("streamed tokens per second, 16 connections", f"{stream.chunks / stream.seconds:.0f}", ""),
        ("gateway RSS", f"{bench.gateway.memory_info().rss / 1e6:.0f} MB", ""),
    ]


def table(rows: list[tuple[str, str, str]]) -> None:
    """Print them."""
    width = max(len(name) for name, _, _ in rows)
    print(f"{'what':{width}}  {'measured':>10}  {'bar':>8}")
    for name, value, bar in rows:
        print(f"{name:{width}}  {value:>10}  {bar:>8}")


if __name__ == "__main__":
    main()
