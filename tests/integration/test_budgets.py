"""Budgets: what may not be exceeded is not, whatever happens at the same time, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Barrier
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.db import IntegrityError, connection, transaction
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.actions.budgets import (
    HOLDS_KEPT,
    HOLDS_YOUNG,
    calendar_period,
    delete_budget,
    find_subject,
    hard_budgets,
    release_dead_holds,
    reserve,
    save_budget,
)
from registry.actions.gateways import note_gateway
from registry.actions.usage import record_usage
from registry.errors import BudgetExhausted, InvalidInput
from registry.models import Budget, BudgetPeriod, Change, Event, Hold, Project, UsageEvent
from registry.querysets import database_now
from registry.states import Outcome
from registry.threads import DatabaseBusy, in_database
from tests.factories import make_api_key, make_budget, make_price, make_project
from tests.usage import make_event

NOON = datetime(2026, 3, 10, 12, tzinfo=UTC)


def ask(budgets: Iterable[Budget], request_id: str, *, at: datetime = NOON, **facts: Any) -> None:
    """Reserve for a request of 100 tokens at most, 60 of them prompt."""
    defaults = {"route": "chat", "prompt_tokens": 60, "completion_tokens": 40, "gateway": "g"}
    ids = [budget.pk for budget in budgets]
    reserve(budget_ids=ids, request_id=request_id, started_at=at.timestamp(), **defaults | facts)


def answered(request_id: str, *, at: datetime = NOON, **facts: Any) -> UsageEvent:
    """The event of a request that used 50 prompt and 20 output tokens."""
    defaults = {"prompt_tokens": 50, "completion_tokens": 20}
    return make_event(request_id=request_id, started_at=at, **defaults | facts)


def figures(budget: Budget) -> tuple[int, int]:
    """Spent and held in its only period."""
    period = BudgetPeriod.objects.get(budget=budget)
    return period.spent, period.held


# -- one after the other


@pytest.mark.django_db
def test_a_request_holds_the_most_it_may_use_and_settles_what_it_used() -> None:
    budget = make_budget(limit=250)
    ask([budget], "a")
    ask([budget], "b")
    assert figures(budget) == (0, 200)
    with pytest.raises(BudgetExhausted) as refused:
        ask([budget], "c")
    assert refused.value.passing, "only running requests stand in its way"
    record_usage([answered("a")])
    assert figures(budget) == (70, 100)
    with pytest.raises(BudgetExhausted):
        ask([budget], "c")
    record_usage([answered("b")])
    assert figures(budget) == (140, 0)
    assert not Hold.objects.exists()
    ask([budget], "c", completion_tokens=50)
    assert figures(budget) == (140, 110), "exactly the limit is still within it"
    with pytest.raises(BudgetExhausted):
        ask([budget], "d", prompt_tokens=1, completion_tokens=0)


@pytest.mark.django_db
def test_all_budgets_are_reserved_or_none() -> None:
    wide, narrow = make_budget(limit=1000), make_budget(limit=99, period="total")
    with pytest.raises(BudgetExhausted):
        ask([wide, narrow], "a")
    assert not Hold.objects.exists()
    assert not BudgetPeriod.objects.exclude(held=0).exists()
    ask([wide], "b")
    assert figures(wide) == (0, 100)


@pytest.mark.django_db
def test_a_refusal_names_budget_limit_and_reset() -> None:
    project = make_project(name="Team Blue", time_zone="Europe/Vienna")
    subject, name = find_subject("project", "Team Blue")
    budget = make_budget(
        limit=2_500_000, scope="project", subject=subject, subject_name=name, unit="money", period="day"
    )
    assert subject == str(project.pk)
    make_price("chat", output_micros=1_000_000_000)
    record_usage([answered("a", project_id=project.pk, completion_tokens=2400, prompt_tokens=0)])
    with pytest.raises(BudgetExhausted) as refused:
        ask([budget], "b", completion_tokens=200)
    assert not refused.value.passing
    # Midnight in Vienna is 23:00 UTC in winter.
    assert refused.value.retry_after == timedelta(hours=11).total_seconds()
    assert str(refused.value) == (
        "You exceeded the daily budget of project `Team Blue`: of 2.50 USD, 2.40 USD are used and 0.00 USD "
        "set aside for running requests; this request may use up to 0.20 USD. "
        "It begins anew at 2026-03-10T23:00:00Z."
    )


@pytest.mark.django_db
def test_a_total_budget_that_is_used_up_does_not_say_when_to_come_again() -> None:
    budget = make_budget(limit=50, period="total")
    with pytest.raises(BudgetExhausted, match="does not begin anew") as refused:
        ask([budget], "a")
    assert refused.value.retry_after is None


@pytest.mark.django_db
def test_an_event_brought_twice_is_settled_once() -> None:
    budget, soft = make_budget(limit=1000), make_budget(limit=1000, hard=False)
    ask([budget], "a")
    for _ in range(3):
        record_usage([answered("a"), answered("a")])
    assert figures(budget) == figures(soft) == (70, 0)


@pytest.mark.django_db
def test_a_budgets_count_is_the_sum_of_its_events() -> None:
    api_key, _ = make_api_key()
    key, project = api_key.public_id, api_key.project_id
    budgets = [
        make_budget(limit=10**6, subject=key, hard=False),
        make_budget(limit=10**6, scope="project", subject=str(project), hard=False),
        make_budget(limit=10**6, scope="route", subject="chat", hard=False),
        make_budget(limit=10**9, scope="route", subject="chat", unit="money", hard=False),
        make_budget(limit=10**6, subject="another", hard=False),
    ]
    make_price("chat", input_micros=2_000_000, output_micros=3_000_000)
    record_usage(
        [
            answered("a", key_public_id=key, project_id=project),
            answered("b", key_public_id=key, project_id=project, route="other"),
            answered("c", key_public_id="else", project_id=project + 1),
            answered(
                "d",
                key_public_id=key,
                project_id=project,
                outcome=Outcome.FAILED,
                prompt_tokens=0,
                completion_tokens=0,
            ),
        ]
    )
    # a and b; a and b; a and c.
    assert [figures(budget)[0] for budget in budgets[:4]] == [140, 140, 140, 2 * (100 + 60)]
    assert not BudgetPeriod.objects.filter(budget=budgets[4]).exists()


@pytest.mark.django_db
def test_a_persons_budget_counts_their_keys_and_their_chats(django_user_model: Any) -> None:
    anna = django_user_model.objects.create_user("anna")
    api_key, _ = make_api_key()
    type(api_key).objects.filter(pk=api_key.pk).update(owner=anna)
    budget = make_budget(limit=10**6, scope="user", subject=find_subject("user", "anna")[0])
    assert hard_budgets(key_public_id="x", project_id=0, user_id=anna.pk) == (budget.pk,)
    record_usage(
        [
            answered("a", key_public_id=api_key.public_id),
            answered("b", key_public_id=f"user-{anna.pk}"),
            answered("c", key_public_id=f"user-{anna.pk + 1}"),
        ]
    )
    assert figures(budget) == (140, 0)


@pytest.mark.django_db
def test_a_route_budget_concerns_only_requests_of_its_route() -> None:
    budget = make_budget(limit=100, scope="route", subject="large")
    ids = hard_budgets(key_public_id="x", project_id=1, user_id=None)
    assert ids == (budget.pk,)
    for number in range(3):
        ask([budget], f"small-{number}", route="small")
    ask([budget], "large-1", route="large")
    with pytest.raises(BudgetExhausted):
        ask([budget], "large-2", route="large")
    assert figures(budget) == (0, 100)


@pytest.mark.django_db
def test_a_soft_budget_refuses_nothing() -> None:
    soft = make_budget(limit=10, hard=False)
    assert hard_budgets(key_public_id="abc", project_id=1, user_id=None) == ()
    ask([soft], "a")
    assert not Hold.objects.exists()
    record_usage([answered("a")])
    assert figures(soft) == (70, 0)


@pytest.mark.django_db
def test_a_request_counts_in_the_period_in_which_it_began() -> None:
    budget = make_budget(limit=250, period="day")
    late = datetime(2026, 3, 10, 23, 59, 59, tzinfo=UTC)
    ask([budget], "old", at=late)
    ask([budget], "new", at=late + timedelta(seconds=2))
    record_usage([answered("old", at=late)])
    old, new = BudgetPeriod.objects.filter(budget=budget).order_by("start")
    assert (old.spent, old.held, new.spent, new.held) == (70, 0, 0, 100)
    assert old.end == new.start == datetime(2026, 3, 11, tzinfo=UTC)


@pytest.mark.django_db
def test_another_time_zone_counts_from_the_next_period_on() -> None:
    project = make_project(name="moves")
    budget = make_budget(limit=100, scope="project", subject=str(project.pk), period="day")
    ask([budget], "a")
    Project.objects.filter(pk=project.pk).update(time_zone="America/New_York")
    with pytest.raises(BudgetExhausted):
        ask([budget], "b", at=NOON + timedelta(hours=11))
    # 00:30 UTC of the next day is still this day in New York: the new period is short, none is counted twice.
    ask([budget], "c", at=NOON + timedelta(hours=12, minutes=30))
    first, second = BudgetPeriod.objects.filter(budget=budget).order_by("start")
    assert first.end == second.start
    assert second.end == datetime(2026, 3, 11, 4, tzinfo=UTC)


@pytest.mark.django_db
def test_a_changed_limit_counts_at_once_and_what_was_admitted_stays() -> None:
    budget = make_budget(limit=100)
    ask([budget], "a")
    budget.limit = 50
    save_budget(budget=budget, by="test")
    with pytest.raises(BudgetExhausted):
        ask([budget], "b")
    record_usage([answered("a")])
    assert figures(budget) == (70, 0)
    budget.limit = 170
    save_budget(budget=budget, by="test")
    ask([budget], "b")
    assert figures(budget) == (70, 100)


@pytest.mark.django_db
def test_what_a_request_costs_is_decided_when_it_is_admitted() -> None:
    budget = make_budget(limit=1000, unit="money")
    first = make_price("chat", output_micros=10_000_000)
    ask([budget], "a")
    assert figures(budget) == (0, 400)
    # Entered while the request runs, and in force before it began.
    make_price("chat", output_micros=900_000_000, starts_at=NOON - timedelta(days=1))
    record_usage([answered("a"), answered("b", key_public_id="else")])
    assert figures(budget) == (200, 0)
    assert UsageEvent.objects.get(request_id="a").price_id == first.pk
    assert UsageEvent.objects.get(request_id="b").cost_micros == 18_000


@pytest.mark.django_db
def test_an_event_that_used_more_than_it_could_is_charged_and_flagged() -> None:
    budget = make_budget(limit=1000)
    ask([budget], "lies")
    ask([budget], "tells the truth")
    record_usage([answered("lies", completion_tokens=51), answered("tells the truth", completion_tokens=50)])
    flags = dict(UsageEvent.objects.values_list("request_id", "flagged"))
    assert flags == {"lies": "used more than it could", "tells the truth": ""}
    assert figures(budget) == (201, 0)


@pytest.mark.django_db
def test_events_before_a_budget_began_do_not_count() -> None:
    budget = make_budget(limit=1000, starts_at=NOON)
    record_usage([answered("a", at=NOON - timedelta(seconds=1)), answered("b")])
    assert figures(budget) == (70, 0)


@pytest.mark.django_db
def test_a_deleted_budget_takes_its_holds_along_and_the_event_is_recorded_all_the_same() -> None:
    budget = make_budget(limit=1000)
    ask([budget], "a")
    delete_budget(budget=budget, by="test")
    record_usage([answered("a")])
    assert UsageEvent.objects.count() == 1
    assert not BudgetPeriod.objects.exists()


# -- setting them


@pytest.mark.django_db
def test_gateways_are_told_of_a_changed_budget() -> None:
    Change.objects.all().delete()
    budget = make_budget(limit=5, subject="abc")
    wide = make_budget(limit=5, scope="project", subject="1")
    assert [(change.kind, change.key) for change in Change.objects.all()] == [
        ("api_key", "abc"),
        ("api_key", "*"),
    ]
    Change.objects.all().delete()
    budget.hard = False
    save_budget(budget=budget, by="test")
    delete_budget(budget=wide, by="test")
    assert [change.key for change in Change.objects.all()] == ["abc", "*"]


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("field", "facts"),
    [
        ("limit", {"limit": -1}),
        ("limit", {"limit": 10**15 + 1}),
        ("scope", {"scope": "planet"}),
        ("unit", {"unit": "apples"}),
        ("period", {"period": "week"}),
        ("webhook_url", {"webhook_url": "file:///etc/passwd"}),
        ("webhook_url", {"webhook_url": "no url"}),
    ],
)
def test_a_budget_that_cannot_be_is_refused_by_the_fields_name(field: str, facts: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as refused:
        make_budget(**{"limit": 1} | facts)
    assert refused.value.field == field


@pytest.mark.django_db
def test_whom_a_budget_counts_is_fixed() -> None:
    budget = make_budget(limit=5)
    budget.subject = "other"
    with pytest.raises(InvalidInput) as refused:
        save_budget(budget=budget, by="test")
    assert refused.value.field == "subject"


@pytest.mark.django_db
def test_the_same_budget_twice_is_refused() -> None:
    make_budget(limit=5)
    with pytest.raises(InvalidInput):
        make_budget(limit=6)
    make_budget(limit=4, hard=False)


@pytest.mark.django_db
def test_the_web_hook_is_not_in_the_timeline() -> None:
    budget = make_budget(limit=5, webhook_url="https://hooks.example/s3cr3t")
    budget.limit = 6
    save_budget(budget=budget, by="test")
    told = [f"{event.reason} {event.data}" for event in Event.objects.filter(kind="budget")]
    assert len(told) == 2
    assert not any("s3cr3t" in text for text in told)


@pytest.mark.django_db
@pytest.mark.parametrize("change", [{"spent": -1}, {"held": -1}, {"end": datetime(2000, 1, 1, tzinfo=UTC)}])
def test_the_database_refuses_negative_sums_and_periods_without_length(change: dict[str, Any]) -> None:
    budget = make_budget(limit=5)
    ask([budget], "a", prompt_tokens=1, completion_tokens=1)
    with pytest.raises(IntegrityError), transaction.atomic():
        BudgetPeriod.objects.filter(budget=budget).update(**change)


@pytest.mark.django_db
def test_a_hold_is_one_per_request_and_period() -> None:
    budget = make_budget(limit=1000)
    ask([budget], "a")
    with pytest.raises(IntegrityError), transaction.atomic():
        ask([budget], "a")
    assert figures(budget) == (0, 100)


# -- periods


ZONES = [
    "UTC",
    "Europe/Vienna",
    "America/New_York",
    "America/Havana",
    "Asia/Beirut",
    "Australia/Lord_Howe",
    "Pacific/Apia",
    "Africa/Cairo",
    "America/Sao_Paulo",
    "Asia/Kolkata",
]


@settings(max_examples=300, deadline=None)
@given(
    at=st.datetimes(min_value=datetime(1995, 1, 1), max_value=datetime(2037, 1, 1)),
    zone=st.sampled_from(ZONES),
    period=st.sampled_from(["day", "month"]),
)
def test_periods_follow_each_other_without_gap_or_overlap(at: datetime, zone: str, period: str) -> None:
    instant, place = at.replace(tzinfo=UTC), ZoneInfo(zone)
    start, end = calendar_period(period, place, instant)
    assert end is not None
    assert start <= instant < end
    assert calendar_period(period, place, end)[0] == end
    assert calendar_period(period, place, start - timedelta(microseconds=1))[1] == start
    assert calendar_period(period, place, start) == (start, end)


@pytest.mark.parametrize(
    ("day", "hours"),
    [(datetime(2026, 3, 29, 12), 23), (datetime(2026, 10, 25, 12), 25), (datetime(2026, 6, 1, 12), 24)],
)
def test_a_day_has_as_many_hours_as_it_has_where_it_is(day: datetime, hours: int) -> None:
    start, end = calendar_period("day", ZoneInfo("Europe/Vienna"), day.replace(tzinfo=UTC))
    assert end is not None
    assert end - start == timedelta(hours=hours)
    assert start.astimezone(ZoneInfo("Europe/Vienna")).strftime("%H:%M") == "00:00"


# -- holds that nobody settles


def age(request_id: str, by: timedelta) -> None:
    Hold.objects.filter(request_id=request_id).update(created_at=database_now() - by)


@pytest.mark.django_db
def test_a_living_gateways_hold_is_kept_however_old() -> None:
    budget = make_budget(limit=1000)
    note_gateway(name="alive", unbroken=False)
    ask([budget], "a", gateway="alive")
    age("a", 24 * HOLDS_KEPT)
    assert release_dead_holds() == 0
    assert figures(budget) == (0, 100)


@pytest.mark.django_db
def test_a_dead_gateways_hold_is_given_back_when_no_event_came_for_long() -> None:
    budget = make_budget(limit=1000)
    ask([budget], "a", gateway="dead")
    ask([budget], "b", gateway="dead")
    age("a", HOLDS_KEPT + timedelta(minutes=1))
    age("b", HOLDS_KEPT - timedelta(minutes=1))
    assert release_dead_holds() == 1
    assert figures(budget) == (0, 100)
    # Its disk came back after all: it counts, once.
    for _ in range(2):
        record_usage([answered("a")])
    assert figures(budget) == (70, 100)


@pytest.mark.django_db
def test_a_hold_that_was_made_after_its_event_is_given_back() -> None:
    budget = make_budget(limit=1000)
    note_gateway(name="alive", unbroken=False)
    record_usage([answered("a", outcome=Outcome.ABORTED, completion_tokens=0, prompt_tokens=0)])
    ask([budget], "a", gateway="alive")
    assert release_dead_holds() == 0, "too young to be looked at"
    age("a", HOLDS_YOUNG + timedelta(seconds=1))
    assert release_dead_holds() == 1
    assert figures(budget) == (0, 0)


# -- at once


def at_once(jobs: int, job: Any) -> list[Any]:
    """Run job(0) to job(jobs - 1) in as many threads, each with its own connection, started together."""
    together = Barrier(jobs)

    def run(number: int) -> Any:
        try:
            together.wait(30)
            return job(number)
        finally:
            connection.close()

    with ThreadPoolExecutor(jobs) as pool:
        return [done.result() for done in [pool.submit(run, number) for number in range(jobs)]]


@pytest.mark.django_db(transaction=True)
def test_the_same_batch_brought_by_several_at_once_is_settled_once() -> None:
    budget, soft = make_budget(limit=10_000), make_budget(limit=10_000, hard=False)
    for number in range(20):
        ask([budget], f"r{number}")
    batch = [f"r{number}" for number in range(20)]

    at_once(4, lambda _: record_usage([answered(request_id) for request_id in batch]))
    assert figures(budget) == figures(soft) == (20 * 70, 0)
    assert UsageEvent.objects.count() == 20


async def admitted(budgets: list[Budget], clients: int, per_client: int) -> int:
    """How many of all their requests got in, through the threads that a gateway has."""
    ids = [budget.pk for budget in budgets]

    async def client(number: int) -> int:
        got = 0
        for each in range(per_client):
            facts = {"request_id": f"r{number}-{each}", "route": "chat", "gateway": "g"}
            amounts = {"prompt_tokens": 1, "completion_tokens": 0, "started_at": NOON.timestamp()}
            while True:
                try:
                    await in_database(reserve, budget_ids=ids, **facts, **amounts)
                    got += 1
                except BudgetExhausted:
                    pass
                except DatabaseBusy:
                    # It was not asked; clients are told to come again.
                    continue
                break
        return got

    return sum(await asyncio.gather(*(client(number) for number in range(clients))))


@pytest.mark.django_db(transaction=True)
async def test_two_hundred_first_requests_at_once_never_exceed_a_budget() -> None:
    """P2 in small."""
    budgets = await in_database(lambda: [make_budget(limit=77), make_budget(limit=200, period="total")])
    assert await admitted(budgets, 200, 1) == 77
    assert await in_database(lambda: [figures(budget) for budget in budgets]) == [(0, 77), (0, 77)]


@pytest.mark.full
@pytest.mark.django_db(transaction=True)
async def test_two_hundred_clients_of_fifty_requests_get_exactly_what_there_is() -> None:
    """P2."""
    budget = await in_database(make_budget, limit=4999)
    assert await admitted([budget], 200, 50) == 4999
    assert await in_database(figures, budget) == (0, 4999)


@pytest.mark.django_db(transaction=True)
def test_threads_that_reserve_and_settle_at_once_end_exact_and_without_deadlock() -> None:
    budgets = [
        make_budget(limit=10_000),
        make_budget(limit=10_000, period="day"),
        make_budget(limit=10_000, scope="route", subject="chat", period="total"),
    ]

    def job(number: int) -> int:
        # Some name the budgets in another order; rows are locked in one order all the same.
        mine = budgets if number % 2 else budgets[::-1]
        got = 0
        for each in range(8):
            try:
                ask(mine, f"r{number}-{each}", prompt_tokens=300, completion_tokens=0)
            except BudgetExhausted:
                continue
            got += 1
            if each % 2:
                record_usage([answered(f"r{number}-{each}", prompt_tokens=100, completion_tokens=0)])
        return got

    got = sum(at_once(8, job))
    events, holds = UsageEvent.objects.count(), Hold.objects.count()
    assert holds == 3 * (got - events)
    for budget in budgets:
        spent, held = figures(budget)
        assert spent == 100 * events
        assert held == 300 * (got - events)
        assert spent + held <= 10_000
