"""Prices: exact, from an instant on, never edited; and charging again by a changed one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from fractions import Fraction
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import IntegrityError, transaction
from django.db.models import Sum
from hypothesis import given
from hypothesis import strategies as st

from registry.actions.budgets import find_subject
from registry.actions.prices import rerate, set_price
from registry.actions.rollups import HOUR, roll_up
from registry.actions.usage import record_usage
from registry.costs import GPU_SECONDS_MOST, PriceBook, cost_micros, money_text, most_micros
from registry.errors import InvalidInput
from registry.models import BudgetPeriod, Event, Price, Route, UsageEvent
from registry.models.price import MOST_MICROS
from registry.states import Outcome
from tests.factories import make_budget, make_deployment, make_price
from tests.usage import make_event

NOON = datetime(2026, 3, 10, 12, tzinfo=UTC)
AMOUNTS = st.integers(0, MOST_MICROS)
PRICES = st.builds(
    Price,
    input_micros=AMOUNTS,
    cached_micros=st.none() | AMOUNTS,
    output_micros=AMOUNTS,
    request_micros=AMOUNTS,
    gpu_second_micros=AMOUNTS,
)
TOKENS = st.integers(0, 2**31 - 1)


def event(**facts: Any) -> UsageEvent:
    return make_event(**{"started_at": NOON, "prompt_tokens": 1000, "completion_tokens": 100} | facts)


# -- what a request costs


@given(price=PRICES, prompt=TOKENS, share=st.integers(0, 100), completion=TOKENS, milliseconds=TOKENS)
def test_a_cost_is_the_exact_sum_rounded_once(
    price: Price, prompt: int, share: int, completion: int, milliseconds: int
) -> None:
    cached = prompt * share // 100
    figures = {"prompt_tokens": prompt, "completion_tokens": completion}
    cost = cost_micros(price, cached_tokens=cached, milliseconds=milliseconds, **figures)
    cached_price = price.input_micros if price.cached_micros is None else price.cached_micros
    tokens = (prompt - cached) * price.input_micros + cached * cached_price
    exact = Fraction(tokens + completion * price.output_micros, 1_000_000) + price.request_micros
    exact += price.gpu_second_micros * min(Fraction(milliseconds, 1000), GPU_SECONDS_MOST)
    assert cost - Fraction(1, 2) <= exact < cost + Fraction(1, 2)
    assert 0 <= cost < 2**62
    assert cost <= most_micros(price, **figures)


@pytest.mark.parametrize(
    ("tokens", "cost"), [(0, 0), (499_999, 0), (500_000, 1), (1_499_999, 1), (1_500_000, 2)]
)
def test_half_a_millionth_is_rounded_up(tokens: int, cost: int) -> None:
    price = Price(input_micros=1)
    assert (
        cost_micros(price, prompt_tokens=tokens, cached_tokens=0, completion_tokens=0, milliseconds=0) == cost
    )


@pytest.mark.parametrize(
    ("micros", "text"),
    [
        (0, "0.00 EUR"),
        (1_500_000, "1.50 EUR"),
        (1, "0.000001 EUR"),
        (-20_000, "-0.02 EUR"),
        (1_234_567_890_000, "1,234,567.89 EUR"),
    ],
)
def test_money_is_written_exactly(micros: int, text: str) -> None:
    assert money_text(micros, "EUR") == text


@pytest.mark.django_db
def test_an_event_is_charged_by_the_price_of_its_route_when_it_began() -> None:
    make_price("chat", input_micros=1_000_000, starts_at=NOON - 2 * HOUR)
    later = make_price("chat", input_micros=3_000_000, starts_at=NOON)
    default = make_price("", input_micros=500_000)
    record_usage(
        [
            event(request_id="before", started_at=NOON - HOUR),
            event(request_id="exactly", started_at=NOON),
            event(request_id="long before", started_at=NOON - 3 * HOUR),
            event(request_id="other", route="other"),
            event(request_id="failed", outcome=Outcome.FAILED),
        ]
    )
    charged = dict(UsageEvent.objects.values_list("request_id", "cost_micros"))
    assert charged == {"before": 1000, "exactly": 3000, "long before": 500, "other": 500, "failed": 0}
    assert UsageEvent.objects.get(request_id="exactly").price_id == later.pk
    assert UsageEvent.objects.get(request_id="other").price_id == default.pk
    assert UsageEvent.objects.get(request_id="failed").price_id is None


@pytest.mark.django_db
def test_gpu_seconds_are_counted_from_the_end_of_the_queue() -> None:
    make_price("chat", gpu_second_micros=1000, request_micros=7)
    record_usage([event(request_id="a", queue_ms=500, duration_ms=3500), event(request_id="b", queue_ms=9)])
    assert UsageEvent.objects.get(request_id="a").cost_micros == 3007
    assert UsageEvent.objects.get(request_id="b").cost_micros == 7


@pytest.mark.django_db
def test_what_ended_before_a_token_was_counted_costs_nothing() -> None:
    make_price("chat", input_micros=1_000_000, request_micros=7)
    ends = [(outcome, prompt) for outcome in ("aborted", "interrupted", "failed", "ok") for prompt in (0, 1)]
    record_usage(
        [
            event(
                request_id=f"{outcome} {prompt}", outcome=outcome, prompt_tokens=prompt, completion_tokens=0
            )
            for outcome, prompt in ends
        ]
    )
    charged = dict(UsageEvent.objects.filter(cost_micros__gt=0).values_list("request_id", "cost_micros"))
    assert charged == {"aborted 1": 8, "interrupted 1": 8, "ok 0": 7, "ok 1": 8}


@pytest.mark.django_db
def test_of_two_prices_of_one_instant_the_later_entry_counts() -> None:
    make_price("chat", input_micros=1, starts_at=NOON)
    second = make_price("chat", input_micros=2, starts_at=NOON)
    assert PriceBook(["chat"]).in_force("chat", NOON) == second


@pytest.mark.django_db
def test_an_adapter_pays_its_own_price_else_its_bases_else_every_others() -> None:
    make_price("", request_micros=1)
    make_price("chat", request_micros=2)
    make_price("chat:law", request_micros=3, starts_at=NOON)
    record_usage(
        [
            event(request_id="own", route="chat:law", base="chat"),
            event(request_id="before", route="chat:law", base="chat", started_at=NOON - HOUR),
            event(request_id="bases", route="chat:sql", base="chat"),
            # A route that somebody named so is no adapter.
            event(request_id="named", route="chat:7b"),
        ]
    )
    charged = dict(UsageEvent.objects.values_list("request_id", "cost_micros"))
    assert charged == {"own": 3, "before": 2, "bases": 2, "named": 1}
    make_price("chat", request_micros=7, starts_at=NOON - HOUR)
    done = rerate(since=NOON - HOUR, until=NOON + HOUR, route="chat", dry_run=False)
    assert (done.events, done.corrected, done.difference_micros) == (3, 2, 10)
    assert UsageEvent.objects.get(request_id="bases#r1").base == "chat"


# -- setting them


@pytest.mark.django_db
def test_a_price_is_noted_in_the_timeline() -> None:
    Route.objects.create(name="chat")
    price = set_price(price=Price(route="chat", input_micros=5), by="anna")
    noted = Event.objects.get(kind="price", object_id=price.pk)
    assert (noted.what, noted.by, noted.data["input_micros"]) == ("set", "anna", 5)


@pytest.mark.django_db
def test_an_adapter_of_a_deployment_can_have_a_price_and_a_budget_of_its_own() -> None:
    make_deployment(route="chat", engine="vllm", arguments={"lora_adapters": {"law": "/x"}})
    assert set_price(price=Price(route="chat:law", input_micros=5), by="anna").pk
    assert find_subject("route", "chat:law") == ("chat:law", "chat:law")
    with pytest.raises(InvalidInput):
        set_price(price=Price(route="chat:none", input_micros=5), by="anna")


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("field", "facts"),
    [
        ("route", {"route": "nowhere"}),
        ("input_micros", {"input_micros": -1}),
        ("output_micros", {"output_micros": MOST_MICROS + 1}),
        ("cached_micros", {"cached_micros": -1}),
    ],
)
def test_a_price_that_cannot_be_is_refused_by_the_fields_name(field: str, facts: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as refused:
        set_price(price=Price(**facts), by="anna")
    assert refused.value.field == field


@pytest.mark.django_db
@pytest.mark.parametrize("component", ["input_micros", "cached_micros", "output_micros", "gpu_second_micros"])
@pytest.mark.parametrize("amount", [-1, MOST_MICROS + 1])
def test_the_database_refuses_a_price_out_of_bounds(component: str, amount: int) -> None:
    with pytest.raises(IntegrityError), transaction.atomic():
        Price.objects.create(**{component: amount})


# -- charging again


@pytest.mark.django_db
def test_charging_again_appends_the_difference_once() -> None:
    make_price("chat", input_micros=4_000_000)
    budget = make_budget(limit=10**9, unit="money")
    record_usage([event(request_id=f"r{number}") for number in range(3)])
    record_usage([event(request_id="else", route="other")])
    make_price("chat", input_micros=1_000_000, starts_at=NOON - HOUR)
    span = {"since": NOON - HOUR, "until": NOON + HOUR}

    trial = rerate(**span, route="chat")
    assert (trial.events, trial.corrected, trial.difference_micros) == (3, 3, -9000)
    assert UsageEvent.objects.count() == 4, "a dry run writes nothing"

    done = rerate(**span, route="chat", dry_run=False)
    assert (done.corrected, done.difference_micros) == (3, -9000)
    rows = UsageEvent.objects.filter(corrects="r1")
    assert [(row.request_id, row.cost_micros, row.prompt_tokens, row.started_at) for row in rows] == [
        ("r1#r1", -3000, 0, NOON)
    ]
    assert UsageEvent.objects.get(request_id="r1").cost_micros == 4000, "the event stays as it is"
    assert rerate(**span, dry_run=False).corrected == 0

    assert BudgetPeriod.objects.get(budget=budget).spent == 3000
    make_price("chat", input_micros=2_000_000, starts_at=NOON - HOUR)
    assert rerate(**span, dry_run=False).difference_micros == 3000
    assert UsageEvent.objects.filter(request_id="r1#r2", corrects="r1", cost_micros=1000).exists()
    assert BudgetPeriod.objects.get(budget=budget).spent == 6000
    assert UsageEvent.objects.aggregate(sum=Sum("cost_micros"))["sum"] == 6000


@pytest.mark.django_db
def test_charging_again_goes_through_many_events_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.actions.prices.RERATED_AT_ONCE", 4)
    # Several of one instant, which pieces must not skip nor take twice.
    record_usage([event(started_at=NOON + timedelta(seconds=number // 6)) for number in range(30)])
    make_price("chat", input_micros=1_000_000)
    done = rerate(since=NOON, until=NOON + HOUR, dry_run=False)
    assert (done.events, done.corrected, done.difference_micros) == (30, 30, 30_000)
    assert rerate(since=NOON, until=NOON + HOUR, dry_run=False).corrected == 0


@pytest.mark.django_db
def test_a_correction_changes_an_hours_cost_and_no_count_of_requests() -> None:
    from registry.exports import figures_of
    from registry.reports import UsageQuery

    record_usage([event(), event()])
    make_price("chat", input_micros=1_000_000)
    rerate(since=NOON, until=NOON + HOUR, dry_run=False)
    for _ in range(2):
        figures = figures_of(UsageQuery(start=NOON, end=NOON + HOUR).total())
        assert (figures["requests"], figures["cost_micros"]) == (2, 2000)
        roll_up()


# -- commands


def run(*words: str) -> str:
    out = StringIO()
    call_command(*words, stdout=out)
    return out.getvalue()


@pytest.mark.django_db
def test_the_price_command_sets_and_lists() -> None:
    Route.objects.create(name="chat")
    said = run("price", "set", "chat", "--input", "0.15", "--cached", "0.075", "--output", "0.60")
    assert "chat" in said
    price = Price.objects.get()
    assert (price.input_micros, price.cached_micros, price.output_micros) == (150_000, 75_000, 600_000)
    run("price", "set", "--every-other", "--request", "0.000001", "--gpu-second", "0.002")
    listed = run("price", "list")
    assert "0.15" in listed
    assert "every other" in listed


@pytest.mark.django_db
@pytest.mark.parametrize(
    "words",
    [
        ("chat", "--input", "-1"),
        ("chat", "--input", "0.0000001"),
        ("chat", "--input", "NaN"),
        ("chat", "--input", "1e9"),
        ("nowhere", "--input", "1"),
        ("chat",),
        ("--input", "1"),
        ("chat", "--input", "1", "--from", "yesterday"),
    ],
)
def test_the_price_command_refuses_what_is_no_price(words: tuple[str, ...]) -> None:
    Route.objects.create(name="chat")
    with pytest.raises(CommandError):
        run("price", "set", *words)
    assert not Price.objects.exists()


@pytest.mark.django_db
def test_the_rerate_command_tells_and_only_then_does() -> None:
    Route.objects.create(name="chat")
    record_usage([event()])
    run("price", "set", "chat", "--input", "2", "--from", "2026-03-01")
    words = ("usage", "rerate", "--route", "chat", "--from", "2026-03-10", "--to", "2026-03-10")
    assert "0.002 USD" in run(*words)
    assert not UsageEvent.objects.exclude(corrects="").exists()
    run(*words, "--apply")
    assert UsageEvent.objects.exclude(corrects="").get().cost_micros == 2000
    assert "0 of 1" in run(*words, "--apply")
