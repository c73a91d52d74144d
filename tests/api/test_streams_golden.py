"""Streams, byte by byte: what each event holds, when the body ends, what is said while nothing comes."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from openai import APIError

from config.front import make_application
from registry.models import UsageEvent
from registry.models import Worker as WorkerRow
from registry.states import Outcome
from tests.api.conftest import (
    ROUTE,
    WORKER_ID,
    Answer,
    Served,
    Worker,
    eventually,
    say,
    serving,
    worker_process,
)

pytestmark = pytest.mark.django_db(transaction=True)

COMMENT = b": keep-alive\n\n"


def unchunked(body: bytes) -> bytes:
    """The text of a chunked body, after checking that it is complete and that nothing follows it."""
    text = b""
    while True:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        assert rest[length : length + 2] == b"\r\n"
        if not length:
            assert rest == b"\r\n"
            return text
        text, body = text + rest[:length], rest[length + 2 :]


def chunks_of(text: bytes) -> list[dict[str, Any]]:
    """The chunks of a stream that ended well."""
    *events, done, rest = text.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(re.fullmatch(r"data: \{[^\n]*\}", event) for event in events), events
    return [json.loads(event.removeprefix("data: ")) for event in events]


def completion(served: Served, **fields: Any) -> Answer:
    body = {"model": ROUTE, "prompt": "!tokens 3", "stream": True} | fields
    return served.request("POST", "/v1/completions", json.dumps(body).encode())


# -- the bytes


def test_a_chat(served: Served) -> None:
    answer = served.chat(say("!tokens 3", stream=True))
    chunks = chunks_of(unchunked(answer.body))
    first, *texts, last = [chunk["choices"][0] for chunk in chunks]
    assert list(first["delta"].items()) == [("role", "assistant"), ("content", ""), ("refusal", None)]
    assert [set(choice["delta"]) for choice in texts] == [{"content"}] * 3
    assert last["delta"] == {}
    assert [choice["finish_reason"] for choice in (first, *texts, last)] == [None] * 4 + ["stop"]
    for chunk in chunks:
        assert chunk["id"] == f"chatcmpl-{answer.headers['x-request-id']}"
        assert (chunk["object"], chunk["model"]) == ("chat.completion.chunk", ROUTE)
        assert chunk["created"] == chunks[0]["created"]
        assert "usage" not in chunk
        (choice,) = chunk["choices"]
        assert choice["index"] == 0
        assert choice["logprobs"] is None


def test_a_completion(served: Served) -> None:
    answer = completion(served)
    chunks = chunks_of(unchunked(answer.body))
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    for chunk in chunks:
        assert chunk["id"] == f"cmpl-{answer.headers['x-request-id']}"
        # Not `.chunk`: completions never had an object of their own for it.
        assert (chunk["object"], chunk["model"]) == ("text_completion", ROUTE)
        assert isinstance(chunk["choices"][0]["text"], str)
        assert "usage" not in chunk


@pytest.mark.parametrize(
    "ask", [completion, lambda served, **fields: served.chat(say("!tokens 3", **fields))]
)
def test_usage_is_null_until_the_last_chunk_which_has_no_choice(served: Served, ask: Any) -> None:
    answer = ask(served, stream=True, stream_options={"include_usage": True})
    *chunks, last = chunks_of(unchunked(answer.body))
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    used = last["usage"]
    assert (used["prompt_tokens"], used["completion_tokens"], used["total_tokens"]) == (2, 3, 5)
    assert last["id"] == chunks[0]["id"]
    # What OpenAI calls obfuscation may be refused; a stream without it is the same.
    plain = ask(served, stream=True, stream_options={"include_usage": False, "include_obfuscation": False})
    assert all("usage" not in chunk for chunk in chunks_of(unchunked(plain.body)))


def test_the_headers(served: Served) -> None:
    answer = served.chat(say("hi", stream=True), "Accept-Encoding: gzip, deflate, br, zstd")
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-encoding" not in answer.headers
    assert "content-length" not in answer.headers
    assert answer.headers["transfer-encoding"] == "chunked"
    assert "no-cache" in answer.headers["cache-control"]
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["openai-version"] == "2020-10-01"
    assert answer.headers["x-request-id"].startswith("req_")
    unchunked(answer.body)


def test_the_body_ends_with_its_last_event(served: Served) -> None:
    """The official asynchronous client reads on after `[DONE]` until the body ends: the end comes with it,
    and the connection takes the next request."""
    body = json.dumps(say("!tokens 3", stream=True)).encode()
    request = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        f"Authorization: Bearer {served.api_key}\r\n\r\n"
    ).encode() + body
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as connected:
        between = []
        for _ in range(3):
            connected.sendall(request)
            received = b""
            while b"data: [DONE]\n\n" not in received:
                received += connected.recv(65536)
            done = time.monotonic()
            while not received.endswith(b"0\r\n\r\n"):
                received += connected.recv(65536)
            between.append(time.monotonic() - done)
    # The machine may pause in one of them; an end that is sent late would be late in all.
    assert min(between) < 0.2


# -- while nothing comes


@pytest.fixture
def impatient(facts: str) -> Iterator[Served]:
    """A gateway that comments on a stream which said nothing for a fifth of a second."""
    front = make_application()
    front.gateway.waiting.seconds = 0.2
    with serving(front) as port:
        yield Served(port, facts, front)


def test_a_stream_that_says_nothing_for_long_is_kept_alive_by_comments(impatient: Served) -> None:
    text = unchunked(impatient.chat(say("!tokens 3 !slow 0.7", stream=True)).body)
    assert text.count(COMMENT) >= 3
    assert len(chunks_of(text.replace(COMMENT, b""))) == 5
    # One that speaks is left alone.
    assert COMMENT not in unchunked(impatient.chat(say("!tokens 40 !slow 0.02", stream=True)).body)


async def test_the_official_client_reads_past_the_comments(impatient: Served) -> None:
    async with impatient.client() as client:
        stream = await client.chat.completions.create(
            model=ROUTE, messages=[{"role": "user", "content": "!tokens 2 !slow 0.7"}], stream=True
        )
        chunks = [chunk async for chunk in stream]
        whole = await client.chat.completions.create(
            model=ROUTE, messages=[{"role": "user", "content": "!tokens 2 !slow 0.7"}]
        )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


@pytest.fixture
def mortal(facts: str) -> Iterator[Worker]:
    with worker_process() as running:
        WorkerRow.objects.filter(pk=WORKER_ID).update(url=running.url)
        yield running


def test_what_fails_after_a_comment_is_told_within_the_stream(mortal: Worker, impatient: Served) -> None:
    answers: list[Answer] = []
    asked = say("!hang 0", stream=True)
    asking = threading.Thread(target=lambda: answers.append(impatient.chat(asked)))
    asking.start()
    eventually(lambda: mortal.load()["running"] == 1, "the worker has it")
    time.sleep(0.8)
    mortal.process.kill()
    asking.join(10)
    (answer,) = answers
    text = unchunked(answer.body)
    assert answer.status == 200
    assert text.count(COMMENT) >= 1
    assert b"[DONE]" not in text
    said = text.rpartition(b"data: ")[2]
    assert text.endswith(b"\n\n")
    error = json.loads(said)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "service_unavailable_error"
    assert isinstance(error["code"], str)
    event = impatient.event(answer.headers["x-request-id"])
    assert event.outcome == Outcome.INTERRUPTED
    assert UsageEvent.objects.count() == 1


async def test_the_official_client_raises_what_is_told_within_the_stream(
    mortal: Worker, impatient: Served
) -> None:
    threading.Timer(0.8, mortal.process.kill).start()
    async with impatient.client() as client:
        stream = await client.chat.completions.create(
            model=ROUTE, messages=[{"role": "user", "content": "!hang 0"}], stream=True
        )
        with pytest.raises(APIError, match=r"overloaded|interrupted"):
            async for _ in stream:
                pass
