"""Chat completions as clients meet them: the official client for what works, sockets for the rest."""

from __future__ import annotations

import itertools
import json
import re
import socket
import time
from typing import Any

import pytest
from openai import APIError, AuthenticationError, NotFoundError

from registry.models import UsageEvent
from registry.states import Outcome
from tests.api.conftest import ROUTE, Served, Worker, eventually, say, worker_process

pytestmark = pytest.mark.django_db(transaction=True)


def messages(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


async def test_a_whole_answer_and_a_streamed_one_have_the_same_text(served: Served) -> None:
    async with served.client() as client:
        whole = await client.chat.completions.create(model=ROUTE, messages=messages("!tokens 12"))
        stream = await client.chat.completions.create(
            model=ROUTE, messages=messages("!tokens 12"), stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert whole.model == ROUTE
    assert whole.id.startswith("chatcmpl-")
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (2, 12)
    assert whole.choices[0].finish_reason == "stop"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.model for chunk in chunks} == {ROUTE}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks].count("stop") == 1
    assert all(chunk.usage is None for chunk in chunks)


async def test_usage_is_streamed_in_one_last_chunk_when_asked_for(served: Served) -> None:
    answer = served.chat(say("!tokens 5", stream=True, stream_options={"include_usage": True}))
    events = events_of(answer.body)
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    plain = [json.loads(event) for event in events_of(served.chat(say("!tokens 5", stream=True)).body)[:-1]]
    assert all("usage" not in chunk for chunk in plain)
    assert all(chunk["choices"] for chunk in plain)


def test_each_answer_is_in_the_ledger_once_with_its_tokens(served: Served) -> None:
    for stream in (False, True):
        answer = served.chat(say("one two three !tokens 9", stream=stream, max_tokens=7))
        assert answer.status == 200
        event = served.event(answer.headers["x-request-id"])
        assert (event.prompt_tokens, event.completion_tokens) == (5, 7)
        assert (event.status, event.outcome, event.route) == (200, Outcome.OK, ROUTE)
        assert event.stream is stream
        assert event.attempts == 1
        assert event.worker
        assert event.ttft_ms is not None
        assert event.duration_ms is not None


def test_answers_carry_a_request_id_and_the_headers_of_the_api(served: Served) -> None:
    answer = served.chat(say("hi"))
    assert len(answer.headers["x-request-id"]) == 36
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert int(answer.headers["openai-processing-ms"]) >= 0
    times = dict(re.findall(r"(\w+);dur=([0-9.]+)", answer.headers["server-timing"]))
    assert times.keys() == {"auth", "queue", "dispatch", "upstream"}
    assert float(times["upstream"]) > 0
    assert answer.json()["id"] == f"chatcmpl-{answer.headers['x-request-id']}"
    # Ours always: one that a client sends could repeat another's in the ledger.
    assert served.chat(say("hi"), "x-request-id: mine").headers["x-request-id"].startswith("req_")
    stream = served.chat(say("hi", stream=True))
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "no-cache" in stream.headers["cache-control"]
    assert stream.headers["x-accel-buffering"] == "no"


def test_max_completion_tokens_wins_over_max_tokens(served: Served) -> None:
    answer = served.chat(say("!tokens 9", max_tokens=8, max_completion_tokens=3)).json()
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_garbage_in_the_answers_text_passes_unchanged(served: Served) -> None:
    whole = served.chat(say("!garbage")).json()
    events = events_of(served.chat(say("!garbage", stream=True)).body)
    assert events[-1] == "[DONE]"
    text = "".join(
        choice["delta"].get("content") or ""
        for event in events[:-1]
        for choice in json.loads(event)["choices"]
    )
    assert text == whole["choices"][0]["message"]["content"]
    assert ',"usage":{"prompt_tokens":0' in text


async def test_nothing_buffers_a_stream(served_by_both: Served) -> None:
    # The machine may pause in one of them, and what came meanwhile is then read together.
    for _ in range(3):
        async with served_by_both.client() as client:
            stream = await client.chat.completions.create(
                model=ROUTE, messages=messages("!tokens 12 !slow 0.05"), stream=True
            )
            moments = [time.monotonic() async for chunk in stream if chunk.choices[0].delta.content]
        gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
        assert len(gaps) >= 10
        if sorted(gaps)[1] >= 0.03:
            break
    assert sorted(gaps)[1] >= 0.03, gaps


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_engine_within_a_second(
    served_by_both: Served, worker: Worker, stream: bool
) -> None:
    body = json.dumps(say("!tokens 400 !slow 0.05", stream=stream)).encode()
    before = worker.load()["tokens"]
    left = socket.create_connection(("127.0.0.1", served_by_both.port))
    left.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        + f"Authorization: Bearer {served_by_both.api_key}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    seen = b""
    if stream:
        while seen.count(b'"content"') < 5:
            seen += left.recv(65536)
    eventually(lambda: worker.load()["tokens"] >= before + 4, "the engine has made some tokens")
    left.close()
    went = time.monotonic()
    eventually(lambda: worker.load()["running"] == 0, "the engine stops", seconds=3)
    assert time.monotonic() - went < 1.0
    event = eventually(lambda: UsageEvent.objects.first(), "the ledger has it")
    assert (event.status, event.outcome) == (499, Outcome.ABORTED)
    assert event.completion_tokens >= 4
    assert event.prompt_tokens == 4


def test_a_worker_that_breaks_off_ends_the_stream_with_an_error_and_no_done(served: Served) -> None:
    answer = served.chat(say("!tokens 9 !error 3", stream=True))
    assert answer.status == 200
    events = events_of(answer.body)
    assert "[DONE]" not in events
    error = json.loads(events[-1])["error"]
    assert error["code"] == "stream_interrupted"
    assert set(error) == {"message", "type", "param", "code"}
    event = served.event(answer.headers["x-request-id"])
    assert event.outcome == Outcome.INTERRUPTED
    assert event.completion_tokens >= 2


async def test_the_official_client_raises_when_a_stream_breaks_off(served: Served) -> None:
    async with served.client() as client:
        stream = await client.chat.completions.create(
            model=ROUTE, messages=messages("!tokens 9 !cut 3"), stream=True
        )
        with pytest.raises(APIError, match="interrupted"):
            async for _ in stream:
                pass


def test_another_worker_answers_when_one_is_dead(served_with_a_dead_worker: Served) -> None:
    served = served_with_a_dead_worker
    answers = [served.chat(say("hi", stream=number % 2 == 0)) for number in range(8)]
    assert [answer.status for answer in answers] == [200] * 8
    attempts = [served.event(answer.headers["x-request-id"]).attempts for answer in answers]
    # The first that met it tried twice; from then on the dead one is left out.
    assert sorted(attempts) in ([1] * 8, [1] * 7 + [2])


@pytest.fixture
def served_with_a_dead_worker(served: Served) -> Served:
    from registry.actions.events import publish_change
    from registry.models import Deployment
    from tests.factories import make_worker

    make_worker(deployment=Deployment.objects.get(), id=7002, url="http://127.0.0.1:9")
    publish_change("deployment", "1")
    fleet = served.front.gateway.fleet if served.front else None
    assert fleet is not None
    eventually(lambda: 7002 in fleet.tallies, "the gateway knows the dead worker")
    return served


def test_without_a_worker_the_answer_is_503_with_retry_after(facts: str) -> None:
    from config.front import make_application
    from registry.models import Deployment
    from registry.models import Worker as WorkerRow
    from tests.api.conftest import serving

    WorkerRow.objects.all().delete()
    Deployment.objects.update(replicas=0)
    front = make_application()
    with serving(front) as port:
        served = Served(port, facts, front)
        answer = served.chat(say("hi"))
        assert answer.status == 503
        assert answer.error()["code"] == "server_is_overloaded"
        assert int(answer.headers["retry-after"]) >= 1
        event = served.event(answer.headers["x-request-id"])
        assert (event.status, event.outcome, event.completion_tokens) == (503, Outcome.FAILED, 0)


def test_a_worker_killed_in_mid_answer_leaves_what_was_seen_in_the_ledger(facts: str) -> None:
    from config.front import make_application
    from registry.models import Worker as WorkerRow
    from tests.api.conftest import WORKER_ID, serving

    with worker_process() as mortal:
        WorkerRow.objects.filter(pk=WORKER_ID).update(url=mortal.url)
        front = make_application()
        with serving(front) as port:
            served = Served(port, facts, front)
            answer = served.chat(say("!tokens 20 !crash 6", stream=True))
            events = events_of(answer.body)
            assert json.loads(events[-1])["error"]["code"] == "stream_interrupted"
            seen = sum(1 for event in events[:-1] if '"content":"' in event) - 1
            event = served.event(answer.headers["x-request-id"])
            assert event.outcome == Outcome.INTERRUPTED
            assert event.completion_tokens >= seen > 0


async def test_the_official_client_understands_the_refusals(served: Served) -> None:
    async with served.client() as client:
        with pytest.raises(NotFoundError) as unknown:
            await client.chat.completions.create(model="nobody", messages=messages("hi"))
        assert unknown.value.code == "model_not_found"
        assert unknown.value.request_id
    async with served.client(api_key="sk-wrong") as client:
        with pytest.raises(AuthenticationError):
            await client.chat.completions.create(model=ROUTE, messages=messages("hi"), stream=True)


def test_what_the_engine_refuses_is_told_in_its_words(served: Served) -> None:
    answer = served.chat(say("word " * 9000))
    assert answer.status == 400
    error = answer.error()
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "maximum context length is 8192 tokens" in error["message"]
    assert served.event(answer.headers["x-request-id"]).outcome == Outcome.FAILED


def events_of(body: bytes) -> list[str]:
    """The data of every event in a chunked body."""
    text = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        text, body = text + body[:length], body[length + 2 :]
    *events, rest = text.decode().split("\n\n")
    assert rest == ""
    return [event.removeprefix("data: ") for event in events]
