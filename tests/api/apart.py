"""Gateways apart: processes on a database of their own, which a test may take away from them. What clients
saw is compared with the ledger as it stands there, read from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
from django.conf import settings

from tests.api.conftest import CAPABILITIES, ROOT, ROUTE, WORKER_ID, Worker, eventually, process_serving, say
from tests.services import OwnPostgres, free_port, missing, own_postgres

AMPLE = 10**9
"""A hard budget that refuses nothing."""

FACTS = """
import json, sys
from django.core.management import call_command
call_command("migrate", verbosity=0)
from registry.models import Deployment
from tests.factories import make_api_key, make_budget, make_deployment, make_worker
wish = json.loads(sys.stdin.read())
deployment = make_deployment(route=wish["route"], queue_limit=1000)
make_worker(deployment=deployment, id=wish["worker"], url=wish["url"], capabilities=wish["capabilities"])
keys = [make_api_key(name=f"plain {number}") for number in range(wish["plain"])]
held = [make_api_key(name=f"held {number}") for number in range(len(wish["limits"]))]
for (key, _), limit in zip(held, wish["limits"]):
    make_budget(limit=limit, subject=key.public_id, subject_name=key.name)
print(json.dumps([[text for _, text in keys], [text for _, text in held]]))
"""


def public_id(key: str) -> str:
    return key.split("-")[1]


@dataclass
class Seen:
    """What one client saw of one request."""

    key: str
    status: int = 0
    """0: no answer came."""
    request_id: str = ""
    code: str | None = None
    retry_after: int | None = None
    waited: float = 0.0
    """Seconds until it had a status."""
    tokens: int = 0
    """Pieces of a stream's text."""
    usage: tuple[int, int] | None = None
    whole: bool = False
    """It saw the end of the answer."""
    longest_pause: float = 0.0
    """Seconds between two pieces of a stream."""

    def refused(self) -> bool:
        """Was it told, as one that may come again, that the storage is away?"""
        return (self.status, self.code) == (503, "storage") and self.retry_after in range(1, 4)


@dataclass
class Clients:
    """Clients of one gateway, and what each of them has seen."""

    port: int
    session: aiohttp.ClientSession
    seen: list[Seen] = field(default_factory=list)

    async def ask(self, key: str, text: str = "!tokens 3", *, stream: bool = False, **fields: Any) -> Seen:
        seen = Seen(key)
        self.seen.append(seen)
        began = time.monotonic()
        body = say(text, **fields)
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        headers = {"Authorization": f"Bearer {key}"}
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        with contextlib.suppress(aiohttp.ClientConnectionError, aiohttp.ClientPayloadError):
            async with self.session.post(url, json=body, headers=headers) as answer:
                seen.waited = time.monotonic() - began
                seen.status = answer.status
                seen.request_id = answer.headers["x-request-id"]
                if stream and answer.status == 200:
                    await _read_stream(seen, answer)
                    return seen
                told = await answer.json()
                if answer.status == 200:
                    seen.whole = True
                    seen.usage = told["usage"]["prompt_tokens"], told["usage"]["completion_tokens"]
                else:
                    seen.code = told["error"]["code"]
                    if "retry-after" in answer.headers:
                        seen.retry_after = int(answer.headers["retry-after"])
        return seen

    async def status(self, path: str) -> int:
        async with self.session.get(f"http://127.0.0.1:{self.port}{path}") as answer:
            return answer.status

    async def until_ready(self, ready: bool = True, *, seconds: float = 10.0) -> float:
        """Wait until /readyz says so; returns how long that took."""
        began = time.monotonic()
        while await self.status("/readyz") != (200 if ready else 503):
            assert time.monotonic() - began < seconds, f"/readyz is not {ready} within {seconds} s"
            await asyncio.sleep(0.05)
        return time.monotonic() - began


async def _read_stream(seen: Seen, answer: aiohttp.ClientResponse) -> None:
    last = time.monotonic()
    async for line in answer.content:
        if line == b"data: [DONE]\n":
            seen.whole = True
        elif line.startswith(b"data: "):
            chunk = json.loads(line[6:])
            seen.code = chunk.get("error", {}).get("code")
            if usage := chunk.get("usage"):
                seen.usage = usage["prompt_tokens"], usage["completion_tokens"]
            if chunk.get("choices") and chunk["choices"][0]["delta"].get("content"):
                seen.tokens += 1
                now = time.monotonic()
                seen.longest_pause, last = max(seen.longest_pause, now - last), now


@contextlib.contextmanager
def own_server() -> Iterator[OwnPostgres]:
    """A PostgreSQL server that nobody else uses. Without an installed one the test cannot run."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(own_postgres())
        except RuntimeError as error:
            missing(str(error))
        yield server


class Apart:
    """A migrated database of its own, with one route that the session's worker answers, and keys."""

    def __init__(self, url: str, folder: Path, worker: Worker, *, limits: Sequence[int] = ()) -> None:
        """Make it: keys enough, and one for each of `limits`, its hard budget in tokens."""
        self.url = url
        self.data = folder / "data"
        wish = {"route": ROUTE, "worker": WORKER_ID, "url": worker.url, "capabilities": CAPABILITIES}
        told = self.manage("shell", "-v0", "-c", FACTS, says=wish | {"plain": 150, "limits": limits})
        self._plain, held = json.loads(told)
        self._held = list(zip(limits, held, strict=True))

    def key(self) -> str:
        """A key that no gateway has seen."""
        return str(self._plain.pop())

    def held_key(self, limit: int = AMPLE) -> str:
        """One that no gateway has seen, with a hard budget of this limit."""
        at = next(at for at, (given, _) in enumerate(self._held) if given == limit)
        return str(self._held.pop(at)[1])

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
            "DATABASE_URL": self.url,
            "ROUNDHOUSE_DATA": str(self.data),
            "ROUNDHOUSE_SECRET_KEY": settings.SECRET_KEY,
            "DJANGO_SETTINGS_MODULE": "config.settings.production",
        }

    def manage(self, *arguments: str, says: object = None, **environment: str) -> str:
        """Run `manage.py`; returns what it printed."""
        return subprocess.run(
            [sys.executable, str(ROOT / "manage.py"), *arguments],
            env=self.environment | environment,
            cwd=ROOT,
            input=json.dumps(says),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=60,
        ).stdout

    @contextlib.contextmanager
    def gateway(self) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
        """A gateway process; its port. All of them share one data folder, as on one machine."""
        port = free_port()
        command = (str(ROOT / "manage.py"), "gateway", "--port", str(port))
        with process_serving(*command, port=port, data=self.data, DATABASE_URL=self.url) as process:
            yield port, process

    @contextlib.asynccontextmanager
    async def clients(self, port: int) -> AsyncIterator[Clients]:
        timeout = aiohttp.ClientTimeout(total=60)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            yield Clients(port, session)

    def rows(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        if self.url.startswith("postgres"):
            with psycopg.connect(self.url, autocommit=True) as connection:
                return connection.execute(sql, parameters).fetchall()
        with contextlib.closing(
            sqlite3.connect(self.url.removeprefix("sqlite:///"), timeout=10)
        ) as connection:
            return connection.execute(sql.replace("%s", "?"), parameters).fetchall()

    def agree(self, seen: Sequence[Seen], *, seconds: float = 10.0) -> None:
        """Within so long the ledger has what these clients saw, each request once, and nothing else of their
        keys; their budgets have what the ledger has, and hold nothing."""
        keys = {public_id(each.key) for each in seen}
        answered = {each.request_id for each in seen if each.status == 200}

        def arrived() -> bool:
            ids = {row[0] for row in self._events(keys)}
            return answered <= ids and not self._held_by(keys)

        eventually(arrived, "the ledger has what the clients saw", seconds=seconds, every=0.1)
        events = self._events(keys)
        found = {row[0]: row for row in events}
        assert len(found) == len(events), "one event per request id"
        by_id = {each.request_id: each for each in seen if each.status}
        silent = [each for each in seen if not each.status]
        strange = found.keys() - by_id.keys()
        assert len(strange) <= len(silent), "an event is of a request that a client sent"
        for request_id, _, outcome, prompt, completion in events:
            each = by_id.get(request_id)
            if each is None:
                continue
            if each.status != 200:
                assert (outcome, prompt, completion) == ("failed", 0, 0), each
            elif each.whole:
                assert (outcome, (prompt, completion)) == ("ok", each.usage), each
            else:
                assert completion >= each.tokens, each
        for key, spent in self._spent(keys):
            assert spent == sum(row[3] + row[4] for row in events if row[1] == key), key

    def _events(self, keys: set[str]) -> list[tuple[Any, ...]]:
        rows = self.rows(
            "SELECT request_id, key_public_id, outcome, prompt_tokens, completion_tokens "
            "FROM registry_usageevent"
        )
        return [row for row in rows if row[1] in keys]

    def _spent(self, keys: set[str]) -> list[tuple[str, int]]:
        rows = self.rows(
            "SELECT b.subject, p.spent FROM registry_budgetperiod p "
            "JOIN registry_budget b ON b.id = p.budget_id"
        )
        return [(subject, spent) for subject, spent in rows if subject in keys]

    def _held_by(self, keys: set[str]) -> int:
        """What is set aside in their budgets, by the periods and by the holds."""
        rows = self.rows(
            "SELECT b.subject, p.held, "
            "(SELECT count(*) FROM registry_hold h WHERE h.budget_period_id = p.id) "
            "FROM registry_budgetperiod p JOIN registry_budget b ON b.id = p.budget_id"
        )
        return sum(held + holds for subject, held, holds in rows if subject in keys)
