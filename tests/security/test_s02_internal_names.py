"""S2: nothing that a client sends chooses a worker, skips a check, or reaches past the gateway."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

from openai_api.document import document
from openai_api.endpoints import ENDPOINTS
from openai_api.protocol.sampled import OWNED
from tests.api.conftest import ROUTE, Answer, Served
from tests.api.scripted import Scripted, in_front_of, scripted

pytestmark = pytest.mark.django_db(transaction=True)

NAMES = [
    *(
        "worker",
        "worker_id",
        "worker_url",
        "deployment",
        "deployment_id",
        "replica",
        "node",
        "lease",
        "route",
        "avoid",
    ),
    *(
        "url",
        "url_idx",
        "api_base",
        "base_url",
        "api_key",
        "backend",
        "engine",
        "upstream",
        "target",
        "proxy",
        "host",
    ),
    *(
        "bypass_filter",
        "internal",
        "admin",
        "is_admin",
        "debug",
        "trusted",
        "skip_auth",
        "dry_run",
        "priority",
    ),
    *(
        "request_id",
        "cache_salt",
        "kv_transfer_params",
        "ec_transfer_params",
        "vllm_xargs",
        "mm_processor_kwargs",
    ),
    *(
        "media_io_kwargs",
        "data_parallel_rank",
        "key",
        "key_id",
        "project",
        "project_id",
        "user_id",
        "organization",
    ),
    *(
        "needs",
        "capabilities",
        "scope",
        "gateway",
        "prefiller_url",
        "fallbacks",
        "extra_headers",
        "extra_body",
    ),
]
HEADERS = [
    *(f"x-{name.replace('_', '-')}" for name in NAMES),
    *(name.replace("_", "-") for name in NAMES if name not in ("host", "api_key")),
    *(
        "x-roundhouse-worker",
        "x-roundhouse-secret",
        "x-roundhouse-internal",
        "x-data-parallel-rank",
        "x-real-ip",
    ),
    *(
        "x-forwarded-for",
        "x-forwarded-user",
        "x-remote-user",
        "remote-user",
        "x-original-url",
        "x-rewrite-url",
    ),
    *(
        "x-http-method-override",
        "openai-organization",
        "openai-project",
        "x-request-id",
        "traceparent",
        "baggage",
    ),
]
ANSWERED: dict[str, Any] = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": ROUTE,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hi", "refusal": None},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}
PLAIN: dict[str, Any] = {"model": ROUTE, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def worker() -> Iterator[Scripted]:
    with scripted() as running:
        running.answer = ANSWERED
        yield running


@pytest.fixture
def served(transactional_db: None, worker: Scripted) -> Iterator[Served]:
    with in_front_of(worker, "endpoint:chat", worker_id=7020) as running:
        yield running


@pytest.fixture
def tripwire() -> Iterator[str]:
    """An address that nobody may connect to."""
    connects: list[object] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        while True:
            try:
                connected, address = listener.accept()
            except OSError:
                return
            connects.append(address)
            connected.close()

    thread = threading.Thread(target=listen)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)
    assert connects == []


def post(
    served: Served, body: dict[str, Any], *headers: str, query: str = "", key: str | None = ""
) -> Answer:
    return served.request(
        "POST", f"/v1/chat/completions{query}", json.dumps(body).encode(), *headers, key=key
    )


def everyone(value: object) -> dict[str, object]:
    return dict.fromkeys(NAMES, value)


def test_no_internal_name_decides_anything(served: Served, worker: Scripted, tripwire: str) -> None:
    assert post(served, PLAIN).status == 200
    [expected] = worker.asked
    worker.asked.clear()
    for value in (tripwire, 7021, True, {"url": tripwire}, [tripwire]):
        # Names that nobody knows are ignored, as OpenAI ignores them: all of them at once have no effect.
        answer = post(served, everyone(value) | PLAIN)
        assert answer.status == 200, answer.body
    message = PLAIN["messages"][0]
    for nested in (
        {"messages": [everyone(tripwire) | message]},
        {"stream_options": None, "metadata": {"url": tripwire}},
    ):
        assert post(served, PLAIN | nested).status == 200
    assert post(served, PLAIN, query=f"?{urlencode(everyone(tripwire))}").status == 200
    assert worker.asked == [expected] * 8


def test_no_header_decides_anything(served: Served, worker: Scripted, tripwire: str) -> None:
    assert post(served, PLAIN).status == 200
    [expected] = worker.asked
    worker.asked.clear()
    for value in (tripwire, "127.0.0.1", "true", "7021"):
        answer = post(served, PLAIN, *(f"{name}: {value}" for name in HEADERS))
        assert answer.status == 200, answer.body
        assert value not in answer.headers["x-request-id"]
    assert worker.asked == [expected] * 4


def test_no_name_skips_the_check_of_the_key(served: Served, worker: Scripted) -> None:
    for value in (True, "true", 1, "admin"):
        told = [f"{name}: {value}" for name in HEADERS if name != "api-key"]
        query = f"?{urlencode(everyone(value))}"
        assert post(served, everyone(value) | PLAIN, *told, query=query, key=None).status == 401
        assert served.request("GET", f"/v1/models{query}", None, *told, key=None).status == 401
        assert served.request("GET", f"/admin/{query}", None, *told, key=None).status == 302
    assert worker.asked == []


def test_what_the_gateway_owns_is_no_parameter() -> None:
    internal = {*NAMES, *OWNED} - {"user_id", "priority"}
    for endpoint in ENDPOINTS:
        assert not internal & set(endpoint.request.__struct_fields__), endpoint.path
    for path, operations in document()["paths"].items():
        for method, operation in operations.items():
            # What a path names is in no body.
            told = [one for one in operation.get("parameters", ()) if one.get("in") != "path"]
            named = {one["name"] for one in told if "name" in one}
            # Of the report and the list of keys, whose question these are.
            allowed = {"project_ids", "api_key_ids", "models", "user_ids", "project"}
            assert not internal & (named - allowed), (method, path)
