"""Budgets, as clients meet them."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from registry.actions.budgets import amount_text
from registry.actions.notices import deliver_notices, note_thresholds
from registry.models import ApiKey, Budget, BudgetNotice, BudgetPeriod, Hold, UsageEvent
from registry.threads import in_database
from tests.api.conftest import ROUTE, Served, eventually, say
from tests.factories import make_budget, make_price

SAY = say("Tell me a story about a roundhouse.")


def budget_of(served: Served, **facts: Any) -> Budget:
    key = ApiKey.objects.get(public_id=served.api_key.split("-")[1])
    return make_budget(**{"subject": key.public_id, "subject_name": key.name} | facts)


def settled(count: int) -> bool:
    return UsageEvent.objects.count() == count and not Hold.objects.exists()


async def test_a_hard_budget_is_never_exceeded_and_a_refusal_is_openais_insufficient_quota(
    served: Served,
) -> None:
    budget = await in_database(budget_of, served, limit=4000)
    async with served.client() as client:

        async def ask() -> int | openai.RateLimitError:
            try:
                answer = await client.chat.completions.create(**SAY, max_tokens=20)
            except openai.RateLimitError as error:
                return error
            assert answer.usage is not None
            return answer.usage.total_tokens

        answers = await asyncio.gather(*(ask() for _ in range(40)))
        used = [answer for answer in answers if isinstance(answer, int)]
        refused = [answer for answer in answers if not isinstance(answer, int)]
        assert used
        assert refused
        await in_database(eventually, lambda: settled(40), "all are settled")
        period = await in_database(BudgetPeriod.objects.get)
        assert period.held == 0
        assert period.spent == sum(used) <= budget.limit
        # What is left is less than the next one may use, by now for good.
        with pytest.raises(openai.RateLimitError) as last:
            await client.chat.completions.create(**SAY, max_tokens=3990)
    assert last.value.code == last.value.type == "insufficient_quota"
    assert "monthly budget of key `tests`: of 4,000 tokens" in last.value.message
    assert "begins anew at" in last.value.message
    assert last.value.response.headers["x-should-retry"] == "false"
    assert int(last.value.response.headers["retry-after"]) > 0


async def test_a_stream_is_held_before_it_begins_and_never_cut_by_its_budget(served: Served) -> None:
    """F56: what was admitted is within the budget to its last token."""
    await in_database(budget_of, served, limit=1300)
    async with served.client() as client:
        stream = await client.chat.completions.create(**SAY, max_tokens=64, stream=True)
        pieces = [chunk.choices[0] async for chunk in stream if chunk.choices]
        assert pieces[-1].finish_reason is not None
        await in_database(eventually, lambda: settled(1), "it is settled")
        event = await in_database(UsageEvent.objects.get)
        period = await in_database(BudgetPeriod.objects.get)
        assert period.spent == event.prompt_tokens + event.completion_tokens


async def test_a_refused_request_costs_nothing_and_asks_no_worker(served: Served) -> None:
    await in_database(budget_of, served, limit=5)
    async with served.client() as client:
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(**SAY)
    await in_database(eventually, lambda: settled(1), "it is in the ledger")
    event = await in_database(UsageEvent.objects.get)
    assert (event.status, event.outcome, event.attempts, event.cost_micros) == (429, "failed", 0, 0)
    assert not await in_database(BudgetPeriod.objects.exclude(spent=0).exists)


async def test_a_soft_budget_answers_and_gives_notice(served: Served) -> None:
    def prepare() -> Budget:
        make_price(ROUTE, input_micros=1_000_000, output_micros=2_000_000)
        return budget_of(served, limit=10, unit="money", hard=False, webhook_url="https://hooks.example/x")

    budget = await in_database(prepare)
    async with served.client() as client:
        answer = await client.chat.completions.create(**SAY, max_tokens=20)
    assert answer.usage is not None
    await in_database(eventually, lambda: settled(1), "it is settled")
    cost = answer.usage.prompt_tokens + 2 * answer.usage.completion_tokens
    period = await in_database(BudgetPeriod.objects.get)
    assert period.spent == cost > 10
    assert amount_text(budget, cost) == f"0.0000{cost} USD"
    sent: list[Any] = []
    await in_database(note_thresholds)
    assert await in_database(deliver_notices, post=lambda url, payload: sent.append(payload["percent"])) == 1
    assert sent == [100]
    assert await in_database(BudgetNotice.objects.count) == 3
