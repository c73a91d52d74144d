"""`manage.py doctor`: is everything as it must be, and what to do where it is not.

Each check looks at one thing and yields what it found; a check that needs the database is left out
when there is none.
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import redis
from celery import current_app
from django.conf import settings
from django.db import Error as DatabaseError
from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.utils import timezone
from kombu.exceptions import OperationalError

from config.parts import recorded_process
from config.printing import age, amount_of_bytes
from config.private_redis import NoRedis, redis_url, socket_folder
from inference.agent.identity import read_identity
from inference.sources import FolderSource, SourceError, parse_source
from inference.sources.cache import damaged_files, read_manifest
from inference.sources.check import check_folder
from inference.sources.prepare import slot_of
from inference.status import DeploymentState, read_statuses
from registry.keys import redis_prefix
from registry.models import Deployment, Node
from registry.querysets import database_now
from registry.states import NodeState

OLDEST_PYTHON = (3, 11)
OLDEST_REDIS = (6, 2)
LEAST_DATA_BYTES = 500_000_000
LEAST_CACHE_BYTES = 2_000_000_000
MOST_SKEW_SECONDS = 2.0
FRESH_SECONDS = 10.0
CONTROL_SECONDS = 5.0
START = "Start everything with `make up`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found. `todo` says what to do, and is empty when all is well."""

    what: str
    well: bool
    said: str
    todo: str = ""


def well(what: str, said: str) -> Finding:
    return Finding(what=what, well=True, said=said)


def wrong(what: str, said: str, todo: str) -> Finding:
    return Finding(what=what, well=False, said=said, todo=todo)


def examine(*, hash_files: bool = False) -> Iterator[Finding]:
    """Look at everything, one after the other. `hash_files`: read the models' files whole."""
    yield check_python()
    yield from check_disks()
    yield from check_data_folder()
    database = check_database()
    yield database
    yield check_redis()
    yield check_gateway()
    if not database.well:
        return
    migrations = check_migrations()
    yield migrations
    yield check_clock()
    if not migrations.well:
        return
    yield check_control()
    yield from check_nodes()
    yield from check_model_files(hash_files=hash_files)
    yield from check_deployments()


def check_python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        return wrong("Python", f"{version} is too old.", "Make .venv anew with Python 3.11 or newer.")
    return well("Python", version)


def check_disks() -> Iterator[Finding]:
    for what, folder, least, variable in (
        ("disk of the data", Path(settings.ROUNDHOUSE_DATA), LEAST_DATA_BYTES, "ROUNDHOUSE_DATA"),
        ("disk of the models", Path(settings.ROUNDHOUSE_CACHE), LEAST_CACHE_BYTES, "ROUNDHOUSE_CACHE"),
    ):
        place = next(each for each in (folder, *folder.parents) if each.exists())
        free = shutil.disk_usage(place).free
        if not os.access(place, os.W_OK):
            yield wrong(what, f"{folder} cannot be written to.", f"Set {variable} to a folder that can.")
        elif free < least:
            yield wrong(
                what,
                f"only {amount_of_bytes(free)} are free in {folder}.",
                f"Make room ({amount_of_bytes(least)} at least), or set {variable} to a larger disk.",
            )
        else:
            yield well(what, f"{amount_of_bytes(free)} free in {folder}")


def check_data_folder() -> Iterator[Finding]:
    data = Path(settings.ROUNDHOUSE_DATA)
    private = [data, *(data / name for name in ("secret_key", "credentials.json", "node/identity.json"))]
    open_ones = [
        path
        for path in private
        if path.exists() and (path.stat().st_uid != os.getuid() or stat.S_IMODE(path.stat().st_mode) & 0o077)
    ]
    if open_ones:
        shown = " ".join(str(path) for path in open_ones)
        yield wrong(
            "permissions",
            f"others may read, or own, {shown}.",
            f"Run `chmod go= {shown}` as the user that runs Roundhouse.",
        )
    else:
        yield well("permissions", f"{data} is closed to others")


def check_database() -> Finding:
    kind = "SQLite" if connection.vendor == "sqlite" else "PostgreSQL"
    try:
        connection.ensure_connection()
        with connection.cursor() as cursor:
            if connection.vendor == "sqlite":
                cursor.execute("PRAGMA quick_check(1)")
                (answer,) = cursor.fetchone()
                if answer != "ok":
                    return wrong("database", f"the SQLite file is damaged: {answer}.", "Restore a backup.")
                cursor.execute("SELECT sqlite_version()")
            else:
                cursor.execute("SHOW server_version")
            (version,) = cursor.fetchone()
    except DatabaseError as error:
        reason = (str(error).strip().splitlines() or ["no answer"])[0]
        return wrong("database", f"{kind} cannot be used: {reason}.", "Start it, or correct DATABASE_URL.")
    return well("database", f"{kind} {version}")


def check_migrations() -> Finding:
    executor = MigrationExecutor(connection)
    missing = executor.migration_plan(executor.loader.graph.leaf_nodes())
    if missing:
        return wrong(
            "migrations",
            f"{len(missing)} are not applied.",
            "Run `manage.py migrate`; `make up` does it by itself.",
        )
    return well("migrations", "all applied")


def check_clock() -> Finding:
    before = timezone.now()
    there = database_now()
    after = timezone.now()
    skew = max((there - after).total_seconds(), (before - there).total_seconds(), 0.0)
    if skew > MOST_SKEW_SECONDS:
        return wrong(
            "clock",
            f"this machine and the database differ by {skew:.0f} s.",
            "Let both keep time by NTP (systemd-timesyncd, chrony).",
        )
    return well("clock", "agrees with the database's")


def redis_address() -> str:
    """The shared Redis, or the private one that `up` starts. Raises NoRedis."""
    return settings.ROUNDHOUSE_REDIS_URL or redis_url(socket_folder(Path(settings.ROUNDHOUSE_DATA)))


def check_redis() -> Finding:
    shared = settings.ROUNDHOUSE_REDIS_URL is not None
    try:
        with redis.Redis.from_url(
            redis_address(), socket_connect_timeout=2, socket_timeout=2, decode_responses=True
        ) as client:
            version = str(client.info("server")["redis_version"])
    except (NoRedis, redis.RedisError, OSError) as error:
        if shared:
            return wrong(
                "Redis", f"it does not answer: {_first_line(error)}.", "Start it, or correct REDIS_URL."
            )
        return wrong("Redis", "the private one does not run.", f"{START}, or set REDIS_URL.")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_REDIS:
        return wrong("Redis", f"{version} is too old.", "Install Redis 6.2 or newer.")
    return well("Redis", f"{version}, {'shared' if shared else 'private'}")


def check_gateway() -> Finding:
    """Who answers at the gateway's port?"""
    host, port = settings.ROUNDHOUSE_HOST, settings.ROUNDHOUSE_PORT
    own = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104
    where = f"http://{f'[{own}]' if ':' in own else own}:{port}"
    try:
        with socket.create_connection((own, port), timeout=2):
            pass
    except OSError as error:
        return wrong("gateway", f"nothing answers at {where} ({_first_line(error)}).", f"{START}.")
    answer = http.client.HTTPConnection(own, port, timeout=5)
    try:
        answer.request("GET", "/readyz")
        response = answer.getresponse()
        response.read(65536)
    except (OSError, http.client.HTTPException):
        response = None
    finally:
        answer.close()
    if response is None or not response.headers.get("x-request-id"):
        return wrong(
            "gateway",
            f"another program answers at {where}.",
            "Stop it, or set ROUNDHOUSE_PORT to another port.",
        )
    if response.status != 200:
        return wrong(
            "gateway",
            f"it runs at {where}, but is not ready (status {response.status}).",
            "Mend what is wrong with the database and the disk; it gets ready by itself.",
        )
    return well("gateway", f"ready at {where}")


def check_control() -> Finding:
    """Is there somebody who takes a task from control's queue? One that may be done twice is put there."""
    what = "control"
    if recorded_process(Path(settings.ROUNDHOUSE_DATA) / "run" / "control.json") is not None:
        return well(what, "runs on this machine")
    try:
        address = redis_address()
        with redis.Redis.from_url(address, socket_connect_timeout=2, socket_timeout=2) as client:
            client.ping()
            if settings.CELERY_BROKER_URL is None:
                # Only `up` uses this Redis, and it keeps a record of its control: there is none.
                return wrong(what, "it does not run: no worker is started or replaced.", f"{START}.")
            current_app.send_task("inference.tick", queue="control", expires=CONTROL_SECONDS, retry=False)
            deadline = time.monotonic() + CONTROL_SECONDS
            while client.llen(f"{redis_prefix(settings.SECRET_KEY)}control"):
                if time.monotonic() > deadline:
                    return wrong(
                        what,
                        "nobody takes its tasks: no worker is started or replaced.",
                        "Start `manage.py control` on one machine, or everything with `make up`.",
                    )
                time.sleep(0.05)
    except (NoRedis, redis.RedisError, OperationalError, OSError):
        return wrong(what, "it cannot work without Redis.", "Mend Redis first.")
    return well(what, "takes its tasks")


def check_nodes() -> Iterator[Finding]:
    now = database_now()
    nodes = list(Node.objects.all())
    if not nodes:
        yield wrong(
            "nodes", "no machine has joined.", f"{START}, or `manage.py node --join TOKEN --url URL`."
        )
    try:
        identity = read_identity(Path(settings.ROUNDHOUSE_DATA))
    except ValueError as error:
        yield wrong("nodes", str(error), "Then run `make up`, which joins anew.")
        identity = None
    for node in nodes:
        here = " (this machine)" if identity is not None and identity.node_id == node.pk else ""
        seen = f"last heard {age(node.last_seen_at, now)}"
        silent = node.last_seen_at is None or (now - node.last_seen_at).total_seconds() > FRESH_SECONDS
        if node.state == NodeState.ONLINE and not silent:
            cordon = ", cordoned: gets no new worker" if node.cordoned else ""
            yield well("agent", f"{node}{here} is online{cordon}")
        elif here:
            yield wrong("agent", f"{node}{here}: its agent is silent, {seen}.", f"{START}.")
        else:
            yield wrong(
                "agent",
                f"{node}: its agent is silent, {seen}.",
                "Start `manage.py node` there and let it reach the gateway; delete the node if it is gone.",
            )


def check_model_files(*, hash_files: bool) -> Iterator[Finding]:
    """The files of models that are wanted and lie on this machine."""
    wanted = Deployment.objects.filter(replicas__gt=0).exclude(engine__in=["simulated", "upstream"])
    models = {each.language_model for each in wanted.select_related("language_model")}
    for model in sorted(models, key=str):
        what = f"files of {model}"
        try:
            source = parse_source(model.source)
            if isinstance(source, FolderSource):
                if source.path.is_dir():
                    check_folder(source.path)
                    yield well(what, f"can be loaded from {source.path}")
                continue
            slot = slot_of(model.name, source, settings.ROUNDHOUSE_CACHE)
            manifest = read_manifest(slot.path)
            if manifest is None:
                continue
            damaged = damaged_files(slot.path, manifest, full_check=hash_files)
            if not damaged:
                check_folder(slot.path)
        except SourceError as error:
            yield wrong(what, error.detail, "Mend the files, or correct the model's source.")
            continue
        if damaged:
            yield wrong(
                what,
                f"{', '.join(damaged[:5])} are damaged or missing.",
                f"Run `manage.py model verify {model} --repair`.",
            )
        else:
            how = "every digest agrees" if hash_files else "sizes and headers agree"
            yield well(what, f"{amount_of_bytes(manifest.size_bytes)}, {how}")


def check_deployments() -> Iterator[Finding]:
    deployments = list(Deployment.objects.all())
    statuses = read_statuses(deployments)
    for deployment in deployments:
        status = statuses[deployment.pk]
        what = f"deployment {deployment}"
        if status.state in (DeploymentState.READY, DeploymentState.STOPPED, DeploymentState.STARTING):
            yield well(what, f"{status.state.value}. {status.reason}")
        else:
            yield wrong(
                what, f"{status.state.value}. {status.reason}", status.next_action or "Wait, and look again."
            )


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
