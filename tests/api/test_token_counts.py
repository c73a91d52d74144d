"""P3: what is counted is what the tokenizer counts, for whatever text, streamed or whole; and it makes no
difference where the bytes of a request or of a worker's answer are cut into packets."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from tokenizers import Tokenizer

from tests.api.conftest import ROUTE, Answer, Served, Worker, say, worker_process
from tests.api.scripted import Scripted, in_front_of, scripted
from tests.engines.tiny_model import END, START, make_tiny_llama

pytestmark = pytest.mark.django_db(transaction=True)

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
ODD = "a\u0301 \U0001f468\u200d\U0001f469 \ufeff\u202e \x01\x85 \u0e33 \U000e0001 fi \r\n"
"""Combining, joined, invisible, from right to left, and what is no character at all."""
MOST = 5
GENTLE: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def worker(model: Path) -> Iterator[Worker]:
    """A real engine with a tokenizer of one token per byte, which the gateways here speak to."""
    with worker_process(model=model, device="cpu", dtype="float32") as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


def counted(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def events(answer: Answer) -> list[dict[str, Any]]:
    """Of a stream that came whole."""
    text = unchunked(answer.body).decode()
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", text
    return [json.loads(line) for line in lines[:-1]]


def unchunked(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        whole, body = whole + rest[:length], rest[length + 2 :]
    return whole


# -- the tokenizer's count


def _same_everywhere(served: Served, tokenizer: Tokenizer, text: str, most: int) -> None:
    rendered = f"{START}user\n{text}{END}\n{START}assistant\n"
    prompt = counted(tokenizer, rendered)
    asked = say(text, max_tokens=most, temperature=0)
    whole = served.chat(asked)
    assert whole.status == 200, whole.body
    usage = whole.json()["usage"]
    [choice] = whole.json()["choices"]
    said, generated = choice["message"]["content"], usage["completion_tokens"]
    assert usage["prompt_tokens"] == prompt
    assert usage["total_tokens"] == prompt + generated
    assert generated == most or (choice["finish_reason"] == "stop" and generated < most)
    if "\N{REPLACEMENT CHARACTER}" not in said:
        # A token is a byte, but for those that say nothing, such as the end.
        assert counted(tokenizer, said) <= generated

    streamed = served.chat(asked | {"stream": True, "stream_options": {"include_usage": True}})
    chunks = events(streamed)
    assert chunks[-1]["usage"] == usage
    pieces = [one["delta"].get("content") or "" for chunk in chunks for one in chunk["choices"]]
    assert "".join(pieces) == said

    body = {"model": ROUTE, "messages": asked["messages"]}
    told = served.request("POST", "/tokenize", json.dumps(body).encode())
    assert (told.status, told.json()["count"]) == (200, prompt)
    for answer in (whole, streamed):
        event = served.event(answer.headers["x-request-id"])
        assert (event.prompt_tokens, event.completion_tokens) == (prompt, usage["completion_tokens"])


def _same_of_prompts(served: Served, tokenizer: Tokenizer, texts: Sequence[str], most: int) -> None:
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    for prompt in (list(texts), ids):
        body = {"model": ROUTE, "prompt": prompt, "max_tokens": most, "temperature": 0}
        whole = served.request("POST", "/v1/completions", json.dumps(body).encode())
        assert whole.status == 200, whole.body
        usage = whole.json()["usage"]
        assert usage["prompt_tokens"] == sum(map(len, ids))
        streaming = body | {"stream": True, "stream_options": {"include_usage": True}}
        streamed = served.request("POST", "/v1/completions", json.dumps(streaming).encode())
        assert events(streamed)[-1]["usage"] == usage
        for answer in (whole, streamed):
            event = served.event(answer.headers["x-request-id"])
            assert (event.prompt_tokens, event.completion_tokens) == (
                usage["prompt_tokens"],
                usage["completion_tokens"],
            )


@settings(max_examples=12, **GENTLE)
@example(text=ODD, most=MOST)
@given(text=TEXTS, most=st.integers(1, 2 * MOST))
def test_a_conversation_counts_what_the_tokenizer_counts(
    served: Served, tokenizer: Tokenizer, text: str, most: int
) -> None:
    _same_everywhere(served, tokenizer, text, most)


@pytest.mark.full
@settings(max_examples=200, **GENTLE)
@given(text=TEXTS, most=st.integers(1, 40))
def test_many_conversations_do(served: Served, tokenizer: Tokenizer, text: str, most: int) -> None:
    _same_everywhere(served, tokenizer, text, most)


PROMPTS = st.lists(TEXTS.filter(bool), min_size=1, max_size=3)


@settings(max_examples=8, **GENTLE)
@given(texts=PROMPTS, most=st.integers(1, MOST))
def test_prompts_count_what_the_tokenizer_counts(
    served: Served, tokenizer: Tokenizer, texts: list[str], most: int
) -> None:
    _same_of_prompts(served, tokenizer, texts, most)


@pytest.mark.full
@settings(max_examples=150, **GENTLE)
@given(texts=PROMPTS, most=st.integers(1, 20))
def test_many_prompts_do(served: Served, tokenizer: Tokenizer, texts: list[str], most: int) -> None:
    _same_of_prompts(served, tokenizer, texts, most)


# -- wherever the client's bytes are cut


def request_of(served: Served, body: dict[str, Any]) -> bytes:
    sent = json.dumps(body, ensure_ascii=False).encode()
    head = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: Bearer {served.api_key}",
        "Content-Type: application/json",
        f"Content-Length: {len(sent)}",
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + sent


def in_packets(served: Served, packets: Sequence[bytes]) -> Answer:
    """The answer to a request whose parts the server reads one by one."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connected:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for packet in packets:
            connected.sendall(packet)
            time.sleep(0.001)
        received = b""
        while b"\r\n\r\n" not in received or not _whole(received):
            part = connected.recv(65536)
            assert part, received
            received += part
    return Answer.of(received, 0.0)


def _whole(received: bytes) -> bool:
    head, _, body = received.partition(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return len(body) >= int(length.partition(b":")[2])


def test_a_request_counts_the_same_wherever_it_is_cut(served: Served) -> None:
    _cut_request(served, every=9)


@pytest.mark.full
def test_a_request_counts_the_same_cut_at_every_byte(served: Served) -> None:
    _cut_request(served, every=1)


def _cut_request(served: Served, *, every: int) -> None:
    request = request_of(served, say(ODD, max_tokens=1, temperature=0))
    text = request.index(ODD.split()[0].encode())
    whole = in_packets(served, [request])
    assert whole.status == 200, whole.body
    usage, content = whole.json()["usage"], whole.json()["choices"]
    # Every byte of the text, some of all the others.
    places = sorted({*range(1, len(request), every), *range(text, text + 40)})
    for at in places:
        answer = in_packets(served, [request[:at], request[at:]])
        assert (answer.status, answer.json()["usage"], answer.json()["choices"]) == (200, usage, content), at
    one_by_one = in_packets(served, [request[at : at + 1] for at in range(len(request))])
    assert (one_by_one.json()["usage"], one_by_one.json()["choices"]) == (usage, content)


# -- wherever the worker's bytes are cut


class Sliced(Scripted):
    """Answers with `told`, cut at these places."""

    told = b""
    streams = True
    cuts: Sequence[int] = ()

    async def _answer(self, request: Request) -> Response:
        await request.body()
        edges = [0, *self.cuts, len(self.told)]

        async def pieces() -> AsyncIterator[bytes]:
            for begin, end in pairwise(edges):
                yield self.told[begin:end]
                # On its way before the next is written.
                await asyncio.sleep(0)

        kind = "text/event-stream" if self.streams else "application/json"
        return StreamingResponse(pieces(), media_type=kind)


HEAD: dict[str, Any] = {"id": "chatcmpl-1", "created": 1, "model": "m"}
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def _whole_answer(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    told = {**HEAD, "object": "chat.completion", "choices": [choice], "usage": USAGE}
    return json.dumps(told, ensure_ascii=False).encode()


def _stream_of(pieces: Sequence[str]) -> bytes:
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        *({"content": one} for one in pieces),
    ]
    chunks = [
        {**HEAD, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]}
        for delta in deltas
    ]
    chunks.append({**HEAD, "choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]})
    chunks.append({**HEAD, "choices": [], "usage": USAGE})
    kind = {"object": "chat.completion.chunk"}
    told = [f"data: {json.dumps(kind | chunk, ensure_ascii=False)}\n\n" for chunk in chunks]
    return "".join([*told, "data: [DONE]\n\n"]).encode()


@pytest.fixture(scope="module")
def module_slicer() -> Iterator[Sliced]:
    with scripted(Sliced()) as running:
        assert isinstance(running, Sliced)
        yield running


@pytest.fixture
def before_slicer(module_slicer: Sliced, transactional_db: None) -> Iterator[Served]:
    with in_front_of(module_slicer, "endpoint:chat", worker_id=7040) as running:
        yield running


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.full)])
def test_an_answer_counts_the_same_wherever_the_worker_cuts_it(
    before_slicer: Served, module_slicer: Sliced, stream: bool, every: int
) -> None:
    text = ODD.replace("\r\n", "\u2028")
    module_slicer.streams = stream
    module_slicer.told = _stream_of([text[:3], text[3:]]) if stream else _whole_answer(text)
    size = len(module_slicer.told)
    first = module_slicer.told.index(text[:3].encode())
    # Every byte of the first text, every end of a line, some of all the others.
    ends = {at for at in range(1, size) if module_slicer.told[at - 1 : at + 1].count(b"\n")}
    places = sorted({*range(1, size, every), *range(first, first + 40), *(ends if stream else ())})
    asked = say("hi", stream=stream) | ({"stream_options": {"include_usage": True}} if stream else {})
    for cuts in [[], *([at] for at in places), range(1, size)]:
        module_slicer.cuts = cuts
        answer = before_slicer.chat(asked)
        assert answer.status == 200, (cuts, answer.body)
        if stream:
            told = events(answer)
            said = "".join(one["delta"].get("content") or "" for chunk in told for one in chunk["choices"])
            usage = told[-1]["usage"]
        else:
            said = answer.json()["choices"][0]["message"]["content"]
            usage = answer.json()["usage"]
        assert said == text, cuts
        assert {name: usage[name] for name in USAGE} == USAGE, cuts
    event = before_slicer.event(answer.headers["x-request-id"])
    assert (event.prompt_tokens, event.completion_tokens) == (7, 3)
