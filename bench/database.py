"""A database that nobody else uses."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def own_database(server: str | None) -> Iterator[dict[str, str]]:
    """The environment of processes that use a new, migrated database: SQLite, or one on the PostgreSQL server
    of this URL. It is dropped at the end."""
    data = Path(tempfile.mkdtemp(prefix="rh-bench-"))
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "config.settings.production",
        "ROUNDHOUSE_DATA": str(data),
        "DATABASE_URL": "",
    }
    name = f"roundhouse_bench_{secrets.token_hex(4)}"
    try:
        if server is not None:
            _tell(server, "CREATE DATABASE {}", name)
            environment["DATABASE_URL"] = urlsplit(server)._replace(path=f"/{name}").geturl()
        migrate = [sys.executable, str(ROOT / "manage.py"), "migrate", "-v0"]
        subprocess.run(migrate, env=environment, check=True)
        yield environment
    finally:
        if server is not None:
            _tell(server, "DROP DATABASE IF EXISTS {} WITH (FORCE)", name)
        shutil.rmtree(data, ignore_errors=True)


def _tell(server: str, statement: str, name: str) -> None:
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(sql.Identifier(name)))
