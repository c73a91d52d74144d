"""Limits as clients meet them, at two gateways on one Redis."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from anthropic import AsyncAnthropic
from anthropic import RateLimitError as AnthropicRateLimit
from django.conf import settings
from openai import AsyncOpenAI, RateLimitError

from config.front import make_application
from registry.actions.limits import remove_limit
from registry.models import ApiKey, Limit, UsageEvent
from registry.threads import in_database
from tests.api.conftest import ROUTE, Served, eventually, say, serving
from tests.factories import make_api_key, make_limit
from tests.services import OwnRedis, missing, own_redis

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(scope="module")
def redis_server() -> Iterator[OwnRedis]:
    with own_redis() as running:
        if running is None:
            missing("no redis-server is installed")
        yield running


@pytest.fixture
def both(facts: str, redis_server: OwnRedis) -> Iterator[tuple[Served, Served]]:
    """Two gateways; limits made before their first request are known to them."""
    with redis_server.client() as client:
        client.flushall()
    before = settings.ROUNDHOUSE_REDIS_URL
    settings.ROUNDHOUSE_REDIS_URL = redis_server.url
    try:
        fronts = make_application(), make_application()
    finally:
        settings.ROUNDHOUSE_REDIS_URL = before
    with serving(fronts[0]) as one, serving(fronts[1]) as other:
        yield Served(one, facts, fronts[0]), Served(other, facts, fronts[1])


@pytest.fixture
def gateway(both: tuple[Served, Served]) -> Served:
    return both[0]


def rate_headers(headers: Any) -> dict[str, str]:
    return {name: headers[name] for name in headers if name.startswith("x-ratelimit-")}


def test_a_client_is_told_what_is_left_and_then_exactly_when_to_come_again(gateway: Served) -> None:
    key = ApiKey.objects.get()
    make_limit(2, "requests", "minute", api_key=key)
    make_limit(10_000, "tokens", "minute", api_key=key)
    first, second, refused = (gateway.chat(say("hi", max_tokens=5)) for _ in range(3))
    assert (first.status, second.status, refused.status) == (200, 200, 429)
    left = rate_headers(first.headers)
    assert left.pop("x-ratelimit-reset-requests") == "30s"
    assert re.fullmatch(r"\d+ms|\d\.\d+s", left.pop("x-ratelimit-reset-tokens"))
    assert 9_000 < int(left.pop("x-ratelimit-remaining-tokens")) < 10_000
    assert left == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-limit-tokens": "10000",
    }
    assert second.headers["x-ratelimit-remaining-requests"] == "0"
    error = refused.error()
    assert (error["type"], error["code"], error["param"]) == ("requests", "rate_limit_exceeded", None)
    assert re.fullmatch(
        rf"Rate limit reached for `{ROUTE}` in key tests on requests per min \(RPM\): Limit 2, Used 2, "
        r"Requested 1\. Please try again in (29|30)(\.\d+)?s\.",
        error["message"],
    )
    assert refused.headers["x-should-retry"] == "true"
    assert refused.headers["retry-after"] == "30"
    assert 29_000 < int(refused.headers["retry-after-ms"]) <= 30_000
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    # What was refused is no usage, and took no tokens.
    left_then, left_now = (int(one.headers["x-ratelimit-remaining-tokens"]) for one in (second, refused))
    assert left_now >= left_then
    eventually(lambda: UsageEvent.objects.count() == 2, "the two are in the ledger")
    assert not UsageEvent.objects.exclude(status=200).exists()


def test_who_would_have_to_wait_long_is_told_not_to_try_again(gateway: Served) -> None:
    make_limit(1, "requests", "day")
    assert gateway.chat(say("hi")).status == 200
    refused = gateway.chat(say("hi"))
    assert refused.status == 429
    assert refused.headers["x-should-retry"] == "false"
    assert 86_000 < int(refused.headers["retry-after"]) <= 86_400
    assert "in everybody together on requests per day (RPD)" in refused.error()["message"]


async def test_openais_client_waits_and_succeeds(gateway: Served) -> None:
    await in_database(make_limit, 2, "requests", "second", burst=1)
    async with gateway.client(max_retries=2) as client:
        began = time.monotonic()
        for _ in range(3):
            answer = await _ask(client)
            assert answer.choices[0].message.content
        assert time.monotonic() - began >= 0.9
    async with gateway.client() as client:
        with pytest.raises(RateLimitError) as refused:
            await asyncio.gather(*(_ask(client) for _ in range(3)))
    assert refused.value.code == "rate_limit_exceeded"
    assert refused.value.type == "requests"


async def test_tokens_are_counted_as_the_engine_counted_them(both: tuple[Served, Served]) -> None:
    """Not as they were thought to be: over two gateways, whole and streamed."""
    await in_database(make_limit, 100_000, "output_tokens", "hour", each="key")
    async with both[0].client() as one, both[1].client() as other:
        whole = await _ask(one, max_tokens=9)
        used = whole.usage.completion_tokens
        stream = await other.chat.completions.create(
            model=ROUTE,
            messages=[{"role": "user", "content": "tell me of it"}],
            max_tokens=11,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            used += chunk.usage.completion_tokens if chunk.usage else 0
        await asyncio.sleep(0.3)
        raw = await one.chat.completions.with_raw_response.create(
            model=ROUTE, messages=[{"role": "user", "content": "hi"}], max_tokens=1
        )
    left = int(raw.headers["x-ratelimit-remaining-tokens"])
    # A few leak back meanwhile: 28 per second.
    assert 100_000 - used - 1 <= left <= 100_000 - used - 1 + 200
    assert used > 9


async def _until_let_through(client: AsyncOpenAI) -> None:
    deadline = time.monotonic() + 5
    while True:
        try:
            await _ask(client)
            return
        except RateLimitError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


async def test_parallel_requests_over_two_gateways(both: tuple[Served, Served]) -> None:
    key = await in_database(ApiKey.objects.select_related("project").get)
    await in_database(make_limit, 3, "parallel", project=key.project)
    async with both[0].client() as one, both[1].client() as other:
        asked = [_ask((one, other)[at % 2], "!tokens 20 !slow 0.05") for at in range(12)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, RateLimitError)]
        assert len(refused) == 9
        assert "in project default on parallel requests: Limit 3, Used 3, Requested 1" in str(refused[0])
        await _until_let_through(one)


async def test_an_aborted_stream_gives_its_slot_back(gateway: Served) -> None:
    await in_database(make_limit, 1, "parallel")
    async with gateway.client() as client:
        stream = await _ask(client, "!tokens 500 !slow 0.05", stream=True)
        await anext(aiter(stream))
        with pytest.raises(RateLimitError):
            await _ask(client)
        await stream.close()
        await _until_let_through(client)


async def test_an_open_stream_is_trued_up_while_it_runs(gateway: Served) -> None:
    """It said that it wanted little, and gets more: others feel it before it ends."""
    await in_database(make_limit, 100_000, "output_tokens", "hour")

    async def left(client: AsyncOpenAI) -> int:
        raw = await client.chat.completions.with_raw_response.create(
            model=ROUTE, messages=[{"role": "user", "content": "!tokens 1"}], max_tokens=1
        )
        return int(raw.headers["x-ratelimit-remaining-tokens"])

    async with gateway.client() as client:
        stream = await _ask(client, "!tokens 3000 !slow 0.002", stream=True)
        chunks = aiter(stream)
        await anext(chunks)
        # What it is thought to write, as it did not say.
        assert 99_000 < await left(client) < 99_600
        reading = asyncio.create_task(_read(chunks))
        deadline = time.monotonic() + 5
        while await left(client) > 99_000:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        assert not reading.done(), "it still runs"
        reading.cancel()
        await stream.close()


async def _read(chunks: Any) -> None:
    async for _ in chunks:
        pass


async def test_anthropics_client_hears_it_in_its_words(gateway: Served) -> None:
    await in_database(make_limit, 1, "requests", "hour")
    client = AsyncAnthropic(
        base_url=f"http://127.0.0.1:{gateway.port}", api_key=gateway.api_key, max_retries=0
    )
    async with client:

        async def ask() -> Any:
            return await client.messages.create(
                model=ROUTE, max_tokens=3, messages=[{"role": "user", "content": "hi"}]
            )

        await ask()
        with pytest.raises(AnthropicRateLimit) as refused:
            await ask()
    assert refused.value.body["error"]["type"] == "rate_limit_error"  # type: ignore[index]
    assert refused.value.response.headers["x-should-retry"] == "false"


async def test_a_limit_that_is_set_and_removed_holds_everywhere_within_a_second(
    both: tuple[Served, Served],
) -> None:
    async with both[0].client() as one, both[1].client() as other:
        await asyncio.gather(_ask(one), _ask(other))
        limit: Limit = await in_database(make_limit, 1, "requests", "day")
        await asyncio.sleep(1.0)
        four = [_ask(client) for client in (one, other, one, other)]
        answers = await asyncio.gather(*four, return_exceptions=True)
        assert sum(isinstance(answer, RateLimitError) for answer in answers) == 3
        await in_database(remove_limit, limit=limit, by="test")
        await asyncio.sleep(1.0)
        await asyncio.gather(*(_ask(client) for client in (one, other, one, other)))


def test_f34_a_closed_limit_refuses_while_redis_is_away_and_a_local_one_goes_on(
    gateway: Served, redis_server: OwnRedis
) -> None:
    other = make_api_key(name="other")[1]
    make_limit(100, api_key=ApiKey.objects.get(name="tests"), when_redis_is_away="closed")
    make_limit(100, api_key=ApiKey.objects.get(name="other"))
    assert gateway.chat(say("hi")).status == gateway.chat(say("hi"), key=other).status == 200
    redis_server.kill()
    try:
        refused = gateway.chat(say("hi"))
        assert (refused.status, refused.error()["code"]) == (503, "storage")
        assert "retry-after" in refused.headers
        assert gateway.chat(say("hi"), key=other).status == 200
    finally:
        redis_server.start()
    eventually(lambda: gateway.chat(say("hi")).status == 200, "Redis is asked again")


@pytest.mark.parametrize("tries", [60, pytest.param(1_000, marks=pytest.mark.full)])
def test_s44_forged_addresses_and_names_share_one_bucket(gateway: Served, tries: int) -> None:
    """A limit is the key's: nothing that a client writes about itself makes it another's."""
    make_limit(5, "requests", "hour", each="key")
    statuses = []
    for at in range(tries):
        forged = [
            f"X-Forwarded-For: 10.0.{at // 250}.{at % 250}",
            f"X-Real-IP: 10.1.{at // 250}.{at % 250}",
            f"Forwarded: for=10.2.{at // 250}.{at % 250}",
            f"X-User-Id: user-{at}",
            f"X-Request-Id: req_{at}",
            f"OpenAI-Project: p{at}",
            f"OpenAI-Organization: o{at}",
        ]
        statuses.append(gateway.chat(say("hi", user=f"u{at}", max_tokens=1), *forged).status)
    assert statuses == [200] * 5 + [429] * (tries - 5)


async def _ask(client: AsyncOpenAI, text: str = "hi", **fields: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return await client.chat.completions.create(model=ROUTE, messages=messages, **fields)
