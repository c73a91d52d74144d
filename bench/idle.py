"""Ten thousand streams that say nothing: what they take, and what others feel of them.

A stream takes two of the gateway's sockets, and all of them start under one limit of open files; where that
allows fewer streams, as many are opened as it does, and the table says how many.
"""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from bench.load import OK, Target, run
from bench.rows import Row, quantile
from bench.stage import Stage, body, cpu, stage

STREAMS = 10_000
OTHER_FILES = 250
"""Of the gateway, and sockets for those who ask meanwhile."""
TOKEN_SECONDS = 45
"""Of an idle stream; a worker that says nothing for a minute is given up."""
SLOTS = 4096
"""Of a worker: more it cannot have."""
PER_SECOND = 250
"""Streams that are opened."""
PROBES = 400
PROBE_SECONDS = 0.05
"""From one who asks to the next: long enough in all for what the gateway does every ten seconds."""
IDLE_BYTES = 1e9


def rows() -> list[Row]:
    files = raise_file_limit(2 * STREAMS + OTHER_FILES)
    streams = min(STREAMS, (files - OTHER_FILES) // 2)
    with stage() as bench:
        bench.deploy("idle", slots=SLOTS, replicas=-(-streams // SLOTS), policy="round_robin")
        bench.deploy("instant", arguments={"token_seconds": 0.0})
        target = bench.through(body(stream=True, model="instant", tokens=2))
        asyncio.run(run(target, requests=50, connections=1))  # the first are slower
        started = cpu(bench.gateway)
        alone = first_tokens(target)
        empty = bench.gateway.memory_info().rss
        empty_busy = cpu(bench.gateway) - started
        with sleeping(bench, streams) as opened_in:
            started = cpu(bench.gateway)
            beside = first_tokens(target)
            busy = cpu(bench.gateway) - started
            full = bench.gateway.memory_info().rss
    found = [
        Row("idle streams", streams),
        Row("time to open them", opened_in, "s"),
        Row("gateway memory (RSS) without them", empty, "MB"),
        Row("gateway memory (RSS) with them", full, "MB", IDLE_BYTES),
        Row("memory per stream", (full - empty) / streams, "MB"),
        Row("gateway CPU that they take, of one core", (busy - empty_busy) / (PROBES * PROBE_SECONDS)),
    ]
    for share, name, bar in ((0.5, "p50", None), (0.99, "p99", 1.2)):
        without, beside_them = quantile(alone, share), quantile(beside, share)
        found += [
            Row(f"others' time to first token without them, {name}", without, "ms"),
            Row(f"others' time to first token with them, {name}", beside_them, "ms"),
            Row(f"with, of without, {name}", beside_them / without, bar=bar),
        ]
    return [*found, Row("others' time to first token with them, the longest", max(beside), "ms")]


def raise_file_limit(wanted: int) -> int:
    """For this process and those it starts; returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    return allowed if soft == resource.RLIM_INFINITY else soft


def first_tokens(target: Target) -> list[float]:
    """What they take for one who asks now and then."""

    async def ask() -> list[float]:
        found = []
        began = time.monotonic()
        async with target.connected() as connection:
            for at in range(PROBES):
                await asyncio.sleep(max(0.0, began + at * PROBE_SECONDS - time.monotonic()))
                seen = await connection.ask()
                if seen.status != OK:
                    raise RuntimeError(seen.head.decode())
                found.append(seen.first)
        return found

    return asyncio.run(ask())


@contextmanager
def sleeping(bench: Stage, streams: int) -> Iterator[float]:
    """So many open streams, held by a process of their own; yields the seconds that opening them took."""
    question = body(stream=True, model="idle", tokens=1000, more=f"!slow {TOKEN_SECONDS}")
    with subprocess.Popen(
        [sys.executable, "-m", "bench.idle"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        began = time.monotonic()
        print(json.dumps([bench.base_url, bench.key, question, streams]), file=process.stdin, flush=True)
        if (line := process.stdout.readline()) != "open\n":
            process.kill()
            raise SystemExit(f"the streams do not open: {line!r}")
        try:
            yield time.monotonic() - began
        finally:
            held = len(psutil.Process(process.pid).net_connections())
            process.stdin.close()
            process.wait(60)
            if held < streams:
                raise SystemExit(f"only {held} of {streams} streams were still open at the end")


def main() -> None:
    """Opens the streams that a line of stdin asks for, says "open", and holds them until stdin ends."""
    base_url, key, question, streams = json.loads(sys.stdin.readline())
    raise_file_limit(streams + OTHER_FILES)
    asyncio.run(hold(Target(base_url, key, question), streams))


async def hold(target: Target, streams: int) -> None:
    opened = 0
    writers: list[asyncio.StreamWriter] = []

    async def open_one(at: int) -> None:
        nonlocal opened
        await asyncio.sleep(at / PER_SECOND)
        reader, writer = await asyncio.open_connection(target.host, target.port, limit=4096)
        writers.append(writer)
        writer.write(target.request)
        # A stream that says nothing gets a comment every ten seconds; with the first it has begun.
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(head.decode())
        opened += 1
        if opened == streams:
            print("open", flush=True)
        while await reader.read(4096):
            pass
        raise RuntimeError("a stream ended")

    tasks = [asyncio.create_task(open_one(at)) for at in range(streams)]
    ending = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    done, _ = await asyncio.wait([*tasks, ending], return_when=asyncio.FIRST_COMPLETED)
    for task in done - {ending}:
        task.result()
    for writer in writers:
        writer.transport.abort()
    for task in tasks:
        task.cancel()


if __name__ == "__main__":
    main()
