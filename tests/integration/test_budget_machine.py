"""P1: budgets, prices and the ledger against a small reference that knows no database.

Hypothesis admits, settles, crashes, retries, loses spools, and changes prices, limits and the day in random
order; after each step every period's sums, every hold and every event's cost must be what the reference says.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import connection, transaction
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from registry.actions.budgets import HOLDS_KEPT, hard_budgets, release_dead_holds, reserve, save_budget
from registry.actions.prices import rerate
from registry.actions.usage import record_usage
from registry.errors import BudgetExhausted
from registry.models import Budget, BudgetPeriod, Hold, UsageEvent
from registry.querysets import database_now
from registry.states import Outcome
from tests.factories import LONG_AGO, make_budget, make_price
from tests.usage import make_event

START = datetime(2026, 3, 27, 22, tzinfo=UTC)
KEYS = ["abc", "def"]
PRICED = ["chat", "other"]
"""From the beginning."""
ADAPTERS = {"chat:law": "chat"}
"""A price, a budget of the base holds for it too, until it has a price of its own."""
ROUTES = [*PRICED, *ADAPTERS]
PER_REQUEST = 500
"""Micro-units that each answered request costs beside its tokens."""
BUDGETS: list[dict[str, Any]] = [
    {"scope": "key", "subject": "abc", "unit": "tokens", "period": "day"},
    {"scope": "key", "subject": "abc", "unit": "money", "period": "total"},
    {"scope": "project", "subject": "1", "unit": "tokens", "period": "month"},
    {"scope": "route", "subject": "chat", "unit": "money", "period": "day", "hard": False},
]
REQUESTS = st.tuples(
    st.sampled_from(KEYS),
    st.sampled_from(ROUTES),
    st.integers(0, 3000),
    st.integers(0, 3000),
    st.integers(0, 30),
)


@dataclass
class Request:
    """What the reference knows of a request."""

    id: str
    key: str
    route: str
    at: datetime
    prompt: int
    completion: int
    price: int | None = None
    """Micro-units per token when it was admitted with a hold."""
    held: dict[tuple[int, datetime], int] = field(default_factory=dict)
    """By budget and start of its period."""
    cost: int = 0
    """As charged so far, corrections included."""
    used: int = 0
    answered: bool = True


class Reference:
    """Sixty lines that say what must be true."""

    def __init__(self, budgets: list[Budget]) -> None:
        self.budgets = budgets
        self.prices: list[tuple[str, datetime, int]] = []
        self.open: dict[str, Request] = {}
        self.done: dict[str, Request] = {}

    def price(self, route: str, at: datetime) -> int:
        found = [
            (name == route, starts, number, price)
            for number, (name, starts, price) in enumerate(self.prices)
            if name in (route, ADAPTERS.get(route)) and starts <= at
        ]
        return max(found)[3] if found else 0

    def period(self, budget: Budget, at: datetime) -> datetime:
        if budget.period == "total":
            return datetime(1970, 1, 1, tzinfo=UTC)
        day = at.replace(hour=0, minute=0, second=0, microsecond=0)
        return day if budget.period == "day" else day.replace(day=1)

    def of(self, request: Request) -> list[Budget]:
        routes = (request.route, ADAPTERS.get(request.route))
        mine = {"key": (request.key,), "project": ("1",), "route": routes}
        return [budget for budget in self.budgets if budget.subject in mine[budget.scope]]

    def sums(self) -> dict[tuple[int, datetime], tuple[int, int]]:
        """Spent and held by budget and period, added up anew from all requests."""
        spent: dict[tuple[int, datetime], int] = {}
        held: dict[tuple[int, datetime], int] = {}
        for request in self.done.values():
            for budget in self.of(request):
                place = budget.pk, self.period(budget, request.at)
                amount = request.cost if budget.unit == "money" else request.used
                spent[place] = spent.get(place, 0) + amount
        for request in self.open.values():
            for place, amount in request.held.items():
                held[place] = held.get(place, 0) + amount
        return {place: (spent.get(place, 0), held.get(place, 0)) for place in {*spent, *held}}

    def admit(self, request: Request) -> bool:
        price = self.price(request.route, request.at)
        amounts = {"tokens": request.prompt + request.completion, "money": 0}
        amounts["money"] = price * amounts["tokens"] + PER_REQUEST
        sums = self.sums()
        for budget in self.of(request):
            if budget.hard:
                place = budget.pk, self.period(budget, request.at)
                if sum(sums.get(place, (0, 0))) + amounts[budget.unit] > budget.limit:
                    request.held = {}
                    return False
                request.held[place] = amounts[budget.unit]
        if request.held:
            request.price = price
        self.open[request.id] = request
        return True

    def settle(self, request: Request, used: int, answered: bool) -> None:
        price = self.price(request.route, request.at) if request.price is None else request.price
        request.used, request.answered = used, answered
        request.cost = price * used + PER_REQUEST if answered else 0
        del self.open[request.id]
        self.done[request.id] = request

    def rerate(self) -> None:
        for request in self.done.values():
            price = self.price(request.route, request.at)
            request.cost = price * request.used + PER_REQUEST if request.answered else 0


class Budgets(RuleBasedStateMachine):
    made: tuple[Budget, ...] = ()
    """The budgets as every example finds them."""

    def __init__(self) -> None:
        super().__init__()
        # Each example is a transaction that is taken back.
        self.example = transaction.atomic()
        self.example.__enter__()
        self.reference = Reference([copy(budget) for budget in self.made])
        self.now = START
        self.number = 0
        self.reference.prices.extend((route, LONG_AGO, 3) for route in PRICED)

    def teardown(self) -> None:
        transaction.set_rollback(True)
        self.example.__exit__(None, None, None)

    def set_price(self, route: str, price: int, at: datetime) -> None:
        make_per_token(route, price, starts_at=at)
        self.reference.prices.append((route, at, price))

    def record(self, request: Request, used: int, outcome: Outcome) -> None:
        prompt = min(used, request.prompt)
        record_usage(
            [
                make_event(
                    request_id=request.id,
                    started_at=request.at,
                    key_public_id=request.key,
                    route=request.route,
                    base=ADAPTERS.get(request.route, ""),
                    outcome=outcome,
                    prompt_tokens=prompt,
                    completion_tokens=used - prompt,
                )
            ]
        )

    @initialize(first=st.lists(REQUESTS, min_size=1, max_size=2))
    def begin(self, first: list[tuple[str, str, int, int, int]]) -> None:
        for facts in first:
            self.admit(*facts)

    @rule(more=st.lists(REQUESTS, min_size=1, max_size=2))
    def admit_some(self, more: list[tuple[str, str, int, int, int]]) -> None:
        for facts in more:
            self.admit(*facts)

    def admit(self, key: str, route: str, prompt: int, completion: int, late: int) -> None:
        self.number += 1
        at = self.now - timedelta(hours=late // 10)
        request = Request(f"r{self.number}", key, route, at, prompt, completion)
        expected = self.reference.admit(request)
        ids = hard_budgets(key_public_id=key, project_id=1, user_id=None)
        try:
            reserve(
                budget_ids=ids,
                request_id=request.id,
                route=route,
                base=ADAPTERS.get(route, ""),
                prompt_tokens=prompt,
                completion_tokens=completion,
                started_at=at.timestamp(),
                gateway="dead",
            )
        except BudgetExhausted:
            assert not expected
            # Its entry in the ledger is open: it ends as one that was not answered, or its client, or its
            # gateway, had gone before it heard. So it costs nothing: nothing was set aside for it.
            self.reference.open[request.id] = request
            self.record(request, 0, (Outcome.FAILED, Outcome.ABORTED, Outcome.INTERRUPTED)[late % 3])
            self.reference.settle(request, 0, answered=False)
        else:
            assert expected
            places = BudgetPeriod.objects.filter(holds__request_id=request.id).select_related("budget")
            assert all(place.spent + place.held <= place.budget.limit for place in places)

    @precondition(lambda self: self.reference.open)
    @rule(data=st.data(), share=st.integers(0, 100))
    def settle(self, data: st.DataObject, share: int) -> None:
        request = data.draw(st.sampled_from(list(self.reference.open.values())))
        used = (request.prompt + request.completion) * share // 100
        self.record(request, used, Outcome.ABORTED if share < 50 else Outcome.OK)
        self.reference.settle(request, used, answered=used > 0 or share >= 50)

    @precondition(lambda self: self.reference.open)
    @rule()
    def fail(self) -> None:
        request = next(iter(self.reference.open.values()))
        self.record(request, 0, Outcome.FAILED)
        self.reference.settle(request, 0, answered=False)

    @precondition(lambda self: self.reference.open)
    @rule()
    def lose_a_gateway_and_give_its_holds_back(self) -> None:
        """Its spool does not come back for an hour; should it come later, the requests count then."""
        Hold.objects.update(created_at=database_now() - HOLDS_KEPT - timedelta(minutes=1))
        held = [request for request in self.reference.open.values() if request.held]
        assert release_dead_holds() == sum(len(request.held) for request in held)
        for request in held:
            request.held, request.price = {}, None

    @precondition(lambda self: self.reference.done)
    @rule(data=st.data())
    def bring_again(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(list(self.reference.done.values())))
        self.record(request, request.used + 1, Outcome.OK)

    @precondition(lambda self: self.reference.done)
    @rule()
    def charge_again(self) -> None:
        before = sum(request.cost for request in self.reference.done.values())
        self.reference.rerate()
        done = rerate(since=LONG_AGO, until=self.now + timedelta(days=1), dry_run=False)
        assert done.difference_micros == sum(each.cost for each in self.reference.done.values()) - before

    @rule(data=st.data(), what=st.sampled_from(["price", "limit", "time"]))
    def change(self, data: st.DataObject, what: str) -> None:
        if what == "price":
            hours = data.draw(st.integers(-30, 5))
            route, price = data.draw(st.sampled_from(ROUTES)), data.draw(st.integers(0, 9))
            self.set_price(route, price, self.now + timedelta(hours=hours))
        elif what == "limit":
            budget = data.draw(st.sampled_from(self.reference.budgets))
            budget.limit = data.draw(st.integers(0, 20_000))
            budget.hard ^= data.draw(st.booleans())
            save_budget(budget=budget, by="test")
        else:
            self.now += timedelta(hours=data.draw(st.sampled_from([1, 3, 24, 24 * 5])))

    @invariant()
    def the_database_says_what_the_reference_says(self) -> None:
        periods = BudgetPeriod.objects.values_list("budget_id", "start", "spent", "held")
        said = {(budget, start): (spent, held) for budget, start, spent, held in periods}
        expected = self.reference.sums()
        nothing = (0, 0)
        for place in {*said, *expected}:
            assert said.get(place, nothing) == expected.get(place, nothing)
        holds = sum(len(request.held) for request in self.reference.open.values())
        assert Hold.objects.count() == holds
        charged: dict[str, int] = {}
        for request_id, corrects, cost in UsageEvent.objects.values_list(
            "request_id", "corrects", "cost_micros"
        ):
            charged[corrects or request_id] = charged.get(corrects or request_id, 0) + cost
        assert charged == {request.id: request.cost for request in self.reference.done.values()}


def make_per_token(route: str, price: int, **facts: Any) -> None:
    amounts = {"input_micros": price * 10**6, "output_micros": price * 10**6, "request_micros": PER_REQUEST}
    make_price(route, **amounts, **facts)


def run(examples: int, steps: int) -> None:
    Budgets.made = tuple(make_budget(**{"limit": 10_000, "hard": True} | facts) for facts in BUDGETS)
    for route in PRICED:
        make_per_token(route, 3)
    # One transaction around all: the database is asked in this thread only.
    assert connection.in_atomic_block
    run_state_machine_as_test(
        Budgets,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


@pytest.mark.django_db
def test_budgets_agree_with_the_reference() -> None:
    run(examples=300, steps=5)


@pytest.mark.full
@pytest.mark.django_db
@pytest.mark.parametrize("part", range(10))
def test_budgets_agree_with_the_reference_over_long_histories(part: int) -> None:
    """5,000 in all. Each part is a transaction of its own: what is taken back in one slows down its rest."""
    run(examples=500, steps=30)
