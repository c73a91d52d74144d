"""Completions on an engine's port: text, token ids and several prompts at once."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from itertools import groupby
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio

from tests.node.engine_tools import AUTH, SECRET, engine_process, events_of, load_of, ready, until

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with engine_process(slots=4, context_length=1000) as url:
        yield url


@pytest_asyncio.fixture
async def session(engine: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(base_url=engine, headers=AUTH) as session:
        await ready(session, "")
        yield session


async def complete(session: aiohttp.ClientSession, **body: Any) -> dict[str, Any]:
    async with session.post(PATH, json={"model": "asked", **body}) as reply:
        answer: dict[str, Any] = await reply.json()
        assert reply.status == 200, answer
    return answer


async def refused(session: aiohttp.ClientSession, **body: Any) -> dict[str, Any]:
    async with session.post(PATH, json={"model": "asked", **body}) as reply:
        assert reply.status == 400
        error: dict[str, Any] = (await reply.json())["error"]
    return error


async def test_a_plain_completion_has_openais_shape_and_sixteen_tokens(
    session: aiohttp.ClientSession,
) -> None:
    answer = await complete(session, prompt="!tokens 40 steam")
    [choice] = answer["choices"]
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    assert len(choice["text"].split()) == 16
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 16, 19)


async def test_each_prompt_has_the_answer_it_has_alone(session: aiohttp.ClientSession) -> None:
    prompts = [f"prompt {at} !" for at in range(9)]
    together = await complete(session, prompt=prompts, max_tokens=5)
    assert [choice["index"] for choice in together["choices"]] == list(range(9))
    alone = [(await complete(session, prompt=prompt, max_tokens=5))["choices"][0] for prompt in prompts]
    assert [choice["text"] for choice in together["choices"]] == [choice["text"] for choice in alone]
    assert together["usage"]["prompt_tokens"] == 27
    assert together["usage"]["completion_tokens"] == 45


async def test_prompts_run_at_the_same_time(session: aiohttp.ClientSession) -> None:
    body = {"prompt": ["!slow 0.02 a", "!slow 0.02 b", "!slow 0.02 c"], "max_tokens": 8, "stream": True}
    async with session.post(PATH, json=body) as reply:
        events = [json.loads(event) for _, event in (await events_of(reply))[:-1]]
    order = [choice["index"] for event in events for choice in event["choices"]]
    assert len(list(groupby(order))) > 8, "the choices come interleaved"
    for index in range(3):
        reasons = [c["finish_reason"] for e in events for c in e["choices"] if c["index"] == index]
        assert reasons == [None] * 7 + ["length"]


async def test_a_streams_chunks_carry_the_sum_of_all_prompts(session: aiohttp.ClientSession) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": ["one two", "three"], "max_tokens": 3, "stream": True, "stream_options": options}
    async with session.post(PATH, json=body) as reply:
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        raw = [event for _, event in await events_of(reply)]
    assert raw.pop() == "[DONE]"
    events = [json.loads(event) for event in raw]
    assert all(event.endswith("}}") and ',"usage":{"prompt_tokens":' in event for event in raw)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["prompt_tokens"] == 3
    assert events[-1]["usage"]["completion_tokens"] == 6


async def test_streamed_and_not_the_text_is_the_same_for_openais_client(engine: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{engine}/v1", api_key=SECRET, max_retries=0) as client:
        whole = await client.completions.create(model="m", prompt="!garbage", max_tokens=99)
        stream = await client.completions.create(model="m", prompt="!garbage", max_tokens=99, stream=True)
        streamed = "".join([chunk.choices[0].text async for chunk in stream])
    assert whole.choices[0].text == streamed
    assert "data: [DONE]" in streamed


async def test_echo_begins_with_the_prompt_and_counts_no_token_for_it(
    session: aiohttp.ClientSession,
) -> None:
    plain = await complete(session, prompt="Once upon", max_tokens=4)
    echoed = await complete(session, prompt="Once upon", max_tokens=4, echo=True)
    assert echoed["choices"][0]["text"] == "Once upon" + plain["choices"][0]["text"]
    assert echoed["usage"] == plain["usage"]


async def test_no_tokens_and_echo_gives_the_prompt_alone(session: aiohttp.ClientSession) -> None:
    answer = await complete(session, prompt=["Once upon", "a time"], max_tokens=0, echo=True)
    assert [choice["text"] for choice in answer["choices"]] == ["Once upon", "a time"]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert answer["usage"]["completion_tokens"] == 0


async def test_token_ids_are_one_prompt_or_several(session: aiohttp.ClientSession) -> None:
    one = await complete(session, prompt=[5, 6, 7], max_tokens=2)
    assert len(one["choices"]) == 1
    assert one["usage"]["prompt_tokens"] == 3
    several = await complete(session, prompt=[[5, 6, 7], [8]], max_tokens=2)
    assert several["choices"][0]["text"] == one["choices"][0]["text"]
    assert several["usage"]["prompt_tokens"] == 4


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": [40000]}, "prompt"),
        ({"prompt": ["text", 5]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({}, "prompt"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "x", "n": 129}, "n"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "suffix": "end"}, "suffix"),
        ({"prompt": "word " * 1001}, "prompt"),
    ],
)
async def test_what_cannot_be_honoured_is_named(
    session: aiohttp.ClientSession, body: dict[str, Any], param: str
) -> None:
    assert (await refused(session, **body))["param"] == param


async def test_one_prompt_that_is_too_long_refuses_the_whole_request(session: aiohttp.ClientSession) -> None:
    error = await refused(session, prompt=["short !slow 0.05", "word " * 1001])
    assert error["code"] == "context_length_exceeded"
    assert "Please reduce the length of the prompt." in error["message"]


async def test_an_engine_that_fails_one_prompt_breaks_the_stream_off(session: aiohttp.ClientSession) -> None:
    async with session.post(PATH, json={"prompt": ["!slow 0.02", "!error 4"], "stream": True}) as reply:
        assert reply.status == 200
        events = [event for _, event in await events_of(reply)]
    assert json.loads(events[-1])["error"]["code"] == "engine_error"


async def test_a_client_that_leaves_ends_all_its_prompts(session: aiohttp.ClientSession) -> None:
    body = {"prompt": ["!slow 0.05"] * 4, "max_tokens": 500, "stream": True}
    async with session.post(PATH, json=body) as reply:
        await reply.content.readany()
        assert (await load_of(session, ""))["running"] == 4
        reply.close()

    async def idle() -> bool:
        load = await load_of(session, "")
        return load["running"] + load["waiting"] == 0

    await until(idle, "the engine works for nobody", seconds=2)
    assert len((await complete(session, prompt="next", max_tokens=2))["choices"]) == 1


async def test_an_abort_says_what_all_prompts_have_cost(session: aiohttp.ClientSession) -> None:
    body = {"prompt": ["!slow 0.02 one", "!slow 0.02"], "max_tokens": 500, "stream": True}
    async with session.post(PATH, json=body, headers={"x-request-id": "req_many"}) as reply:
        await reply.content.readany()
        async with session.post("/abort", json={"request_id": "req_many"}) as told:
            cost = await told.json()
        assert cost["prompt_tokens"] == 5
        assert cost["completion_tokens"] >= 1
