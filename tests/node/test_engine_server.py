"""The engine's HTTP server as a gateway meets it: a real process, real sockets."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio

from inference.worker.guard import Guard
from tests.node.engine_tools import (
    AUTH,
    ROOT,
    SECRET,
    child_environment,
    engine_process,
    events_of,
    load_of,
    question,
    ready,
    until,
)

CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "a"}}


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with engine_process(slots=4, context_length=1000) as url:
        yield url


@pytest_asyncio.fixture
async def session(engine: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(base_url=engine, headers=AUTH) as session:
        await ready(session, "")
        yield session


async def test_a_plain_answer_has_openais_shape_and_the_requests_id(session: aiohttp.ClientSession) -> None:
    body = question("Say it", max_tokens=3)
    async with session.post(CHAT, json=body, headers={"x-request-id": "req_7"}) as reply:
        answer = await reply.json()
        assert reply.status == 200
        assert reply.headers["x-request-id"] == "req_7"
    assert answer["id"] == "chatcmpl-req_7"
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "asked"
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert len(choice["message"]["content"].split()) == 3
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["usage"]["total_tokens"] == 5


async def test_every_chunk_ends_with_the_usage_so_far(session: aiohttp.ClientSession) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = question("Say it", max_tokens=3, stream=True, stream_options=options)
    async with session.post(CHAT, json=body, headers={"x-request-id": "req_8"}) as reply:
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = [event for _, event in await events_of(reply)]
    assert events.pop() == "[DONE]"
    counts = []
    for event in events:
        tail = re.fullmatch(
            r'.*\],"usage":\{"prompt_tokens":2,"completion_tokens":(\d+),"total_tokens":(\d+)'
            r'(?:,"prompt_tokens_details":\{[^{}]*\},"completion_tokens_details":\{[^{}]*\})?\}\}',
            event,
        )
        assert tail, event
        assert int(tail[2]) == int(tail[1]) + 2
        counts.append(int(tail[1]))
    assert counts == [0, 1, 2, 3, 3, 3]
    chunks = [json.loads(event) for event in events]
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-req_8"}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["created"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * 4 + ["length"]
    assert chunks[-2]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"] == []
    assert "prompt_tokens_details" in chunks[-1]["usage"]


async def test_usage_is_sent_once_or_not_at_all_unless_asked_for(session: aiohttp.ClientSession) -> None:
    async with session.post(CHAT, json=question("hi", max_tokens=2, stream=True)) as reply:
        assert not any('"usage"' in event for _, event in await events_of(reply))
    body = question("hi", max_tokens=2, stream=True, stream_options={"include_usage": True})
    async with session.post(CHAT, json=body) as reply:
        chunks = [json.loads(event) for _, event in (await events_of(reply))[:-1]]
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]


async def test_streamed_and_not_the_text_is_the_same_for_openais_client(engine: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{engine}/v1", api_key=SECRET, max_retries=0) as client:
        messages: list[Any] = [{"role": "user", "content": "!garbage"}]
        whole = await client.chat.completions.create(model="m", messages=messages)
        stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
        streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert whole.choices[0].message.content == streamed
    assert "data: [DONE]" in streamed
    assert whole.choices[0].finish_reason == "stop"


async def test_tokens_leave_as_they_are_made(session: aiohttp.ClientSession) -> None:
    async with session.post(CHAT, json=question("!slow 0.05 !tokens 8", stream=True)) as reply:
        events = [(at, event) for at, event in await events_of(reply) if '"content":" ' in event]
    gaps = [after - before for (before, _), (after, _) in pairwise(events)]
    assert len(gaps) == 6
    assert min(gaps) >= 0.03


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_stops_the_engine(
    session: aiohttp.ClientSession, engine: str, stream: bool
) -> None:
    host, port = engine.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(question("!slow 0.02 !tokens 900", stream=stream)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}\r\nContent-Length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)
    if stream:
        await reader.readuntil(b"\n\n")

    async def running(number: int) -> bool:
        return bool((await load_of(session, ""))["running"] == number)

    await until(lambda: running(1), "the request runs")
    writer.close()
    assert await until(lambda: running(0), "nothing runs", seconds=2) < 1
    tokens = (await load_of(session, ""))["tokens"]
    assert (await load_of(session, ""))["tokens"] == tokens


async def test_an_abort_answers_with_what_the_request_had_cost(session: aiohttp.ClientSession) -> None:
    body = question("!slow 0.02 !tokens 900", stream=True)
    async with session.post(CHAT, json=body, headers={"x-request-id": "doomed"}) as reply:
        await reply.content.readuntil(b"\n\n")
        async with session.post("/abort", json={"request_id": "doomed"}) as aborted:
            counts = await aborted.json()
        assert (await load_of(session, ""))["running"] == 0
        rest = (await reply.read()).decode()
    assert counts["prompt_tokens"] == 4
    assert counts["completion_tokens"] >= 1
    assert rest.count('"content":" ') <= counts["completion_tokens"]
    assert '"code":"aborted"' in rest
    assert "[DONE]" not in rest
    async with session.post("/abort", json={"request_id": "doomed"}) as again:
        assert await again.json() == {"prompt_tokens": 0, "completion_tokens": 0}


async def test_an_aborted_plain_request_is_answered(session: aiohttp.ClientSession) -> None:
    body = question("!hang")
    asked = asyncio.ensure_future(session.post(CHAT, json=body, headers={"x-request-id": "gone"}))

    async def hanging() -> bool:
        return bool((await load_of(session, ""))["running"] == 1)

    await until(hanging, "the request runs")
    async with session.post("/abort", json={"request_id": "gone"}) as aborted:
        assert aborted.status == 200
    async with await asyncio.wait_for(asked, 2) as reply:
        assert reply.status == 499


async def test_more_requests_than_slots_wait_their_turn(session: aiohttp.ClientSession) -> None:
    async def ask() -> int:
        async with session.post(CHAT, json=question("!slow 0.03 !tokens 10")) as reply:
            return reply.status

    asked = [asyncio.ensure_future(ask()) for _ in range(7)]

    async def loaded(running: int, waiting: int) -> bool:
        load = await load_of(session, "")
        assert load["running"] <= 4
        return (load["running"], load["waiting"]) == (running, waiting)

    await until(lambda: loaded(4, 3), "four run and three wait")
    assert await asyncio.gather(*asked) == [200] * 7
    await until(lambda: loaded(0, 0), "nothing runs or waits")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b'{"messages":[{"role":"user","content":"\xff"}]}', None),
        (b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}', None),
        (b"{}", "messages"),
        (b'{"messages":[]}', "messages"),
        (b'{"messages":[{"role":"user","content":7}]}', "messages[0].content"),
        (b'{"messages":[{"content":"x"}]}', "messages[0].role"),
        (
            b'{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}',
            "messages[0].content[0].type",
        ),
    ],
)
async def test_a_broken_body_is_refused_with_the_field(
    session: aiohttp.ClientSession, body: bytes, param: str | None
) -> None:
    async with session.post(CHAT, data=body) as reply:
        error = (await reply.json())["error"]
        assert reply.status == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 2.5},
        {"temperature": "hot"},
        {"top_p": -1},
        {"max_tokens": 0},
        {"max_tokens": "many"},
        {"stop": [""]},
        {"stop": ["a"] * 17},
        {"n": 129},
        {"top_logprobs": 2},
        {"top_logprobs": 21, "logprobs": True},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "custom", "custom": {"name": "x"}}]},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "b"}}, "tools": [TOOL]},
        {"tool_choice": "sometimes", "tools": [TOOL]},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"structured_outputs": {"regex": "a+"}},
        {"structured_outputs": {"choice": ["a"], "json": {}}},
        {"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "json_object"}},
        {"structured_outputs": {"json": "{"}},
        {"reasoning_effort": "hard"},
        {"min_p": 0.5},
        {"stream": "yes"},
    ],
)
async def test_a_wrong_or_unsupported_value_names_its_field(
    session: aiohttp.ClientSession, wrong: dict[str, Any]
) -> None:
    async with session.post(CHAT, json=question("hi", **wrong)) as reply:
        error = (await reply.json())["error"]
        assert reply.status == 400
    assert re.split(r"[\[.]", error["param"])[0] == next(iter(wrong))


async def test_null_means_not_given_and_unknown_fields_are_ignored(session: aiohttp.ClientSession) -> None:
    fields: dict[str, Any] = {
        "temperature": None,
        "stop": None,
        "tools": [],
        "n": 1,
        "min_p": 0,
        "user": "x",
        "foo": {"a": 1},
    }
    async with session.post(CHAT, json=question("hi", **fields)) as reply:
        assert reply.status == 200


async def test_text_parts_are_read_as_one_text(session: aiohttp.ClientSession) -> None:
    parts = [{"type": "text", "text": "!tokens"}, {"type": "text", "text": "2"}]
    async with session.post(CHAT, json={"messages": [{"role": "user", "content": parts}]}) as reply:
        answer = await reply.json()
    assert answer["usage"]["completion_tokens"] == 2
    assert answer["model"] == "sim"


async def test_a_prompt_beyond_the_context_is_a_plain_400_also_for_a_stream(
    session: aiohttp.ClientSession,
) -> None:
    async with session.post(CHAT, json=question("word " * 1000, stream=True)) as reply:
        assert reply.status == 400
        assert (await reply.json())["error"]["code"] == "context_length_exceeded"


async def test_an_engine_that_fails_before_the_first_token_is_a_plain_500(
    session: aiohttp.ClientSession,
) -> None:
    for fault in ("!error", "!cut"):
        for stream in (True, False):
            async with session.post(CHAT, json=question(fault, stream=stream)) as reply:
                assert reply.status == 500
                assert (await reply.json())["error"]["type"] == "server_error"


async def test_an_engine_that_fails_later_ends_the_stream_with_an_error(
    session: aiohttp.ClientSession,
) -> None:
    async with session.post(CHAT, json=question("!error 2", stream=True)) as reply:
        events = [event for _, event in await events_of(reply)]
    assert json.loads(events[-1])["error"]["code"] == "engine_error"
    assert len(events) == 4


async def test_a_cut_answer_does_not_look_finished(session: aiohttp.ClientSession) -> None:
    with pytest.raises(aiohttp.ClientPayloadError):
        async with session.post(CHAT, json=question("!cut 2", stream=True)) as reply:
            await reply.read()


async def test_models_are_listed_and_other_urls_are_json_errors(session: aiohttp.ClientSession) -> None:
    async with session.get("/v1/models") as reply:
        [model] = (await reply.json())["data"]
    assert model["id"] == "sim"
    assert model["max_model_len"] == 1000
    async with session.get("/nothing") as reply:
        assert reply.status == 404
        assert "error" in await reply.json()
    async with session.get(CHAT) as reply:
        assert reply.status == 405
        assert reply.headers["allow"] == "POST"
        assert "error" in await reply.json()


@pytest.mark.parametrize("path", ["/", "/load", "/health", "/abort", "/v1/models", CHAT, "/nothing"])
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", f"Bearer {SECRET}x", f"Basic {SECRET}", SECRET]
)
async def test_no_path_answers_without_the_secret(
    session: aiohttp.ClientSession, engine: str, path: str, header: str | None
) -> None:
    headers = {} if header is None else {"Authorization": header}
    async with aiohttp.ClientSession(headers=headers) as stranger:
        for method in ("GET", "POST", "OPTIONS", "DELETE"):
            async with stranger.request(method, engine + path) as reply:
                assert reply.status == 401
                assert (await reply.json())["error"]["code"] == "invalid_api_key"


async def test_two_authorization_headers_are_refused(session: aiohttp.ClientSession) -> None:
    async with session.get("/load", headers=[("Authorization", "Bearer x"), *AUTH.items()]) as reply:
        assert reply.status == 401


async def test_a_guard_without_a_secret_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROUNDHOUSE_WORKER_SECRET", raising=False)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("never called")

    with pytest.raises(RuntimeError, match="ROUNDHOUSE_WORKER_SECRET"):
        Guard(app)
    monkeypatch.setenv("ROUNDHOUSE_WORKER_SECRET", "x")
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("never called")

    await Guard(app)({"type": "websocket", "headers": []}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_the_guard_needs_the_standard_library_only() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import inference.worker.guard;"
        "ours = {'inference', 'inference.worker', 'inference.worker.guard'};"
        "others = {name.partition('.')[0] for name in set(sys.modules) - ours};"
        "others -= set(sys.stdlib_module_names);"
        "print(sorted(name for name in others if name not in ('__main__', 'sitecustomize')))"
    )
    done = subprocess.run(
        [sys.executable, "-ISc", code, str(ROOT)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_engine_server_loads_neither_torch_nor_django() -> None:
    code = (
        "import sys, inference.engines.server, inference.engines.app, inference.worker.supervisor;"
        "print([name for name in ('torch', 'transformers', 'django', 'celery') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=child_environment()
    )
    assert done.stdout.strip() == "[]"


async def test_a_loading_engine_reports_load_and_refuses_generation() -> None:
    with engine_process(load_seconds=60) as url:
        async with aiohttp.ClientSession(base_url=url, headers=AUTH) as session:
            assert (await load_of(session, ""))["running"] == 0
            async with session.get("/health") as reply:
                assert reply.status == 503
            async with session.post(CHAT, json=question("hi")) as reply:
                assert reply.status == 503
                assert reply.headers["retry-after"]
                assert (await reply.json())["error"]["code"] == "server_is_overloaded"
