"""A gateway with one whole worker of an engine behind it, and how tests talk to it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from django.conf import settings

from config.front import make_application
from registry.actions.events import publish_change
from registry.keys import worker_secret
from registry.models import Worker
from registry.states import WorkerState
from tests.api.conftest import eventually, serving
from tests.contract.engines import SLOTS, Engine, fronting, working
from tests.factories import make_api_key, make_deployment, make_worker

ROUTE = "org/contract"
EVERYWHERE = frozenset(
    {
        *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "stream", "stream_options"),
        *("stop", "temperature", "top_p"),
    }
)
"""Fields that no engine refuses."""
SAY = [{"role": "user", "content": "Say something."}]


@dataclass(frozen=True)
class Served:
    """A gateway with one worker of an engine behind it."""

    engine: Engine
    http: httpx.Client
    client: openai.OpenAI
    worker_url: str
    worker_secret: str
    capabilities: frozenset[str]

    @property
    def simulated(self) -> bool:
        """Its words depend on the prompt alone."""
        return self.engine.name in ("simulated", "upstream")

    def ask(self, path: str, **fields: Any) -> httpx.Response:
        return self.http.post(path, json={"model": ROUTE, **fields})

    def can(self, path: str, *fields: str) -> None:
        """Skip the test where the engine refuses one of the fields, which it then must be free to."""
        endpoint = "endpoint:completions" if path == "/v1/completions" else "endpoint:chat"
        for need in (endpoint, *(field for field in fields if field not in EVERYWHERE)):
            if need not in self.capabilities:
                assert need not in self.engine.must
                pytest.skip(f"{self.engine.name} refuses {need}")

    def post(self, path: str, **fields: Any) -> dict[str, Any]:
        self.can(path, *fields)
        reply = self.ask(path, **fields)
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer

    def chat(self, **fields: Any) -> dict[str, Any]:
        return self.post("/v1/chat/completions", **{"messages": SAY, **fields})

    def complete(self, **fields: Any) -> dict[str, Any]:
        return self.post("/v1/completions", **{"prompt": "Once upon a time", **fields})

    def stream(self, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
        """The chunks of a stream that ends as it must; all of them name the same answer."""
        self.can(path, *fields)
        given = {"messages": SAY} if path == "/v1/chat/completions" else {"prompt": "Once upon a time"}
        with self.http.stream(
            "POST", path, json={"model": ROUTE, **given, **fields, "stream": True}
        ) as reply:
            assert reply.status_code == 200, reply.read()
            assert reply.headers["content-type"].startswith("text/event-stream")
            lines = list(reply.iter_lines())
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        chunks: list[dict[str, Any]] = [json.loads(event) for event in events]
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
        return chunks

    def refusal(self, path: str = "/v1/chat/completions", **fields: Any) -> dict[str, Any]:
        given = {"messages": SAY} if path == "/v1/chat/completions" else {"prompt": "Once upon a time"}
        reply = self.ask(path, **{**given, **fields})
        assert reply.status_code == 400, reply.text
        error: dict[str, Any] = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        return error


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    """What the chunks of a chat or a completion say in one of their choices."""
    found = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in found)


@contextlib.contextmanager
def served_by(engine: Engine, model: Path | None, folder: Path) -> Iterator[Served]:
    """The database is there and may be asked."""
    with fronting(engine, model, folder) as ready, _served_by(ready, model, folder) as served:
        yield served


@contextlib.contextmanager
def _served_by(engine: Engine, model: Path | None, folder: Path) -> Iterator[Served]:
    deployment = make_deployment(
        route=ROUTE, engine=engine.engine, arguments=engine.arguments, slots=4 * SLOTS
    )
    worker = make_worker(deployment=deployment, state=WorkerState.LAUNCHING, url="")
    publish_change("route", ROUTE)
    key = make_api_key(name="contract")[1]
    with serving(make_application()) as port:
        gateway = f"http://127.0.0.1:{port}"
        headers = {"Authorization": f"Bearer {key}"}
        with (
            working(engine, worker, model, folder, gateway) as url,
            httpx.Client(base_url=gateway, headers=headers, timeout=120) as http,
            openai.OpenAI(base_url=f"{gateway}/v1", api_key=key, max_retries=0, timeout=120) as client,
        ):
            worker = Worker.objects.get(pk=worker.pk)
            secret = worker_secret(settings.SECRET_KEY, worker.pk, worker.epoch)
            served = Served(engine, http, client, url, secret, frozenset(worker.capabilities))
            eventually(
                lambda: served.ask("/v1/chat/completions", messages=SAY, max_tokens=1).status_code == 200,
                "the gateway sends it requests",
            )
            yield served
