"""Clients of the gateway whose model another server has."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from config.front import make_application
from inference.engines.server import EXIT_UNLOADED
from inference.engines.upstream.presets import PRESETS
from registry.actions.events import publish_change
from registry.models import UsageEvent
from tests.api.conftest import ROUTE, Served, Worker, eventually, say, serving
from tests.api.upstreams import WORKER_ID, foreign_server, upstream_worker
from tests.factories import make_api_key, make_deployment, make_price, make_worker
from tests.node.upstreams import ANSWER, KEY, MODEL, STREAM, Foreign, piece

PRESET = "llama.cpp"


@pytest.fixture(scope="module")
def theirs() -> Iterator[Foreign]:
    with foreign_server() as server:
        yield server


@pytest.fixture(scope="module")
def worker(theirs: Foreign) -> Iterator[Worker]:
    with upstream_worker(theirs.url, preset=PRESET) as worker:
        yield worker


@pytest.fixture
def served(transactional_db: None, theirs: Foreign, worker: Worker) -> Iterator[Served]:
    theirs.answer, theirs.status = ANSWER, 200
    theirs.asked.clear()
    deployment = make_deployment(
        route=ROUTE, engine="upstream", arguments={"url": theirs.url, "preset": PRESET}
    )
    capabilities = sorted(PRESETS[PRESET].capabilities)
    make_worker(deployment=deployment, id=WORKER_ID, url=worker.url, capabilities=capabilities)
    publish_change("route", ROUTE)
    front = make_application()
    with serving(front) as port:
        yield Served(port, make_api_key(name="tests")[1], front)


def client_of(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.base_url, api_key=served.api_key, max_retries=0, timeout=20)


SAY: list[Any] = [{"role": "user", "content": "Say hello."}]


def test_the_official_client_is_answered_and_charged(served: Served, theirs: Foreign) -> None:
    make_price(ROUTE, input_micros=1_000_000, output_micros=2_000_000)
    with client_of(served) as client:
        answer = client.chat.completions.create(model=ROUTE, messages=SAY, seed=3)
        theirs.answer = STREAM
        stream = client.chat.completions.create(
            model=ROUTE, messages=SAY, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
    assert answer.model == ROUTE
    assert answer.choices[0].message.content == "Hello there"
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == "Hello there"
    assert {one.model for one in chunks} == {ROUTE}
    told = chunks[-1].usage
    assert told is not None
    assert (told.prompt_tokens, told.completion_tokens) == (11, 5)
    bodies = [body for _, _, body in theirs.asked]
    assert [body["model"] for body in bodies] == [MODEL, MODEL]
    assert bodies[1]["stream_options"] == {"include_usage": True}
    eventually(lambda: UsageEvent.objects.count() == 2, "the ledger has both")
    for event in UsageEvent.objects.all():
        assert (event.prompt_tokens, event.completion_tokens) == (11, 5)
        assert event.cost_micros == 11 + 2 * 5


def test_a_stream_without_usage_is_not_free(served: Served, theirs: Foreign) -> None:
    theirs.answer = [piece("Hello"), piece(" there"), piece("", reason="stop"), "[DONE]"]
    with client_of(served) as client:
        stream = client.chat.completions.create(model=ROUTE, messages=SAY, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == "Hello there"
    event = eventually(lambda: UsageEvent.objects.first(), "the ledger has it")
    assert event.prompt_tokens > 0
    assert event.completion_tokens == 3


def test_refusals_reach_the_client_in_its_words(served: Served, theirs: Foreign) -> None:
    theirs.answer, theirs.status = {"error": {"message": "max_tokens is too large", "code": "x"}}, 400
    with client_of(served) as client:
        with pytest.raises(openai.BadRequestError, match="max_tokens is too large"):
            client.chat.completions.create(model=ROUTE, messages=SAY)
        with pytest.raises(openai.BadRequestError, match="min_tokens") as refused:
            client.chat.completions.create(model=ROUTE, messages=SAY, extra_body={"min_tokens": 3})
        assert refused.value.param == "min_tokens"
        theirs.answer, theirs.status = {"error": {"message": "canary: slow down"}}, 429
        with pytest.raises(openai.InternalServerError) as overloaded:
            client.chat.completions.create(model=ROUTE, messages=SAY)
    assert overloaded.value.status_code == 503
    assert "canary" not in str(overloaded.value)


def test_no_request_names_the_server(served: Served, theirs: Foreign) -> None:
    """S14: neither a field, nor a header, nor the query."""
    with socket.create_server(("127.0.0.1", 0)) as tripwire:
        tripwire.settimeout(0.2)
        elsewhere = f"http://127.0.0.1:{tripwire.getsockname()[1]}/v1"
        names = ("api_base", "base_url", "url", "upstream", "api_key", "extra_body")
        headers = [f"X-{name}: {elsewhere}" for name in ("Upstream", "Api-Base", "Prefiller-Url")]
        answer = served.chat(say("Hi", **dict.fromkeys(names, elsewhere)), *headers)
        assert answer.status == 200
        [(_, sent, body)] = theirs.asked
        assert sent["Authorization"] == f"Bearer {KEY}"
        assert not set(names) & set(body)
        assert served.api_key not in str(sent)
        with pytest.raises(TimeoutError):
            tripwire.accept()


def test_a_refused_key_ends_the_worker_and_no_client_hears_of_it(served: Served, theirs: Foreign) -> None:
    theirs.answer, theirs.status = {"error": {"message": f"Incorrect API key: {KEY}"}}, 401
    with upstream_worker(theirs.url, preset=PRESET, worker_id=WORKER_ID + 1) as other:
        # Nobody starts it anew here: its queue is not waited in for long.
        deployment = make_deployment(
            route="org/other", engine="upstream", arguments={"url": theirs.url}, queue_seconds=1
        )
        make_worker(deployment=deployment, id=WORKER_ID + 1, url=other.url, capabilities=["endpoint:chat"])
        publish_change("route", "org/other")
        eventually(
            lambda: served.chat(say("Hi") | {"model": "org/other"}).status == 503 and theirs.asked,
            "the server was asked",
        )
        request = served.chat(say("Hi") | {"model": "org/other"})
        assert (request.status, request.error()["code"]) == (503, "server_is_overloaded")
        assert KEY not in request.body.decode()
        eventually(lambda: other.process.poll() == EXIT_UNLOADED, "the worker has ended")
