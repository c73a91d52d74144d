"""A real gateway on a real socket, with a real worker of the simulated engine behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import uvicorn
from django.conf import settings
from django.db import connection
from openai import AsyncOpenAI

from config.front import Front, make_application
from config.server import WEBSOCKETS, GatewayProtocol, GatewayServer, prepare_listener
from inference.engines.simulated import SimulatedEngine
from registry.actions.events import publish_change
from registry.keys import worker_secret
from registry.models import UsageEvent
from tests.factories import make_api_key, make_deployment, make_worker

ROOT = Path(__file__).resolve().parents[2]
WORKER_ID = 7001
ROUTE = "org/sim"
FIELDS = ["temperature", "top_p", "top_k", "stop", "ignore_eos", "seed"]
"""Of a worker that honours hardly anything."""
CAPABILITIES = sorted(SimulatedEngine.capabilities)


def eventually(question: Callable[[], Any], what: str, *, seconds: float = 30.0, every: float = 0.02) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        answer = question()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(every)


@dataclass
class Worker:
    """A running engine process."""

    url: str
    secret: str
    process: subprocess.Popen[bytes]

    def load(self) -> dict[str, int]:
        with self._ask("/load") as reply:
            loaded: dict[str, int] = json.load(reply)
        return loaded

    def healthy(self) -> bool:
        try:
            with self._ask("/health") as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def _ask(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.secret}"}
        return urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=5)


@contextlib.contextmanager
def worker_process(
    worker_id: int = WORKER_ID, model: Path | None = None, **arguments: Any
) -> Iterator[Worker]:
    """The simulated engine, or with a model's folder the transformers engine on it."""
    spec = {"engine": "simulated", "slots": 64, "served_name": "sim", "arguments": arguments}
    if model is not None:
        spec |= {"engine": "transformers", "model_path": str(model), "slots": 4}
    with engine_process(spec, worker_id) as worker:
        eventually(worker.healthy, "the engine is ready", seconds=30 if model is None else 90)
        yield worker


@contextlib.contextmanager
def engine_process(spec: dict[str, Any], worker_id: int) -> Iterator[Worker]:
    """The engine that `spec` asks for, as it starts."""
    secret = worker_secret(settings.SECRET_KEY, worker_id, 1)
    listener = socket.create_server(("127.0.0.1", 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "inference.engines.server", f"--fd={listener.fileno()}"],
        stdin=subprocess.PIPE,
        pass_fds=(listener.fileno(),),
        env={**os.environ, "PYTHONPATH": str(ROOT), "ROUNDHOUSE_WORKER_SECRET": secret},
    )
    worker = Worker(f"http://127.0.0.1:{listener.getsockname()[1]}", secret, process)
    listener.close()
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(spec).encode())
        process.stdin.close()
        yield worker
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    with worker_process() as running:
        yield running


@dataclass
class Served:
    """A gateway that listens, a key for it, and its ledger."""

    port: int
    api_key: str
    front: Front | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, **options: Any) -> AsyncOpenAI:
        return AsyncOpenAI(
            **{"base_url": self.base_url, "api_key": self.api_key, "max_retries": 0, "timeout": 20} | options
        )

    def raw(self, data: bytes, *, timeout: float = 10.0) -> Answer:
        """Send bytes on a connection of its own and read all that comes back."""
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connected:
            with contextlib.suppress(ConnectionError):
                connected.sendall(data)
            received = b""
            with contextlib.suppress(ConnectionError):
                while not _complete(received) and (part := connected.recv(65536)):
                    received += part
        return Answer.of(received, time.monotonic() - began)

    def request(
        self, method: str, path: str, body: bytes | None = None, *headers: str, key: str | None = ""
    ) -> Answer:
        """One request with this gateway's key (`key=None`: without any)."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", *headers]
        if key is not None:
            lines.append(f"Authorization: Bearer {key or self.api_key}")
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return self.raw("\r\n".join(lines).encode() + b"\r\n\r\n" + (body or b""))

    def chat(self, body: bytes | dict[str, Any], *headers: str, key: str | None = "") -> Answer:
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        return self.request("POST", "/v1/chat/completions", body, *headers, key=key)

    def event(self, request_id: str) -> UsageEvent:
        found: UsageEvent = eventually(
            lambda: UsageEvent.objects.filter(request_id=request_id).first(), f"the ledger has {request_id}"
        )
        return found


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    @classmethod
    def of(cls, received: bytes, seconds: float) -> Answer:
        head, _, body = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return cls(int(first.split()[1]) if first else 0, headers, body, seconds)

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        """The error, after checking that it has OpenAI's shape."""
        assert self.headers["content-type"] == "application/json", self.body
        assert self.headers["x-request-id"].startswith("req_")
        error: dict[str, Any] = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert isinstance(error["type"], str)
        return error


def _complete(received: bytes) -> bool:
    head, found, body = received.partition(b"\r\n\r\n")
    if not found:
        return False
    lower = head.lower()
    if b"transfer-encoding: chunked" in lower:
        return body.endswith(b"0\r\n\r\n")
    for line in lower.split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.partition(b":")[2])
    return lower.startswith((b"http/1.1 204", b"http/1.1 304"))


@contextlib.contextmanager
def quick_to_end() -> Iterator[None]:
    """uvicorn looks ten times a second whether it is to end, and each of many tests waits for that."""
    hasty = ModuleType("asyncio")
    vars(hasty).update(vars(asyncio))
    vars(hasty)["sleep"] = lambda seconds: asyncio.sleep(seconds / 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.server, "asyncio", hasty)
        yield


@contextlib.contextmanager
def serving(front: Front) -> Iterator[int]:
    """The application under the gateway's own server, in a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    prepare_listener(listener)
    config = uvicorn.Config(
        front,
        loop="uvloop",
        http=GatewayProtocol,
        **WEBSOCKETS,
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    server = GatewayServer(config, front.gateway)

    def run() -> None:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner, quick_to_end():
            runner.run(server.serve(sockets=[listener]))

    thread = threading.Thread(target=run, name="gateway")
    thread.start()
    try:
        eventually(lambda: server.started or not thread.is_alive(), "the gateway listens", seconds=20)
        assert server.started
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the gateway ends"


def database_url() -> str:
    """The test database, for a process of its own."""
    facts = connection.settings_dict
    if connection.vendor == "sqlite":
        return f"sqlite:///{facts['NAME']}"
    return f"postgres://{facts['USER']}:{facts['PASSWORD']}@{facts['HOST']}:{facts['PORT']}/{facts['NAME']}"


@contextlib.contextmanager
def process_serving(*command: str, port: int, data: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server process of our application on the test database, with a data folder of its own: what it
    leaves in its spool must not be settled by the gateway of a later test. `more` goes into its
    environment."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
        "DATABASE_URL": database_url(),
        "ROUNDHOUSE_DATA": str(data),
        "ROUNDHOUSE_SECRET_KEY": settings.SECRET_KEY,
        "DJANGO_SETTINGS_MODULE": "config.settings.production",
        **more,
    }
    process = subprocess.Popen([sys.executable, *command], env=environment, cwd=ROOT)

    def answers() -> bool:
        assert process.poll() is None, "the server ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    try:
        eventually(answers, "the server listens", seconds=40)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def facts(transactional_db: None, worker: Worker) -> str:
    """A route with one ready worker; returns the text of a key."""
    deployment = make_deployment(route=ROUTE)
    make_worker(deployment=deployment, id=WORKER_ID, url=worker.url, capabilities=CAPABILITIES)
    publish_change("route", ROUTE)
    return make_api_key(name="tests")[1]


@pytest.fixture
def served(facts: str) -> Iterator[Served]:
    front = make_application()
    with serving(front) as port:
        yield Served(port, facts, front)


@pytest.fixture(params=["uvicorn", "daphne"])
def served_by_both(request: pytest.FixtureRequest, facts: str, tmp_path: Path) -> Iterator[Served]:
    """The same under the gateway's server and under Daphne."""
    if request.param == "uvicorn":
        front = make_application()
        with serving(front) as port:
            yield Served(port, facts, front)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ("-m", "daphne", "-b", "127.0.0.1", "-p", str(port), "-v", "0", "config.asgi:application")
    with process_serving(*command, port=port, data=tmp_path):
        yield Served(port, facts)


def say(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": ROUTE, "messages": [{"role": "user", "content": text}], **fields}
