"""A stream whose worker dies goes on with another: the client sees a pause."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from config.front import make_application
from openai_api import limits
from registry.actions.events import publish_change
from registry.models import Route, UsageEvent
from registry.threads import in_database
from tests.api.conftest import CAPABILITIES, ROUTE, Served, Worker, eventually, say, serving, worker_process
from tests.factories import make_api_key, make_deployment, make_worker

WORKERS = (511, 512)
TOKENS = 40


@pytest.fixture
def two(transactional_db: None) -> Iterator[tuple[Served, dict[str, Worker]]]:
    """A gateway and two workers by name, a token in 20 ms: who is to be killed in mid-answer is
    still at it then."""
    with contextlib.ExitStack() as stack:
        deployment = make_deployment(route=ROUTE)
        workers = {}
        for replica, worker_id in enumerate(WORKERS):
            running = stack.enter_context(worker_process(worker_id, tokens_per_second=50))
            row = make_worker(
                deployment=deployment,
                id=worker_id,
                replica=replica,
                url=running.url,
                capabilities=CAPABILITIES,
            )
            workers[row.name] = running
        publish_change("route", ROUTE)
        key = make_api_key(name="tests")[1]
        front = make_application()
        with serving(front) as port:
            yield Served(port, key, front), workers


def busy(workers: dict[str, Worker]) -> Worker:
    [found] = [one for one in workers.values() if one.process.poll() is None and one.load()["running"]]
    return found


async def read(
    stream: Any,
    *,
    kill_after: int = 0,
    workers: dict[str, Worker] | None = None,
    into: list[Any] | None = None,
) -> list[Any]:
    """All chunks; after so many with text, the worker that sends them is killed."""
    chunks = [] if into is None else into
    texts = 0
    async for chunk in stream:
        chunks.append(chunk)
        texts += bool(chunk.choices and (getattr(chunk.choices[0], "text", "") or text_of(chunk)))
        if workers is not None and texts == kill_after:
            os.kill(busy(workers).process.pid, signal.SIGKILL)
            workers = None
    assert workers is None or not kill_after, "the answer was over before"
    return chunks


def text_of(chunk: Any) -> str:
    return (chunk.choices[0].delta.content or "") if chunk.choices and chunk.choices[0].delta else ""


@pytest.mark.parametrize("ending", ["its end", "its length", "a stop string"])
async def test_the_text_is_that_of_an_unbroken_answer(two, ending: str):
    served, workers = two
    question = say(f"!tokens {TOKENS}") | {"stream": True, "stream_options": {"include_usage": True}}
    async with served.client() as client:
        if ending == "its length":
            question["max_tokens"] = TOKENS - 7
        elif ending == "a stop string":
            chunks = await read(await client.chat.completions.create(**question))
            words = "".join(map(text_of, chunks)).split()
            question["stop"] = " ".join(words[TOKENS - 12 : TOKENS - 9])
        whole = await read(await client.chat.completions.create(**question))
        most = sum(bool(text_of(chunk)) for chunk in whole)
        # Not later: the worker may be some tokens ahead of us.
        at = random.randint(1, most // 2)
        broken = await read(await client.chat.completions.create(**question), kill_after=at, workers=workers)
    assert "".join(map(text_of, broken)) == "".join(map(text_of, whole)), f"killed after {at}"
    assert sum(chunk.choices[0].delta.role is not None for chunk in broken if chunk.choices) == 1
    assert [chunk.choices[0].finish_reason for chunk in broken if chunk.choices][-1] == (
        [chunk.choices[0].finish_reason for chunk in whole if chunk.choices][-1]
    )
    assert len({chunk.id for chunk in broken}) == 1
    # A word of which a part was held back, for it might have begun the stop string, is generated twice.
    twice = 1 if ending == "a stop string" else 0
    usage, expected = broken[-1].usage, whole[-1].usage
    assert usage.prompt_tokens == expected.prompt_tokens
    assert 0 <= usage.completion_tokens - expected.completion_tokens <= twice
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens

    def events() -> list[UsageEvent]:
        return list(UsageEvent.objects.order_by("started_at"))

    asked = 3 if ending == "a stop string" else 2
    *_, event = await in_database(
        lambda: eventually(lambda: len(events()) == asked and events(), "all events")
    )
    told = (usage.prompt_tokens, usage.completion_tokens, "ok")
    assert (event.prompt_tokens, event.completion_tokens, event.outcome) == told
    assert event.attempts == 2


async def test_a_completion_goes_on_to_its_length(two):
    served, workers = two
    async with served.client() as client:
        stream = await client.completions.create(
            model=ROUTE,
            prompt="Once upon a time",
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, last = await read(stream, kill_after=5, workers=workers)
    assert sum(bool(chunk.choices[0].text) for chunk in chunks) == 12
    assert chunks[-1].choices[0].finish_reason == "length"
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (4, 12)


@pytest.mark.parametrize(
    "fields",
    [{"n": 2}, {"logprobs": True}],
    ids=["n", "logprobs"],
)
async def test_what_is_more_than_text_ends_with_an_error(two, fields: dict[str, Any]):
    served, workers = two
    async with served.client() as client:
        stream = await client.chat.completions.create(**say(f"!tokens {TOKENS}", **fields), stream=True)
        with pytest.raises(openai.APIError) as broken:
            await read(stream, kill_after=2, workers=workers)
    assert broken.value.code == "stream_interrupted"


async def test_a_route_may_have_its_streams_end(two):
    served, workers = two
    await in_database(lambda: Route.objects.filter(name=ROUTE).update(continues=False))
    await in_database(lambda: publish_change("route", ROUTE))
    eventually(lambda: not served.front.gateway.fleet.route(ROUTE).continues, "the gateway knows")
    async with served.client() as client:
        stream = await client.chat.completions.create(**say(f"!tokens {TOKENS}"), stream=True)
        with pytest.raises(openai.APIError) as broken:
            await read(stream, kill_after=5, workers=workers)
    assert broken.value.code == "stream_interrupted"


async def test_with_nobody_left_it_ends_with_an_error(two):
    served, workers = two
    async with served.client() as client:
        stream = await client.chat.completions.create(**say(f"!tokens {TOKENS}"), stream=True)
        other = next(one for one in workers.values() if one is not busy(workers))
        other.process.kill()
        other.process.wait(5)
        with pytest.raises(openai.APIError) as broken:
            await read(stream, kill_after=5, workers=workers)
    assert broken.value.code == "stream_interrupted"


async def test_it_goes_on_only_so_often(two, monkeypatch):
    """`!cut` ends a stream without a word, and its worker lives."""
    served, _ = two
    question = say("!tokens 20 !cut 6") | {"stream": True}
    async with served.client() as client:
        monkeypatch.setattr(limits, "CONTINUATIONS", 1)
        chunks: list[Any] = []
        with pytest.raises(openai.APIError) as broken:
            await read(await client.chat.completions.create(**question), into=chunks)
        assert broken.value.code == "stream_interrupted"
        assert sum(bool(text_of(chunk)) for chunk in chunks) == 12
