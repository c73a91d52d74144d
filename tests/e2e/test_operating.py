"""The operating guide beyond one machine's `manage.py` commands: models from elsewhere, more machines,
several gateways, backup and restore. Its blocks, run as they stand there."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy
import openai
import pytest
import redis
from safetensors.numpy import save_file

from tests import services
from tests.e2e.conftest import START_SECONDS, Roundhouse, eventually, free_port, new_roundhouse
from tests.e2e.documented import block, clone, outside_make, run

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(600)]

COMMIT_OF = block("operating", "git ls-remote")
COPY = block("operating", "--copy")
MORE_MACHINES = block("operating", "export DATABASE_URL")
JOIN = block("operating", "--join TOKEN")
GATEWAYS = block("operating", "manage.py gateway --host")
BACKUP = block("operating", "VACUUM INTO")
RESTORE = block("operating", "cp backup.sqlite3")
RUN = [COMMIT_OF, COPY, MORE_MACHINES, JOIN, GATEWAYS, BACKUP, RESTORE]


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path: the private Redis listens on a socket, whose path has an end."""
    folder = Path(tempfile.mkdtemp(prefix="rh-guide-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def started(command: str, folder: Path, environment: dict[str, str]) -> Iterator[Path]:
    """A command that stays, in a session of its own; yields its log. Ctrl-C ends it."""
    log = folder / f"{time.monotonic_ns()}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-ec", command],
            cwd=folder,
            env=outside_make(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        process.wait(90)


def test_the_commit_of_a_branch_is_what_a_hub_source_takes(roundhouse: Roundhouse, tmp_path: Path):
    """The hub is played by a repository in a folder."""
    repository = tmp_path / "hub" / "Qwen" / "Qwen3-0.6B"
    repository.mkdir(parents=True)
    identity = "-c user.name=test -c user.email=test@example.org"
    run(f"git init -q -b main && git {identity} commit -q --allow-empty -m first", repository, os.environ)
    environment = {
        **os.environ,
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{tmp_path}/hub/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://huggingface.co/",
    }
    commit, branch = run(COMMIT_OF.text, tmp_path, environment).stdout.split()
    assert branch == "refs/heads/main"
    roundhouse.manage("model", "add", "pinned", "--source", f"hub:Qwen/Qwen3-0.6B@{commit}")
    roundhouse.manage("model", "remove", "pinned")


def test_a_copied_model_stays_when_the_disk_goes(roundhouse: Roundhouse, tmp_path: Path):
    disk = tmp_path / "disk" / "brought"
    disk.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (disk / name).write_text("{}")
    save_file({"weight": numpy.ones(3)}, disk / "model.safetensors")
    weights = (disk / "model.safetensors").read_bytes()
    command = COPY.text.replace("/media/disk/NAME", str(disk)).replace("NAME", "brought")
    folder = clone(tmp_path, roundhouse.data)
    run(command, folder, roundhouse.environment | {"ROUNDHOUSE_CACHE": str(tmp_path / "cache")})
    shutil.rmtree(disk)
    (copied,) = (tmp_path / "cache").rglob("model.safetensors")
    assert copied.read_bytes() == weights
    assert str(copied.parent) in roundhouse.manage("model", "show", "brought").stdout
    roundhouse.manage("model", "remove", "brought")


@contextlib.contextmanager
def redis_with_a_password(folder: Path) -> Iterator[str]:
    binary = shutil.which("redis-server")
    if binary is None:
        services.missing("no redis-server is installed")
    port = free_port()
    server = subprocess.Popen(
        [binary, "--port", str(port), "--bind", "127.0.0.1", "--requirepass", "PASSWORD", "--save", ""],
        cwd=folder,
        stdout=subprocess.DEVNULL,
    )
    try:
        with redis.Redis(port=port, password="PASSWORD") as client:

            def answers() -> bool:
                with contextlib.suppress(redis.ConnectionError):
                    return bool(client.ping())
                return False

            eventually(answers, seconds=10, what="Redis answers")
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


def status_of(url: str, host: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": host}), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        return refused.code


def test_more_machines_and_gateways_share_one_postgresql_and_redis(home: Path):
    """The control plane, a node and a second gateway as on three machines: three data folders."""
    server = os.environ.get("DATABASE_URL")
    if server is None:
        pytest.skip("it needs PostgreSQL: the stage e2e-postgres has one")
    data, port = home / "var-1", free_port()
    data.mkdir()
    roundhouse = new_roundhouse(data, ROUNDHOUSE_PORT=str(port))
    with services.own_database(server) as database, redis_with_a_password(home) as redis_address:
        roundhouse.environment |= {
            "DATABASE_URL": database,
            "REDIS_URL": f"redis://:PASSWORD@{redis_address}/0",
            "ROUNDHOUSE_ALLOWED_HOSTS": "127.0.0.1,llm.example.org",
        }
        settings = MORE_MACHINES.text.replace("postgres://roundhouse:PASSWORD@10.0.0.1/roundhouse", database)
        settings = settings.replace("10.0.0.1:6379", redis_address).replace("10.0.0.1", "127.0.0.1")
        environment = {
            name: value
            for name, value in roundhouse.environment.items()
            if name not in ("DATABASE_URL", "REDIS_URL", "ROUNDHOUSE_ALLOWED_HOSTS")
        }
        folder = home / "clone"
        folder.mkdir()
        clone(folder, data)
        with started(settings, folder, environment) as log:
            eventually(
                lambda: "Roundhouse is running." in log.read_text(),
                seconds=START_SECONDS,
                what=f"it runs {log.read_text()}",
                every=0.2,
            )
            page = f"http://127.0.0.1:{port}/admin/login/"
            assert status_of(page, "llm.example.org") == 200
            assert status_of(page, "elsewhere.example.org") == 400
            a_node_joins(roundhouse, folder, home / "var-2", environment)
            a_second_gateway_serves(roundhouse, folder, home / "var-3")


def a_node_joins(roundhouse: Roundhouse, folder: Path, data: Path, environment: dict[str, str]) -> None:
    data.mkdir()
    token = roundhouse.manage(
        "shell",
        "-v0",
        "-c",
        "from registry.actions.nodes import create_join_token; print(create_join_token(by='test'))",
    ).stdout.strip()
    url = roundhouse.credentials["base_url"].removesuffix("/v1")
    # Both machines are this one: the second needs a name of its own.
    command = JOIN.text.replace("TOKEN", f"{token} --name second").replace("http://10.0.0.1:8000", url)
    with started(command, folder, environment | {"ROUNDHOUSE_DATA": str(data)}) as log:
        eventually(
            lambda: roundhouse.rows("SELECT 1 FROM registry_node WHERE name = 'second' AND state = 'online'"),
            seconds=30,
            what=f"the second node is online {log.read_text()}",
        )


def a_second_gateway_serves(roundhouse: Roundhouse, folder: Path, data: Path) -> None:
    data.mkdir()
    port = free_port()
    address = f"--host 127.0.0.1 --port {port}"
    gateway, control = GATEWAYS.text.replace("--host 10.0.0.2 --port 8000", address).splitlines()
    environment = roundhouse.environment | {
        "ROUNDHOUSE_DATA": str(data),
        "ROUNDHOUSE_SECRET_KEY": (roundhouse.data / "secret_key").read_text().strip(),
    }
    with (
        started(gateway, folder, environment) as log,
        started(control, folder, environment) as beat,
        openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key=roundhouse.credentials["api_key"], max_retries=0
        ) as client,
    ):

        def answered() -> openai.types.chat.ChatCompletion | None:
            with contextlib.suppress(openai.APIConnectionError, openai.InternalServerError):
                return client.chat.completions.create(
                    model=roundhouse.credentials["chat_model"],
                    messages=[{"role": "user", "content": "What is the capital of Japan?"}],
                    temperature=0,
                )
            return None

        answer = eventually(answered, seconds=40, what=f"it answers {log.read_text()}", every=0.2)
        assert "Tokyo" in answer.choices[0].message.content
        assert status_of(f"http://127.0.0.1:{port}/readyz", "127.0.0.1") == 200
        assert "Error" not in beat.read_text(), "the second control does no harm"


def test_a_backup_brings_back_what_was_there(home: Path):
    """Back up while it runs, lose the database and the secret key, restore: the key still opens the API."""
    if os.environ.get("DATABASE_URL"):
        pytest.skip("the block is the one for SQLite: the stage e2e-sqlite runs it")
    data, folder = home / "var-1", home / "clone"
    data.mkdir()
    folder.mkdir()
    clone(folder, data)
    roundhouse = new_roundhouse(data)
    try:
        roundhouse.up()
        credentials = roundhouse.credentials
        roundhouse.manage("key", "create", "before")
        run(BACKUP.text, folder, roundhouse.environment)
        roundhouse.manage("key", "create", "after")
        # `make down` is the block's own first line, so what is lost is replaced by something else.
        (data / "secret_key").write_text("lost" * 20)
        run(RESTORE.text, folder, roundhouse.environment, seconds=START_SECONDS)
        names = {name for (name,) in roundhouse.rows("SELECT name FROM registry_apikey")}
        assert "before" in names
        assert "after" not in names
        assert roundhouse.credentials == credentials
        assert roundhouse.answers(credentials["chat_model"])
    finally:
        roundhouse.down()
