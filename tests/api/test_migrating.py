"""The database is migrated while an older gateway serves. FAULTS.md's row F33."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.api.apart import AMPLE, Apart, own_server
from tests.api.conftest import ROOT, Worker

TABLES = ["usageevent", "budgetperiod", "hold", "apikey", "worker", "change"]
MIGRATION = """
from django.db import migrations, models

class Migration(migrations.Migration):
    dependencies = [("registry", {before!r})]
    operations = [
        migrations.AddField({table!r}, "maybe", models.CharField(max_length=10, null=True)),
        migrations.AddField({table!r}, "number", models.IntegerField(default=7, db_default=7)),
    ]
"""
"""What a next version adds: an older one that inserts a row does not know of it. One table per migration:
each is a transaction, and one with two tables could wait for another of two tables in a circle."""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/roundhouse.sqlite3"
        return
    with own_server() as server:
        yield server.url


def next_version(folder: Path) -> None:
    """The registry's migrations and, after them, one for each of `TABLES`."""
    migrations = ROOT / "registry" / "migrations"
    before = max(path.stem for path in migrations.glob("[0-9]*.py"))
    package = folder / "wider"
    package.mkdir()
    (package / "__init__.py").write_text(f"__path__ = [{str(migrations)!r}, *__path__]\n")
    for number, table in enumerate(TABLES):
        name = f"{9000 + number}_{table}"
        (package / f"{name}.py").write_text(MIGRATION.format(before=before, table=table))
        before = name
    (folder / "wider_settings.py").write_text(
        "from config.settings.production import *\nMIGRATION_MODULES = {'registry': 'wider'}\n"
    )


@pytest.mark.full
@pytest.mark.timeout(180)
async def test_f33_columns_are_added_under_traffic_without_an_error(
    url: str, worker: Worker, tmp_path: Path
) -> None:
    """F33: nothing is refused, nobody waits a second, every token is in the ledger, and its guard stands."""
    apart = Apart(url, tmp_path, worker, limits=[AMPLE] * 2)
    plain, held = apart.key(), apart.held_key()
    next_version(tmp_path)
    with apart.gateway() as (port, _):
        async with apart.clients(port) as clients:
            ended = asyncio.Event()

            async def ask_on(key: str) -> None:
                stream = True
                while not ended.is_set():
                    await clients.ask(key, "!tokens 4 !slow 0.01", stream=(stream := not stream))

            asking = [asyncio.create_task(ask_on(key)) for key in (plain, held) * 3]
            await asyncio.sleep(1)
            told = await asyncio.to_thread(
                apart.manage,
                "migrate",
                "registry",
                PYTHONPATH=f"{tmp_path}:{apart.environment['PYTHONPATH']}",
                DJANGO_SETTINGS_MODULE="wider_settings",
            )
            assert told.count("... OK") == len(TABLES)
            await asyncio.sleep(1)
            ended.set()
            await asyncio.gather(*asking)
            # A key and a budget that the gateway had not met before.
            assert (await clients.ask(apart.held_key())).whole
            assert all(each.whole for each in clients.seen)
            assert len(clients.seen) > 100
            assert max(each.waited for each in clients.seen) < 1
            apart.agree(clients.seen)
    assert apart.rows("SELECT DISTINCT number, maybe FROM registry_usageevent") == [(7, None)]
    with pytest.raises((psycopg.IntegrityError, sqlite3.IntegrityError), match="append-only"):
        apart.rows("UPDATE registry_usageevent SET number = 8")
