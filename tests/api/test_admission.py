"""Limits and hard budgets as clients meet them, through the official client and the whole request path."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from registry.models import ApiKey, Budget, BudgetPeriod, Hold, UsageEvent
from tests.api.conftest import Served, eventually, say
from tests.factories import make_budget, make_limit

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.base_url, api_key=served.api_key, max_retries=0, timeout=20)


@pytest.fixture
def key(served: Served) -> ApiKey:
    return ApiKey.objects.get(name="tests")


def ask(client: openai.OpenAI, text: str, **fields: Any) -> Any:
    return client.chat.completions.with_raw_response.create(**say(text, **fields))


def period_of(budget: Budget, *, when_idle: bool = True) -> BudgetPeriod:
    if when_idle:
        eventually(lambda: not Hold.objects.exists(), "every hold is settled")
    return BudgetPeriod.objects.get(budget=budget)


def test_a_key_without_limits_hears_of_none(client: openai.OpenAI) -> None:
    assert not [name for name in ask(client, "!tokens 2").headers if name.startswith("x-ratelimit")]


def test_what_a_limit_refuses_is_told_whole_and_leaves_no_trace(client: openai.OpenAI, key: ApiKey) -> None:
    make_limit(2, "requests", "minute", api_key=key)
    for left in ("1", "0"):
        headers = ask(client, "!tokens 2").headers
        assert headers["x-ratelimit-limit-requests"] == "2"
        assert headers["x-ratelimit-remaining-requests"] == left
    with pytest.raises(openai.RateLimitError) as refused:
        ask(client, "!tokens 2")
    error = refused.value
    assert error.code == "rate_limit_exceeded"
    assert "Limit 2, Used 2, Requested 1" in error.message
    assert 1 <= int(error.response.headers["retry-after"]) <= 30
    assert error.response.headers["x-ratelimit-remaining-requests"] == "0"
    eventually(lambda: UsageEvent.objects.count() == 2, "the two answers are accounted")
    assert not UsageEvent.objects.filter(status=429).exists()


def test_a_limit_of_tokens_counts_what_was_written_not_what_was_feared(
    client: openai.OpenAI, key: ApiKey
) -> None:
    make_limit(1000, "output_tokens", "hour", api_key=key)
    first = ask(client, "!tokens 40", max_tokens=900).headers
    assert first["x-ratelimit-remaining-tokens"] == "100", "the most it may write is set aside at first"
    second = ask(client, "!tokens 40", max_tokens=900).headers
    assert int(second["x-ratelimit-remaining-tokens"]) in range(60, 62), "40 were used by the first"
    assert ask(client, "!tokens 1", max_tokens=1, stream=True).headers["x-ratelimit-limit-tokens"] == "1000"


def test_parallel_requests_are_limited_and_a_stream_that_is_left_gives_its_place_back(
    client: openai.OpenAI, key: ApiKey
) -> None:
    make_limit(1, "parallel", api_key=key)
    stream = client.chat.completions.create(**say("!tokens 100000", stream=True))
    next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="parallel"):
        ask(client, "!tokens 2")
    stream.close()

    def admitted() -> bool:
        try:
            return bool(ask(client, "!tokens 2"))
        except openai.RateLimitError:
            return False

    eventually(admitted, "the place is free")


def test_embeddings_and_models_of_other_names_are_not_concerned(client: openai.OpenAI, key: ApiKey) -> None:
    make_limit(1, "requests", "hour", api_key=key, route="another-*")
    for _ in range(3):
        assert "x-ratelimit-limit-requests" not in ask(client, "!tokens 1").headers


def test_a_hard_budget_is_spent_exactly_and_then_says_so(client: openai.OpenAI, key: ApiKey) -> None:
    budget = make_budget(
        limit=30_000, scope="key", subject=key.public_id, unit="tokens", period="total", hard=True
    )
    used = 0
    error = None
    for _ in range(60):
        try:
            used += ask(client, "!tokens 2000", max_tokens=4000).parse().usage.total_tokens
        except openai.RateLimitError as refused:
            error = refused
            if "x-should-retry" in refused.response.headers:
                break
            # Only what is set aside stands in the way: that passes.
            time.sleep(0.1)
    assert error is not None
    assert error.code == "insufficient_quota"
    assert "budget" in error.message
    assert error.response.headers["x-should-retry"] == "false"
    assert used > 20_000, "what was set aside is given back"
    period = period_of(budget)
    assert (period.spent, period.held) == (used, 0)
    refusal = eventually(UsageEvent.objects.filter(status=429).last, "the refusal is accounted")
    assert (refusal.prompt_tokens, refusal.completion_tokens, refusal.cost_micros) == (0, 0, 0)


def test_many_first_requests_at_once_do_not_get_past_a_hard_budget(served: Served, key: ApiKey) -> None:
    budget = make_budget(
        limit=12_000, scope="project", subject=str(key.project_id), unit="tokens", period="day", hard=True
    )
    clients = openai.OpenAI(base_url=served.base_url, api_key=served.api_key, max_retries=0, timeout=30)
    start = threading.Barrier(12)

    def one(_: int) -> int:
        start.wait(20)
        try:
            usage = ask(clients, "!tokens 900", max_tokens=900).parse().usage
        except openai.RateLimitError:
            return 0
        return int(usage.total_tokens)

    with ThreadPoolExecutor(12) as threads:
        used = list(threads.map(one, range(12)))
    period = period_of(budget)
    assert 0 < sum(used) == period.spent <= 12_000
    assert used.count(0) > 0, "not all of them could be let in"


def test_a_stream_that_is_left_costs_what_it_had_written(client: openai.OpenAI, key: ApiKey) -> None:
    budget = make_budget(
        limit=10**9, scope="key", subject=key.public_id, unit="tokens", period="month", hard=True
    )
    stream = client.chat.completions.create(**say("!tokens 100000", stream=True))
    next(iter(stream))
    assert period_of(budget, when_idle=False).held > 0
    stream.close()
    period = period_of(budget)
    event = UsageEvent.objects.get()
    assert event.outcome == "aborted"
    assert (period.spent, period.held) == (event.prompt_tokens + event.completion_tokens, 0)
