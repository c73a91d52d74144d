"""A backup is restored that is older than the spool. FAULTS.md's row F58."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.apart import AMPLE, Apart, own_server
from tests.api.conftest import Worker


class Sqlite:
    """As docs/operating.md tells."""

    def __init__(self, folder: Path) -> None:
        self._database, self._copy = folder / "roundhouse.sqlite3", folder / "backup.sqlite3"
        self.url = f"sqlite:///{self._database}"

    def back_up(self) -> None:
        with contextlib.closing(sqlite3.connect(self._database)) as connection:
            connection.execute(f"VACUUM INTO '{self._copy}'")

    def restore(self) -> None:
        for ending in ("-wal", "-shm"):
            self._database.with_name(self._database.name + ending).unlink(missing_ok=True)
        shutil.copy(self._copy, self._database)


class Postgres:
    def __init__(self, url: str, binaries: Path, folder: Path) -> None:
        self.url = url
        # `pg_ctl` may be linked to where only it is.
        self._binaries, self._copy = (binaries / "pg_ctl").resolve().parent, folder / "backup.dump"

    def back_up(self) -> None:
        self._run("pg_dump", "--format=custom", f"--file={self._copy}", f"--dbname={self.url}")

    def restore(self) -> None:
        self._run("pg_restore", "--clean", "--if-exists", f"--dbname={self.url}", str(self._copy))

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run([self._binaries / program, *arguments], check=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sqlite | Postgres]:
    if request.param == "sqlite":
        yield Sqlite(tmp_path)
        return
    with own_server() as server:
        yield Postgres(server.url, server.binaries, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(180)
async def test_f58_what_a_spool_has_counts_once_whatever_the_backup_holds(
    database: Sqlite | Postgres, worker: Worker, tmp_path: Path
) -> None:
    """F58: of what a killed gateway's spool has, some is in the backup, some came to the ledger after it, and
    some never did. All of it is there after the restored start, once, in the budgets too."""
    apart = Apart(database.url, tmp_path, worker, limits=[AMPLE])
    plain, held = apart.key(), apart.held_key()
    with apart.gateway() as (port, process):
        async with apart.clients(port) as clients:
            both = [clients.ask(key) for key in (plain, held) * 5]
            assert all(each.whole for each in await asyncio.gather(*both))
            apart.agree(clients.seen)
            # Open while the backup is made, with a hold in it.
            streams = [
                asyncio.create_task(clients.ask(key, "!tokens 500 !slow 0.05", stream=True))
                for key in (plain, held)
            ]
            await asyncio.sleep(0.3)
            await asyncio.to_thread(database.back_up)
            done = await asyncio.gather(*[clients.ask(key) for key in (plain, held) * 5])
            assert all(each.whole for each in done)
            await asyncio.sleep(1)
            process.send_signal(signal.SIGKILL)
            assert not any(each.whole for each in await asyncio.gather(*streams))
    after_backup = "SELECT count(*) FROM registry_usageevent"
    assert apart.rows(after_backup) == [(20,)]
    database.restore()
    assert apart.rows(after_backup) == [(10,)]
    with apart.gateway() as (port, _):
        async with apart.clients(port) as again:
            assert (await again.ask(held)).whole
            apart.agree(clients.seen + again.seen)
    assert apart.rows(after_backup) == [(23,)]
