"""Everything on one machine: `manage.py up` starts the parts in order, watches them, stops them in order."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import msgspec
import redis
from django.conf import settings
from django.core.management import call_command
from django.db import OperationalError, close_old_connections

from config.env import celery_broker
from config.first_run import BUNDLED_BYTES, Credentials, prepare, read_credentials
from config.parts import Part, stop_recorded
from config.private_redis import NoRedis, redis_command, redis_url, socket_folder
from inference.agent.command import JoinError, ensure_joined
from inference.agent.identity import node_folder, read_identity, write_identity
from inference.agent.processes import stop_all
from inference.broker import broker_of
from inference.status import DeploymentState, read_statuses
from registry.actions.nodes import create_join_token, node_of_secret
from registry.keys import redis_prefix
from registry.models import Deployment, ModelCopy, Worker

Tell = Callable[[str], None]

GATEWAY_SECONDS = 60.0
"""How long the gateway may take to answer `/healthz`."""
WORKER_GRACE_SECONDS = 20.0
"""How long workers finish requests when everything stops."""
REPORT_SECONDS = 0.5
FLEET_SECONDS = 0.75
"""After this long the gateway knows of a worker that the database calls ready."""


class CannotStart(Exception):
    """One clear sentence about what stands in the way."""


class Stopped(Exception):
    """SIGINT or SIGTERM came."""


class Up:
    """One Roundhouse on one data folder."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self.data = Path(settings.ROUNDHOUSE_DATA)
        self.host = settings.ROUNDHOUSE_HOST
        self.port = settings.ROUNDHOUSE_PORT
        # A wildcard address is one to listen on, none to call.
        self.own_host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104
        shown = f"[{self.own_host}]" if ":" in self.own_host else self.own_host
        self.url = f"http://{shown}:{self.port}"
        self.parts: list[Part] = []
        self.redis_url: str | None = settings.ROUNDHOUSE_REDIS_URL

    # -- start

    def start(self) -> tuple[Credentials, bool]:
        """Start every part; returns the credentials and whether the password is new. Raises CannotStart."""
        self._check_disk()
        self._stop_leftovers()
        self._check_port()
        if self.redis_url is None:
            self._start_redis()
        self._migrate()
        credentials, is_new = prepare(url=self.url)
        gateway = self._add("gateway", [sys.executable, "manage.py", "gateway"], stop_seconds=75)
        self._add("control", [sys.executable, "manage.py", "control"])
        self._wait_for_gateway(gateway)
        self._join()
        self._add(
            "agent",
            [
                *(sys.executable, "-m", "inference.agent"),
                *("--data", str(self.data)),
                *("--cache", str(settings.ROUNDHOUSE_CACHE)),
            ],
        )
        return credentials, is_new

    def _add(self, name: str, command: list[str], *, stop_seconds: float = 10.0) -> Part:
        environment = dict(os.environ)
        environment["ROUNDHOUSE_DATA"] = str(self.data)
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(settings.BASE_DIR), environment.get("PYTHONPATH")])
        )
        if self.redis_url:
            environment["REDIS_URL"] = self.redis_url
        if name == "agent":
            # Celery loads Django whenever this is set; an agent runs without it.
            environment.pop("DJANGO_SETTINGS_MODULE", None)
        if "manage.py" in command:
            command[command.index("manage.py")] = str(settings.BASE_DIR / "manage.py")
        part = Part(
            name=name, command=command, folder=self.data, environment=environment, stop_seconds=stop_seconds
        )
        part.start()
        self.parts.append(part)
        return part

    def _check_port(self) -> None:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                raise CannotStart(
                    f"Port {self.port} on {self.host} cannot be used ({error.strerror}): stop what uses it, "
                    "or set ROUNDHOUSE_PORT to another."
                ) from error

    def _check_disk(self) -> None:
        if read_credentials() is not None:
            return
        cache = Path(settings.ROUNDHOUSE_CACHE)
        place = next(folder for folder in (cache, *cache.parents) if folder.exists())
        if not os.access(place, os.W_OK):
            raise CannotStart(
                f"The cache folder {cache} cannot be written to; set ROUNDHOUSE_CACHE to one that can."
            )
        free = shutil.disk_usage(place).free
        if free < BUNDLED_BYTES and not any(cache.glob("models/*")):
            raise CannotStart(
                f"Too little disk: the first model needs {BUNDLED_BYTES // 10**6} MB in {cache}, "
                f"{free // 10**6} MB are free. Make room, or set ROUNDHOUSE_CACHE to a larger disk."
            )

    def _stop_leftovers(self) -> None:
        """A killed `up` left its parts running: this one takes over with parts of its own."""
        for record in sorted((self.data / "run").glob("*.json")):
            if stop_recorded(record):
                self.tell(f"Stopped a {record.stem} that an earlier start left running.")

    def _start_redis(self) -> None:
        try:
            folder = socket_folder(self.data)
            self.redis_url = redis_url(folder)
            part = self._add("redis", redis_command(folder))
        except (NoRedis, OSError) as error:
            raise CannotStart(str(error)) from error
        # What this process says of Redis from here on is the one it just started.
        settings.ROUNDHOUSE_REDIS_URL = self.redis_url
        settings.CELERY_BROKER_URL = celery_broker(self.redis_url)
        client = redis.Redis.from_url(self.redis_url)
        deadline = time.monotonic() + 10
        while True:
            try:
                client.ping()
                return
            except redis.ConnectionError as error:
                if part.ended() is not None or time.monotonic() > deadline:
                    raise CannotStart(self._why(part, "The private Redis did not start.")) from error
                time.sleep(0.02)

    def _migrate(self) -> None:
        try:
            call_command("migrate", verbosity=0, interactive=False)
        except OperationalError as error:
            reason = str(error).strip().splitlines()[0]
            raise CannotStart(f"The database cannot be used ({reason}); check DATABASE_URL.") from error

    def _wait_for_gateway(self, part: Part) -> None:
        deadline = time.monotonic() + GATEWAY_SECONDS
        while time.monotonic() < deadline:
            if part.ended() is not None:
                break
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection(self.own_host, self.port, timeout=2)
                connection.request("GET", "/healthz")
                status = connection.getresponse().status
                connection.close()
                if status == 200:
                    return
            time.sleep(0.05)
        raise CannotStart(self._why(part, "The gateway did not start."))

    def _join(self) -> None:
        """Make this machine a node, once. A node that the database does not know joins anew."""
        identity = read_identity(self.data)
        node = node_of_secret(identity.node_id, identity.secret) if identity is not None else None
        if identity is not None and node is None:
            (node_folder(self.data) / "identity.json").unlink()
            identity = None
        token = create_join_token(by="manage.py up") if identity is None or identity.url != self.url else None
        try:
            identity = ensure_joined(
                data=self.data, url=self.url, token=token, name=socket.gethostname().split(".")[0]
            )
        except JoinError as error:
            raise CannotStart(str(error)) from error
        if node is not None:
            # REDIS_URL may have been changed since the node joined.
            broker, prefix = broker_of(node), redis_prefix(settings.SECRET_KEY)
            now = msgspec.structs.replace(identity, broker_url=broker, broker_prefix=prefix)
            if now != identity:
                write_identity(self.data, now)

    def _why(self, part: Part, sentence: str) -> str:
        lines = "\n".join(f"    {line}" for line in part.last_lines())
        return f"{sentence} The last lines of {part.log}:\n{lines}" if lines else sentence

    # -- watch

    def wait_until_answering(self, credentials: Credentials, timeout: float) -> None:
        """Report progress until the chat model answers a request. Raises CannotStart with the cause."""
        deadline = time.monotonic() + timeout
        started = time.monotonic()
        last = ""
        while True:
            self.keep_alive()
            close_old_connections()
            deployment = Deployment.objects.filter(name=credentials.chat_model).first()
            if credentials.chat_model is None or deployment is None or deployment.replicas == 0:
                # The operator wants no bundled model (any more): the parts run, that is all.
                return
            status = read_statuses([deployment])[deployment.pk]
            serves = status.state in (DeploymentState.READY, DeploymentState.DEGRADED)
            if serves:
                # The gateway reads the fleet twice a second; asked before, it would count a failed request.
                time.sleep(FLEET_SECONDS)
                if self._answers(credentials):
                    return
            if status.state == DeploymentState.FAILED:
                raise CannotStart(self._failure(deployment, f"{status.reason} {status.next_action}"))
            line = self._progress(deployment)
            if line != last:
                self.tell(f"[{time.monotonic() - started:5.1f} s] {line}")
                last = line
            if time.monotonic() > deadline:
                raise CannotStart(f"No answer within {timeout:.0f} s. Last seen: {line}")
            time.sleep(REPORT_SECONDS)

    def embedding_line(self, credentials: Credentials) -> str | None:
        """How far the embedding model is; nobody waits for it. None where there is none (any more)."""
        deployment = Deployment.objects.filter(name=credentials.embedding_model, replicas__gt=0).first()
        if deployment is None:
            return None
        status = read_statuses([deployment])[deployment.pk]
        match status.state:
            case DeploymentState.READY | DeploymentState.DEGRADED:
                return f"{deployment.name} answers at {credentials.base_url}/embeddings."
            case DeploymentState.FAILED:
                return self._failure(deployment, f"{status.reason} {status.next_action}")
        return f"{self._progress(deployment)}; embeddings will be there in a moment."

    def _progress(self, deployment: Deployment) -> str:
        name = deployment.name
        worker = Worker.objects.live().filter(deployment=deployment).order_by("-id").first()
        if worker is None:
            return f"{name}: waiting for a worker"
        copy = ModelCopy.objects.filter(
            language_model=deployment.language_model_id, node=worker.node_id
        ).first()
        if copy is not None and copy.state in ("fetching", "converting"):
            return f"{name}: {_amount(copy.step or copy.state, copy.done, copy.total, copy.unit)}"
        if worker.progress_step:
            step = _amount(
                worker.progress_step, worker.progress_done, worker.progress_total, worker.progress_unit
            )
            return f"{name}: {step}"
        return f"{name}: worker {worker.state}"

    def _failure(self, deployment: Deployment, reason: str) -> str:
        worker = Worker.objects.filter(deployment=deployment).order_by("-id").first()
        lines = worker.log_tail.splitlines()[-15:] if worker else []
        tail = "\n".join(f"    {line}" for line in lines)
        return f"{deployment.name} failed: {reason}" + (f"\nIts last log lines:\n{tail}" if tail else "")

    def _answers(self, credentials: Credentials) -> bool:
        """Ask for one token: what the person will do next must work."""
        body = json.dumps(
            {
                "model": credentials.chat_model,
                "messages": [{"role": "user", "content": "Hello"}],
                "max_tokens": 1,
            }
        )
        connection = http.client.HTTPConnection(self.own_host, self.port, timeout=60)
        try:
            connection.request(
                "POST",
                "/v1/chat/completions",
                body,
                {"Authorization": f"Bearer {credentials.api_key}", "Content-Type": "application/json"},
            )
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def keep_alive(self) -> None:
        for part in self.parts:
            if part.keep_alive():
                self.tell(self._why(part, f"The {part.name} ended; it is started again."))

    # -- stop

    def stop(self) -> None:
        """Stop in order: nobody starts workers any more, workers finish, then the way to them ends."""
        parts = {part.name: part for part in self.parts}
        for name in ("control", "agent"):
            if name in parts:
                parts[name].stop()
        if "agent" in parts:
            stop_all(self.data, WORKER_GRACE_SECONDS)
        for name in ("gateway", "redis"):
            if name in parts:
                parts[name].stop()


def _amount(step: str, done: int, total: int, unit: str) -> str:
    if unit == "bytes":
        shown = f"{done / 1e6:.1f}" + (f" of {total / 1e6:.1f} MB" if total else " MB")
    else:
        shown = f"{done}" + (f" of {total} {unit}" if total else f" {unit}")
    percent = f", {100 * done / total:.0f} %" if total else ""
    return f"{step} ({shown}{percent})" if done or total else step


@contextlib.contextmanager
def only_one(data: Path) -> Iterator[None]:
    """Hold the data folder. Raises CannotStart when another `up` does; the kernel frees it when we end."""
    path = data / "up.lock"
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = lock.read().strip() or "unknown"
            raise CannotStart(
                f"Roundhouse runs already on {data} (process {pid}); `make down` stops it."
            ) from error
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into Stopped; later ones do not disturb the stopping."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise Stopped

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
