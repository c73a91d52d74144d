"""Plain SQL on the request path says what the ORM would say, and is asked as often as is needed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import DataError, IntegrityError, connection, transaction
from django.test.utils import CaptureQueriesContext

from openai_api.auth import load_key
from registry.actions.budgets import reserve
from registry.actions.usage import record_usage
from registry.costs import PriceBook
from registry.models import Price, UsageEvent
from registry.statements import FEW, change, insert, select
from registry.states import Outcome
from tests.factories import make_api_key, make_budget, make_price
from tests.usage import make_event

NOON = datetime(2026, 3, 10, 12, 0, 0, 250, tzinfo=UTC)
SIZES = [1, FEW, FEW + 1, 60]
COLUMNS = tuple(field.attname for field in UsageEvent._meta.concrete_fields if not field.primary_key)
ODD_TEXTS = ["", "NULL", 'a "b", {c}', "it's \\ %s", "zwölf 模型", "\t\n", "{}", "--", "a,b"]

pytestmark = pytest.mark.django_db


def odd_events(size: int) -> list[UsageEvent]:
    """Each with another text, another instant, and members of enumerations beside plain values."""
    return [
        make_event(
            request_id=f"r{number}",
            started_at=NOON + timedelta(microseconds=number * 333_333),
            key_name=ODD_TEXTS[number % len(ODD_TEXTS)],
            outcome=[Outcome.OK, "ok", Outcome.ABORTED][number % 3],
            stream=bool(number % 2),
            ttft_ms=None if number % 2 else number,
            prompt_tokens=number * 10_000_000,
            cost_micros=number * 10**16,
        )
        for number in range(size)
    ]


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_written_as_the_orm_writes_them(size: int) -> None:
    UsageEvent.objects.bulk_create(odd_events(size))
    expected = list(UsageEvent.objects.order_by("request_id").values(*COLUMNS))
    events = odd_events(size)
    for event in events:
        event.request_id = f"plain-{event.request_id}"
    insert(UsageEvent, COLUMNS, [[getattr(event, column) for column in COLUMNS] for event in events])
    found = UsageEvent.objects.filter(request_id__startswith="plain-").order_by("request_id")
    plain = [
        {**row, "request_id": row["request_id"].removeprefix("plain-")} for row in found.values(*COLUMNS)
    ]
    assert plain == expected
    # Instants also as text: that is how SQLite compares them.
    question = """
        SELECT CAST(started_at AS TEXT) FROM registry_usageevent
        WHERE request_id LIKE %s ORDER BY request_id
    """
    assert select(question, "plain-%") == select(question, "r%")


@pytest.mark.parametrize("size", SIZES)
def test_what_the_table_refuses_is_refused_and_nothing_is_cut(size: int) -> None:
    events = odd_events(size)
    events[-1].cached_tokens = events[-1].prompt_tokens + 1
    with pytest.raises(IntegrityError), transaction.atomic():
        record_usage(events)
    assert not UsageEvent.objects.exists()
    events = odd_events(size)
    events[-1].route = "x" * 121
    try:
        with transaction.atomic():
            record_usage(events)
    except DataError:
        assert connection.vendor == "postgresql"
        assert not UsageEvent.objects.exists()
    else:
        assert UsageEvent.objects.get(request_id=events[-1].request_id).route == "x" * 121


def test_a_tuple_stands_for_a_list_and_instants_for_themselves() -> None:
    record_usage([make_event(request_id=f"r{number}", started_at=NOON) for number in range(3)])
    found = "SELECT request_id FROM registry_usageevent WHERE request_id IN %s AND started_at = %s"
    assert sorted(select(found, ("r0", "r2", "no"), NOON)) == [("r0",), ("r2",)]
    assert select(found, ("r0",), NOON + timedelta(microseconds=1)) == []
    assert change("UPDATE registry_usagehour SET stale = %s WHERE stale", False) == 1


def test_a_price_book_holds_prices_as_the_orm_reads_them() -> None:
    make_price("chat", input_micros=1, cached_micros=0, starts_at=NOON)
    make_price("chat", input_micros=2, request_micros=5, starts_at=NOON - timedelta(days=1))
    make_price("", output_micros=3, gpu_second_micros=4)
    book = PriceBook(["chat", "else"])
    for route, at in (("chat", NOON), ("chat", NOON - timedelta(microseconds=1)), ("else", NOON)):
        price = book.in_force(route, at)
        assert price is not None
        read = Price.objects.get(pk=price.pk)
        assert (price.route, price.starts_at) == (read.route, read.starts_at)
        for name in ("input", "cached", "output", "request", "gpu_second"):
            assert getattr(price, f"{name}_micros") == getattr(read, f"{name}_micros")


def asked(work: Any, *args: Any, **facts: Any) -> int:
    """How many statements it takes, without those of its transaction."""
    with CaptureQueriesContext(
        connection,
    ) as captured:
        work(*args, **facts)
    return sum("SAVEPOINT" not in query["sql"] for query in captured.captured_queries)


def test_an_event_more_is_no_statement_more() -> None:
    """Bars of DESIGN §10: what the ledger asks of the database does not grow with its batch."""
    make_budget(limit=10**6, hard=False)
    record_usage([make_event(started_at=NOON, prompt_tokens=1)])
    numbers = {
        size: asked(record_usage, [make_event(started_at=NOON, prompt_tokens=1) for _ in range(size)])
        for size in SIZES
    }
    assert set(numbers.values()) == {numbers[1]}, numbers
    # Hour, known ids, holds, prices, rows; any budget, owners, which, their periods, their sums.
    assert numbers[1] == 10


@pytest.mark.parametrize("budgets", [1, 3])
def test_a_reservation_asks_twice_and_writes_once_per_budget(budgets: int) -> None:
    periods = ["day", "month", "total"][:budgets]
    ids = [make_budget(limit=10**6, period=period).pk for period in periods]
    facts = {"route": "chat", "prompt_tokens": 1, "completion_tokens": 1, "gateway": "g"}
    reserve(budget_ids=ids, request_id="first", started_at=NOON.timestamp(), **facts)
    number = asked(reserve, budget_ids=ids, request_id="r", started_at=NOON.timestamp(), **facts)
    assert number == 2 + budgets + 1


def test_a_key_knows_which_budgets_concern_a_route() -> None:
    """A hard budget of one route is no question to the database for requests of others."""
    api_key, _ = make_api_key()
    own = make_budget(limit=10, subject=api_key.public_id)
    large = make_budget(limit=10, scope="route", subject="large")
    make_budget(limit=10, scope="route", subject="small", hard=False)
    key = load_key(api_key.public_id)
    assert key is not None
    assert key.budgets_for("small") == (own.pk,)
    assert key.budgets_for("large") == (own.pk, large.pk)
    other, _ = make_api_key(name="other")
    key = load_key(other.public_id)
    assert key is not None
    assert key.budgets_for("small") == ()
    assert key.budgets_for("large") == (large.pk,)
