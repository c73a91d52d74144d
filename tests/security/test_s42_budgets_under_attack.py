"""S42: no amount, however large, negative or odd, is a credit; no figure leaves its 64 bits."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from django.db import Error, transaction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.actions.budgets import reserve
from registry.actions.usage import record_usage
from registry.errors import BudgetExhausted
from registry.models import Budget, BudgetPeriod, Hold, UsageEvent
from registry.models.budget import MOST_LIMIT
from registry.models.price import MOST_MICROS
from registry.spool import Closed, Opened, _event
from tests.factories import make_budget, make_price

NOON = datetime(2026, 3, 10, 12, tzinfo=UTC)
ODD = st.one_of(
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 2**64]),
)

pytestmark = pytest.mark.django_db


def opened(request_id: str) -> Opened:
    return Opened(
        request_id=request_id,
        started_at=NOON.timestamp(),
        project_id=1,
        project_name="default",
        key_public_id="abc",
        key_name="test",
        route="chat",
        endpoint="/v1/chat/completions",
        stream=False,
    )


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
@given(prompt=ODD, cached=ODD, completion=ODD, duration=ODD, unit=st.sampled_from(["tokens", "money"]))
def test_whatever_a_worker_reports_is_never_a_credit(
    db: None, prompt: int, cached: int, completion: int, duration: int, unit: str
) -> None:
    """A worker's figures come through the spool, as here."""
    with transaction.atomic():
        make_price("chat", input_micros=MOST_MICROS, output_micros=MOST_MICROS, gpu_second_micros=MOST_MICROS)
        budget = make_budget(limit=MOST_LIMIT, unit=unit, hard=False)
        closed = Closed(
            status=200,
            outcome="ok",
            prompt_tokens=prompt,
            cached_tokens=cached,
            completion_tokens=completion,
            duration_ms=duration,
        )
        before = 0
        for number in range(3):
            record_usage([_event(opened(f"r{number}"), closed, "g")])
            spent = sum(BudgetPeriod.objects.values_list("spent", flat=True))
            assert spent >= before >= 0
            before = spent
        event = UsageEvent.objects.first()
        assert event is not None
        expected = event.cost_micros if unit == "money" else event.prompt_tokens + event.completion_tokens
        assert before == 3 * expected < 2**62
        assert BudgetPeriod.objects.filter(budget=budget, held=0).count() == (expected > 0)
        transaction.set_rollback(True)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
@given(prompt=ODD, completion=ODD)
def test_whatever_is_asked_for_is_held_or_refused_and_never_given(
    db: None, prompt: int, completion: int
) -> None:
    with transaction.atomic():
        budget = make_budget(limit=1000)
        try:
            with transaction.atomic():
                reserve(
                    budget_ids=[budget.pk],
                    request_id="a",
                    route="chat",
                    prompt_tokens=prompt,
                    completion_tokens=completion,
                    started_at=NOON.timestamp(),
                    gateway="g",
                )
        except (BudgetExhausted, ValueError):
            assert not Hold.objects.exists()
        else:
            assert prompt >= 0
            assert completion >= 0
            assert prompt + completion <= 1000
        assert not BudgetPeriod.objects.filter(held__lt=0).exists()
        assert not BudgetPeriod.objects.filter(held__gt=1000).exists()
        transaction.set_rollback(True)


@pytest.mark.parametrize("limit", [-1, MOST_LIMIT + 1, 2**63 - 1])
def test_the_database_itself_refuses_a_limit_out_of_bounds(limit: int) -> None:
    with pytest.raises(Error), transaction.atomic():
        Budget.objects.create(scope="key", subject="abc", limit=limit)


def test_an_event_with_a_negative_cost_is_refused_unless_it_corrects_one() -> None:
    facts = {"started_at": NOON, "project_id": 1, "status": 200, "outcome": "ok", "cost_micros": -1}
    with pytest.raises(Error), transaction.atomic():
        UsageEvent.objects.create(request_id="a", **facts)
    UsageEvent.objects.create(request_id="b#r1", corrects="b", **facts)
