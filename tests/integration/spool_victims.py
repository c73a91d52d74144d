"""Gateways that are killed: `python -m tests.integration.spool_victims FOLDER ROUNDS SEED`.

Each round forks a process that opens, counts and closes requests as fast as it can, and writes down what it
promised before it goes on; after a random moment it gets SIGKILL. All share one spool root, so that
each also settles what those before it left, and may be killed over that. Their ledger is a file.

    FOLDER/spool         the spool root
    FOLDER/promises      one line per promise: what, id, completion tokens, a full stop
    FOLDER/ledger        one line per batch that the ledger accepted

A kill can cut a write at the end of a memory page: each line of these begins after a line end of its own and
shows whether it is whole.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import django

PROMPT_TOKENS = 11


def main(folder: Path, rounds: int, seed: int) -> None:
    source = random.Random(seed)
    for number in range(rounds):
        child = os.fork()
        if child == 0:
            asyncio.run(serve(folder, number, random.Random(seed + number)))
            os._exit(0)
        time.sleep(source.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


async def serve(folder: Path, number: int, source: random.Random) -> None:
    from registry import spool as spool_module
    from registry.models import UsageEvent
    from registry.spool import Closed, Opened, Spool

    # Small and quick, so that a kill meets rotation and deletion too.
    spool_module.SEGMENT_BYTES = 2048
    spool_module.MOVE_SECONDS = 0.004
    promises = os.open(folder / "promises", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    ledger = os.open(folder / "ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def record(events) -> None:
        fields = [field.attname for field in UsageEvent._meta.concrete_fields if field.attname != "id"]
        rows = [{name: getattr(event, name) for name in fields} for event in events]
        os.write(ledger, b"\n" + json.dumps(rows, default=str).encode() + b"\n")

    def promise(what: str, name: str, tokens: int) -> None:
        os.write(promises, f"\n{what} {name} {tokens} .\n".encode())

    spool = Spool(folder / "spool", "victim", record=record)
    await spool.start()
    running = {}
    for turn in range(1_000_000):
        await asyncio.sleep(0)
        if len(running) < 12:
            name = f"{number}-{turn}"
            running[name] = [spool.open(opened(name, Opened)), 0]
            promise("opened", name, 0)
            continue
        name = source.choice(list(running))
        entry, tokens = running[name]
        if source.random() < 0.8:
            tokens = running[name][1] = tokens + source.choice((1, 2, 200))
            entry.count(prompt_tokens=PROMPT_TOKENS, completion_tokens=tokens)
            promise("seen", name, tokens)
        else:
            del running[name]
            entry.close(
                Closed(status=200, outcome="ok", prompt_tokens=PROMPT_TOKENS, completion_tokens=tokens)
            )
            promise("closed", name, tokens)


def opened(name: str, make):
    return make(
        request_id=name,
        started_at=1_700_000_000.5,
        project_id=1,
        project_name="project",
        key_public_id="key",
        key_name="key",
        route="chat",
        endpoint="/v1/chat/completions",
        stream=True,
    )


if __name__ == "__main__":
    django.setup()
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
