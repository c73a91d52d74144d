"""The servers that tests need: those that run already, else ones started here from installed binaries."""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import psycopg
import pytest
import redis


def missing(what: str) -> NoReturn:
    """A test cannot run without this: it is skipped, and on CI it fails, for a suite that silently shrank
    would look green."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


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
    binaries = _postgres_binaries()
    if binaries is None:
        yield None
        return
    with own_postgres(binaries) as server:
        yield server.url


@contextlib.contextmanager
def own_postgres(binaries: Path | None = None) -> Iterator[OwnPostgres]:
    """A PostgreSQL server that nobody else uses."""
    binaries = binaries or _postgres_binaries()
    if binaries is None:
        raise RuntimeError("PostgreSQL is not installed.")
    with tempfile.TemporaryDirectory(prefix="rh-pg-") as folder:
        server = OwnPostgres(binaries, Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


class OwnPostgres:
    """A server that a test may stop, kill and start again; its port stays."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.binaries, self._folder = binaries, folder
        self._data = folder / "data"
        self._port = free_port()
        # PostgreSQL refuses to run as root: then the account that its package made runs it.
        self._account = "postgres" if os.getuid() == 0 else None
        if self._account:
            os.chown(folder, pwd.getpwnam(self._account).pw_uid, -1)
        self._run("initdb", "-U", "postgres", "-A", "trust")

    @property
    def url(self) -> str:
        return f"postgres://postgres@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        """Returns when it answers."""
        own = f"-c port={self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder}"
        log = str(self._folder / "log")
        self._run("pg_ctl", "-w", "-l", log, "-o", f"{own} -c fsync=off -c max_connections=200", "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-m", "immediate", "stop")

    def kill(self) -> None:
        """SIGKILL, to the whole server. Returns when it is gone."""
        postmaster = psutil.Process(int((self._data / "postmaster.pid").read_text().split()[0]))
        doomed = [postmaster, *postmaster.children(recursive=True)]
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(doomed, timeout=10)

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self.binaries / program), "-D", str(self._data), *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            user=self._account,
            cwd=self._folder,
        )


def _postgres_binaries() -> Path | None:
    if found := shutil.which("pg_ctl"):
        return Path(found).parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


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


class OwnRedis:
    """A Redis server of a test's own, to be stopped, emptied and held up. Nobody else uses it."""

    def __init__(self, binary: str) -> None:
        self._binary = binary
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                *(self._binary, "--port", str(self._port), "--bind", "127.0.0.1"),
                *("--save", "", "--appendonly", "no", "--dir", tempfile.gettempdir()),
            ],
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while not _redis_answers(self.url):
            if time.monotonic() > deadline:
                raise RuntimeError("a Redis of the tests' own did not start")
            time.sleep(0.02)

    def kill(self) -> None:
        """At once, without a word to anybody."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It stays connected and answers nothing."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)


@contextlib.contextmanager
def own_redis() -> Iterator[OwnRedis | None]:
    """A new Redis server, or None when none is installed."""
    binary = shutil.which("redis-server")
    if binary is None:
        yield None
        return
    server = OwnRedis(binary)
    server.start()
    try:
        yield server
    finally:
        server.kill()


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
