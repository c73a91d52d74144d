"""SQLite is locked, full or cannot be written, under a gateway that goes on. FAULTS.md's rows F31 and F32."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import sqlite3
import subprocess
import weakref
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from django.db import DatabaseError, connection

from registry.threads import in_database
from tests.api.apart import AMPLE, Apart, Seen
from tests.api.conftest import Worker


@pytest.fixture(scope="module")
def apart(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> Apart:
    folder = tmp_path_factory.mktemp("apart")
    return Apart(f"sqlite:///{folder}/roundhouse.sqlite3", folder, worker, limits=[AMPLE] * 20)


@pytest.fixture(scope="module")
def gateway(apart: Apart) -> Iterator[tuple[int, psutil.Process]]:
    with apart.gateway() as (port, process):
        yield port, psutil.Process(process.pid)


@contextlib.contextmanager
def locked(apart: Apart) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(apart.url.removeprefix("sqlite:///"), timeout=10)) as connection:
        connection.isolation_level = None
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


@pytest.mark.parametrize("seconds", [6, pytest.param(15, marks=pytest.mark.full)])
async def test_f31_while_sqlite_is_locked_reads_go_on_and_what_was_used_waits(
    apart: Apart, gateway: tuple[int, psutil.Process], seconds: float
) -> None:
    """F31: longer than any write waits. A hard budget's requests wait for 5 s at most, and are told to come
    again; keys are served, new ones too; and the gateway says that it is ready."""
    known, held = apart.key(), apart.held_key()
    async with apart.clients(gateway[0]) as clients:
        assert (await clients.ask(known)).whole
        assert (await clients.ask(held)).whole
        with locked(apart):
            ending = asyncio.create_task(asyncio.sleep(seconds))
            streams = [
                asyncio.create_task(clients.ask(known, "!tokens 60 !slow 0.05", stream=True))
                for _ in range(3)
            ]
            served: list[Seen] = []
            refused: list[asyncio.Task[Seen]] = []
            while not ending.done():
                refused.append(asyncio.create_task(clients.ask(held)))
                served += await asyncio.gather(clients.ask(known), clients.ask(apart.key()))
                assert await clients.status("/readyz") == 200
                await asyncio.sleep(0.25)
        # They wait for nobody; the rest is for a busy test machine.
        assert not [each for each in served if not each.whole or each.waited > 2]
        for stream in await asyncio.gather(*streams):
            assert stream.whole
            assert stream.longest_pause < 1
        of_held = await asyncio.gather(*refused)
        assert all(each.whole or each.refused() for each in of_held)
        assert max(each.waited for each in of_held) < 6.5
        assert any(each.refused() for each in of_held)
        assert (await clients.ask(held)).whole
        apart.agree(clients.seen)


@pytest.mark.django_db(transaction=True)
async def test_f31_what_failed_is_let_go_in_its_own_thread() -> None:
    """F31: were a failed cursor left to the collector, the thread in which that runs, the event loop's for
    one, would wait with the cursor's connection for the lock."""
    cursors: list[weakref.ref[sqlite3.Cursor]] = []

    def fail() -> None:
        cursor = connection.cursor()
        cursors.append(weakref.ref(cursor.cursor))
        cursor.execute("SELECT nothing")

    gc.disable()
    try:
        with pytest.raises(DatabaseError):
            await in_database(fail)
        assert [cursor() for cursor in cursors] == [None]
    finally:
        gc.enable()


class Full:
    """A disk that has no room for a process: none of its files grows, or is written, beyond so many bytes.
    Which needs no rights, as a small disk of one's own does."""

    def __init__(self, process: psutil.Process, size: int) -> None:
        self._process = process
        self._size = size

    def __enter__(self) -> None:
        self._limit(self._size)

    def __exit__(self, *_: object) -> None:
        self._limit(resource.RLIM_INFINITY)

    def _limit(self, size: int) -> None:
        self._process.rlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


async def test_f32_without_room_for_the_database_requests_are_served_and_their_usage_waits(
    apart: Apart, gateway: tuple[int, psutil.Process]
) -> None:
    """F32: the spool, whose files are small, has room. Only hard budgets are refused."""
    known, held = apart.key(), apart.held_key()
    async with apart.clients(gateway[0]) as clients:
        assert (await clients.ask(known)).whole
        assert (await clients.ask(held)).whole
        apart.agree(clients.seen)
        with Full(gateway[1], 500_000):
            stream = asyncio.create_task(clients.ask(known, "!tokens 40 !slow 0.05", stream=True))
            async with asyncio.timeout(15):
                # Until the log of the database's changes has grown so long.
                while not (await clients.ask(held)).refused():
                    assert (await clients.ask(known)).whole
            served = await asyncio.gather(*(clients.ask(key) for key in [known] * 10 + [apart.key()] * 2))
            assert all(each.whole for each in served)
            assert (await clients.ask(held)).refused()
            assert (await stream).whole
        assert (await clients.ask(held)).whole
        apart.agree(clients.seen)


async def test_f32_without_room_for_the_spool_new_requests_are_refused_and_running_ones_are_counted(
    apart: Apart, gateway: tuple[int, psutil.Process]
) -> None:
    """F32: nothing can be written at all. What cannot be accounted for is not begun."""
    known, held = apart.key(), apart.held_key()
    async with apart.clients(gateway[0]) as clients:
        assert (await clients.ask(known)).whole
        assert (await clients.ask(held)).whole
        streams = [
            asyncio.create_task(clients.ask(key, "!tokens 40 !slow 0.05", stream=True))
            for key in (known, held)
        ]
        await asyncio.sleep(0.3)
        with Full(gateway[1], 1):
            files = len(gateway[1].open_files())
            refused = await asyncio.gather(*(clients.ask(key) for key in (known, held, apart.key()) * 30))
            assert all(each.refused() for each in refused)
            assert await clients.status("/healthz") == 200
            await clients.until_ready(False, seconds=1)
            assert len(gateway[1].open_files()) < files + 10, "no file is left open for one that was refused"
            for stream in await asyncio.gather(*streams):
                assert stream.whole
                assert stream.tokens == 40
        await clients.until_ready(seconds=2)
        assert (await clients.ask(held)).whole
        assert (await clients.ask(known)).whole
        apart.agree(clients.seen)


# -- A disk of its own, which a mount makes.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True)
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {made.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(file: Path) -> None:
    with contextlib.suppress(OSError), open(file, "wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)


@pytest.mark.full
async def test_f32_a_disk_full_to_the_brim_is_told_and_gets_over(worker: Worker, disk: Path) -> None:
    """F32: database and spool on one disk, as they are by default."""
    apart = Apart(f"sqlite:///{disk}/roundhouse.sqlite3", disk, worker, limits=[AMPLE])
    known, held = apart.key(), apart.held_key()
    with apart.gateway() as (port, _):
        async with apart.clients(port) as clients:
            assert (await clients.ask(known)).whole
            assert (await clients.ask(held)).whole
            streams = [
                asyncio.create_task(clients.ask(key, "!tokens 40 !slow 0.05", stream=True))
                for key in (known, held)
            ]
            await asyncio.sleep(0.5)
            fill(disk / "ballast")
            # What the last block of a file has room for is still taken.
            async with asyncio.timeout(10):
                while not (await clients.ask(known)).refused():
                    pass
            assert (await clients.ask(held)).refused()
            await clients.until_ready(False, seconds=1)
            for stream in await asyncio.gather(*streams):
                assert stream.whole
                assert stream.tokens == 40
            (disk / "ballast").unlink()
            await clients.until_ready(seconds=5)
            assert (await clients.ask(held)).whole
            assert (await clients.ask(known)).whole
            apart.agree(clients.seen)


@pytest.mark.full
async def test_f32_a_database_that_cannot_be_written_is_told_and_gets_over(
    worker: Worker, disk: Path, tmp_path: Path
) -> None:
    """F32: it is mounted read-only when the gateway starts."""
    apart = Apart(f"sqlite:///{disk}/roundhouse.sqlite3", tmp_path, worker, limits=[AMPLE])
    known, held = apart.key(), apart.held_key()
    remount(disk, "ro")
    with apart.gateway() as (port, _):
        async with apart.clients(port) as clients:
            assert await clients.status("/healthz") == 200
            assert (await clients.ask(held)).refused()
            first = await clients.ask(known)
            assert first.whole or first.refused()
            remount(disk, "rw")
            await clients.until_ready()
            assert (await clients.ask(known)).whole
            assert (await clients.ask(held)).whole
            apart.agree(clients.seen)
