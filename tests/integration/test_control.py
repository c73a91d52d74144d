"""Control as a real process, and a node's own Redis user, each on a Redis server of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kombu
import pytest
import redis
from celery import Celery
from django.conf import settings as django_settings
from django.db import OperationalError, connection
from pytest_django import Settings

from config.env import ROOT, celery_broker
from config.private_redis import redis_command, redis_server, redis_url, socket_folder
from inference import tasks
from inference.agent.identity import Identity, write_identity
from inference.broker import broker_of
from inference.fleet import join
from inference.nudges import send_nudges
from inference.protocol import JoinRequest
from registry.actions.nodes import create_join_token
from registry.keys import redis_prefix
from registry.models import Worker
from tests.factories import make_deployment, make_node
from tests.services import free_port

DEADLINE_SECONDS = 20.0


def until(question: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (answer := question()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return answer


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, cwd=ROOT, stdin=options.pop("stdin", subprocess.DEVNULL), **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


@pytest.fixture
def private_redis(tmp_path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The address of a private Redis, and how to have it started again after it was killed."""
    folder = socket_folder(tmp_path)
    url = redis_url(folder)
    with running(redis_command(folder)) as server:
        until(lambda: answers(url))

        @contextmanager
        def anew() -> Iterator[None]:
            server.kill()
            server.wait()
            with running(redis_command(folder)):
                until(lambda: answers(url))
                yield

        yield url, anew
    for left in folder.iterdir():
        left.unlink()
    folder.rmdir()


@pytest.fixture
def shared_redis() -> Iterator[str]:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    with running([redis_server(), "--port", str(port), "--save", "", "--loglevel", "warning"]):
        until(lambda: answers(url))
        yield url


def database_url() -> str:
    """The test database, for another process."""
    facts = connection.settings_dict
    if connection.vendor == "sqlite":
        return f"sqlite:///{facts['NAME']}"
    password = f":{facts['PASSWORD']}" if facts["PASSWORD"] else ""
    return f"postgres://{facts['USER']}{password}@{facts['HOST']}:{facts['PORT']}/{facts['NAME']}"


def control_environment(tmp_path: Path, redis_address: str | None) -> dict[str, str]:
    environment = os.environ | {
        "DATABASE_URL": database_url(),
        "ROUNDHOUSE_DATA": str(tmp_path),
        "ROUNDHOUSE_SECRET_KEY": django_settings.SECRET_KEY,
        "DJANGO_SETTINGS_MODULE": "config.settings.production",
    }
    environment.pop("REDIS_URL", None)
    return environment | ({"REDIS_URL": redis_address} if redis_address else {})


CONTROL = [sys.executable, "manage.py", "control"]
PREFIX = redis_prefix(django_settings.SECRET_KEY)


def listening(data: Path) -> Any:
    """The process in which a node's agent hears nudges."""
    listener = [sys.executable, "-m", "inference.agent.app", str(data)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DJANGO_")}
    return running(listener, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


@pytest.mark.django_db(transaction=True)
def test_control_carries_wishes_out_through_a_redis_restart_and_ends_in_time(
    private_redis: tuple[str, Callable[[], Any]], tmp_path: Path
) -> None:
    url, redis_anew = private_redis
    make_node(name="n1")
    first = make_deployment()
    environment = control_environment(tmp_path, url)
    with running(CONTROL, env=environment, stdout=subprocess.DEVNULL) as control:
        until(first.workers.exists)
        with redis.Redis.from_url(url) as client:
            until(lambda: client.llen(f"{PREFIX}node.n1"))
        with redis_anew():
            second = make_deployment()
            until(second.workers.exists)
            began = time.monotonic()
            control.send_signal(signal.SIGTERM)
            assert control.wait(10) == 0
            assert time.monotonic() - began < 5
    assert Worker.objects.count() == 2


@pytest.mark.django_db(transaction=True)
def test_control_without_redis_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        CONTROL, cwd=ROOT, env=control_environment(tmp_path, None), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "`manage.py up`, or set REDIS_URL" in done.stderr


@pytest.mark.django_db
def test_a_node_gets_a_redis_user_that_hears_its_own_nudges_and_reaches_nothing_else(
    shared_redis: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from config.celery import app

    settings.ROUNDHOUSE_REDIS_URL = settings.CELERY_BROKER_URL = shared_redis
    node = make_node(name="gpu-1")
    broker = broker_of(node)
    assert broker is not None
    assert broker != shared_redis
    assert broker_of(node) == broker, "asking again gives the same"

    with redis.Redis.from_url(broker) as client:
        assert client.llen(f"{PREFIX}node.gpu-1") == 0
        for forbidden in (
            lambda: client.llen(f"{PREFIX}control"),
            lambda: client.lpush(f"{PREFIX}node.gpu-2", "x"),
            lambda: client.keys("*"),
            lambda: client.flushall(),
            lambda: client.config_get("*"),
            lambda: client.acl_list(),
            lambda: client.publish("x", "y"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                forbidden()

    write_identity(
        tmp_path,
        Identity(
            url="http://127.0.0.1:1",
            node_id=node.pk,
            name=node.name,
            address="127.0.0.1",
            secret="s",
            broker_url=broker,
            broker_prefix=PREFIX,
        ),
    )
    with listening(tmp_path) as process:
        send_task = app.send_task
        with app.connection_for_write(shared_redis) as to_shared, monkeypatch.context() as patch:
            patch.setattr(
                app, "send_task", lambda *args, **options: send_task(*args, connection=to_shared, **options)
            )
            send_nudges([node.name])
        assert process.stdout is not None
        assert process.stdout.readline().strip().isdigit()


@pytest.mark.django_db
def test_two_installations_on_one_redis_share_no_name(
    shared_redis: str, settings: Settings, tmp_path: Path
) -> None:
    """Each has a node of the same number and name. SECURITY.md's row S31."""
    settings.ROUNDHOUSE_REDIS_URL = shared_redis
    node = make_node(name="gpu-1")
    identities, apps = [], []
    for secret_key in (django_settings.SECRET_KEY, "another" * 10):
        settings.SECRET_KEY = secret_key
        prefix = redis_prefix(secret_key)
        token = create_join_token(by="test")
        reply = join(token, JoinRequest(name=f"joins-{len(apps)}", address="127.0.0.1"), "127.0.0.1")
        assert reply.broker_prefix == prefix
        facts = {"url": "http://127.0.0.1:1", "node_id": node.pk, "name": node.name, "secret": "s"}
        identity = Identity(
            **facts, address="127.0.0.1", broker_url=broker_of(node), broker_prefix=reply.broker_prefix
        )
        write_identity(tmp_path / str(len(apps)), identity)
        identities.append(identity)
        app = Celery("control", broker=shared_redis, set_as_current=False)
        app.conf.broker_transport_options = {"global_keyprefix": prefix}
        apps.append(app)

    with listening(tmp_path / "0") as ours, listening(tmp_path / "1") as theirs:
        for number, app in ((1, apps[1]), (2, apps[0]), (3, apps[1])):
            app.send_task("inference.agent.nudge", args=[number], queue=node.queue, ignore_result=True)
        assert ours.stdout is not None
        assert theirs.stdout is not None
        assert ours.stdout.readline() == b"2\n"
        assert [theirs.stdout.readline() for _ in range(2)] == [b"1\n", b"3\n"]

    apps[0].send_task("inference.tick", queue="control")
    with redis.Redis.from_url(shared_redis) as client:
        assert [client.llen(f"{each.broker_prefix}control") for each in identities] == [1, 0]
        assert not [key for key in client.scan_iter() if not key.decode().startswith("roundhouse:")]
    ours_, theirs_ = identities
    assert urlsplit(ours_.broker_url).username != urlsplit(theirs_.broker_url).username
    for mine, other in ((ours_, theirs_), (theirs_, ours_)):
        with redis.Redis.from_url(mine.broker_url) as client:
            assert client.llen(f"{mine.broker_prefix}{node.queue}") == 0
            for name in (node.queue, "unacked"):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    client.llen(f"{other.broker_prefix}{name}")


def test_a_nudge_never_fails(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from config.celery import app

    def refused(*_: object, **__: object) -> None:
        raise kombu.exceptions.OperationalError("connection refused")

    monkeypatch.setattr(app, "send_task", refused)
    send_nudges(["n1"])
    send_nudges(["n1"])
    assert [record.event for record in caplog.records if hasattr(record, "event")] == ["nudges_unsent"]


@pytest.mark.parametrize(
    ("given", "celerys"),
    [
        (None, None),
        ("redis://host:6379/3", "redis://host:6379/3"),
        ("rediss://u:p@host:6379/3", "rediss://u:p@host:6379/3"),
        ("unix:///run/r.sock?db=3", "redis+socket:///run/r.sock?virtual_host=3"),
        ("unix:///run/r.sock", "redis+socket:///run/r.sock?virtual_host=0"),
        ("unix://u:p@/run/r.sock?db=1", "redis+socket://u:p@/run/r.sock?virtual_host=1"),
    ],
)
def test_a_redis_address_is_written_as_celery_wants_it(given: str | None, celerys: str | None) -> None:
    assert celery_broker(given) == celerys


@pytest.mark.django_db(transaction=True)
def test_a_tick_that_fails_is_logged_once_and_comes_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def away(_: object) -> int:
        calls.append(1)
        raise OperationalError("the database is away")

    monkeypatch.setattr(tasks, "send_nudges", lambda names: None)
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "reap", away)
        tasks.tick()
        tasks.tick()
    assert len(calls) == 2
    assert [record.event for record in caplog.records if hasattr(record, "event")] == ["tick_failed"]
    make_node()
    deployment = make_deployment()
    tasks.tick()
    assert deployment.workers.count() == 1
