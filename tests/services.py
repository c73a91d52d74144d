"""The servers that tests need: those that run already, else ones started here from installed binaries."""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import redis

POSTGRES = "postgres://postgres@127.0.0.1:5432/postgres"
REDIS = "redis://127.0.0.1:6379/9"
"""A database number of our own on a Redis that others may use."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def postgres() -> Iterator[str | None]:
    """The address of a PostgreSQL server, or None when there is none to run or start."""
    if _postgres_answers(POSTGRES):
        yield POSTGRES
        return
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("pg_ctl")
    if found:
        binaries.insert(0, Path(found).parent)
    if not binaries:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="rh-pg-") as folder:
        yield from _own_postgres(binaries[0], Path(folder))


def _own_postgres(binaries: Path, folder: Path) -> Iterator[str]:
    port = free_port()
    # PostgreSQL refuses to run as root: then the account that its package made runs it.
    account = "postgres" if os.getuid() == 0 else None
    if account:
        os.chown(folder, pwd.getpwnam(account).pw_uid, -1)

    def run(*command: str) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=account, cwd=folder)

    run(str(binaries / "initdb"), "-D", str(folder / "data"), "-U", "postgres", "-A", "trust")
    options = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    run(
        *(str(binaries / "pg_ctl"), "-D", str(folder / "data"), "-w"),
        *("-l", str(folder / "log"), "-o", options, "start"),
    )
    try:
        yield f"postgres://postgres@127.0.0.1:{port}/postgres"
    finally:
        run(str(binaries / "pg_ctl"), "-D", str(folder / "data"), "-m", "immediate", "stop")


def _postgres_answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=3).close()
    except psycopg.OperationalError:
        return False
    return True


@contextlib.contextmanager
def own_database(server: str) -> Iterator[str]:
    """A new, empty database on a server; dropped at the end."""
    name = f"roundhouse_e2e_{os.getpid()}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        connection.execute(f'CREATE DATABASE "{name}"')
    try:
        yield server.rpartition("/")[0] + f"/{name}"
    finally:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


@contextlib.contextmanager
def shared_redis() -> Iterator[str | None]:
    """The address of a Redis reached over TCP, or None when there is none to run or start."""
    if _redis_answers(REDIS):
        yield REDIS
        return
    binary = shutil.which("redis-server")
    if binary is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="rh-redis-") as folder:
        port = free_port()
        server = subprocess.Popen(
            [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder],
            stdout=subprocess.DEVNULL,
        )
        url = f"redis://127.0.0.1:{port}/0"
        deadline = time.monotonic() + 10
        while not _redis_answers(url) and time.monotonic() < deadline:
            time.sleep(0.05)
        try:
            yield url
        finally:
            server.terminate()
            server.wait(10)


def _redis_answers(url: str) -> bool:
    with redis.Redis.from_url(url, socket_connect_timeout=2) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


@functools.cache
def chromium() -> str | None:
    """Where Chromium is. Where it is missing and we may, it is installed first; that takes a minute."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None and os.getuid() == 0 and shutil.which("apt-get"):
        print("Chromium is not installed; installing it with apt-get for the tests of pages.", flush=True)
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "chromium"]):
            done = subprocess.run(
                command,
                check=False,
                capture_output=True,
                text=True,
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            )
            if done.returncode:
                print(f"`{' '.join(command)}` failed: {done.stderr.strip()[-500:]}", flush=True)
        found = next(filter(None, map(shutil.which, names)), None)
    return found
