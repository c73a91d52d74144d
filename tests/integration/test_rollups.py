"""Rolling up: twice is once, late is not lost, and nothing depends on when it happens."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from threading import Event as Signal
from threading import Thread

import pytest
from django.db import connection, transaction

from registry.actions.rollups import HOUR, hour_of, reconcile_usage, roll_up
from registry.actions.usage import record_usage
from registry.exports import figures_of
from registry.models import UsageEvent, UsageHour, UsageRollup
from registry.querysets import database_now
from registry.reports import UsageQuery
from tests.usage import make_event, make_traffic, sums

MORNING = datetime(2026, 3, 2, 9, tzinfo=UTC)


def contents() -> list[tuple[object, ...]]:
    """Every rollup without its number."""
    columns = [field.name for field in UsageRollup._meta.fields if field.name != "id"]
    return sorted(UsageRollup.objects.values_list(*columns), key=repr)


def reported(start: datetime, end: datetime) -> dict[str, int]:
    return figures_of(UsageQuery(start=start, end=end).total())


@pytest.mark.django_db
def test_rolling_up_twice_gives_the_same_as_once() -> None:
    events = make_traffic(start=MORNING, end=MORNING + 5 * HOUR, events=300, keys=[("a", "A"), ("b", "B")])
    hours = len({hour_of(event.started_at) for event in events})
    assert roll_up() == hours
    once = contents()
    assert roll_up() == 0
    UsageHour.objects.update(stale=True)
    assert roll_up() == hours
    assert contents() == once
    assert sum(rollup.requests for rollup in UsageRollup.objects.all()) == 300
    assert reported(MORNING, MORNING + 5 * HOUR) == sums(events)


@pytest.mark.django_db
def test_an_event_that_comes_days_late_is_in_the_report_at_once_and_in_the_rollups_next() -> None:
    record_usage([make_event(started_at=MORNING, prompt_tokens=5)])
    roll_up()
    late = make_event(started_at=MORNING + timedelta(minutes=59, seconds=59), prompt_tokens=7)
    record_usage([late])
    assert reported(MORNING, MORNING + HOUR)["input_tokens"] == 12
    assert UsageRollup.objects.get().prompt_tokens == 5
    assert roll_up() == 1
    assert UsageRollup.objects.get().prompt_tokens == 12
    # The same batch brought twice changes nothing.
    record_usage([make_event(started_at=late.started_at, request_id=late.request_id, prompt_tokens=7)])
    roll_up()
    assert UsageRollup.objects.get().prompt_tokens == 12


@pytest.mark.django_db
def test_the_running_hour_is_left_to_its_events() -> None:
    now = database_now()
    record_usage([make_event(started_at=now, completion_tokens=3)])
    assert roll_up() == 0
    assert reported(now - HOUR, now + HOUR)["output_tokens"] == 3
    assert roll_up(until=hour_of(now) + HOUR) == 1
    assert reported(now - HOUR, now + HOUR)["output_tokens"] == 3


@pytest.mark.django_db
def test_only_hours_within_the_range_asked_for_are_rolled_up() -> None:
    record_usage([make_event(started_at=MORNING + number * HOUR) for number in range(4)])
    assert roll_up(since=MORNING + HOUR, until=MORNING + 3 * HOUR) == 2
    fresh = UsageHour.objects.filter(stale=False).values_list("start", flat=True)
    assert list(fresh) == [MORNING + HOUR, MORNING + 2 * HOUR]


@pytest.mark.django_db
def test_a_rollup_changed_by_hand_is_found_and_put_right() -> None:
    make_traffic(start=MORNING, end=MORNING + 3 * HOUR, events=60, keys=[("a", "A")])
    roll_up()
    assert reconcile_usage(since=MORNING) == []
    truth = contents()
    wrong = UsageRollup.objects.filter(hour=MORNING + HOUR).order_by("id")[0]
    UsageRollup.objects.filter(pk=wrong.pk).update(completion_tokens=10**9)
    found = reconcile_usage(since=MORNING)
    assert [difference.hour for difference in found] == [MORNING + HOUR]
    # Reports do not wait for the repair.
    assert reported(MORNING, MORNING + 3 * HOUR) == sums(UsageEvent.objects.all())
    assert roll_up() == 1
    assert contents() == truth


@pytest.mark.django_db(transaction=True)
def test_an_event_on_its_way_while_its_hour_is_rolled_up_is_not_forgotten() -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has one writer at a time: this cannot happen")
    record_usage([make_event(started_at=MORNING)])
    rolled = Signal()

    def roll() -> None:
        try:
            roll_up()
        finally:
            rolled.set()
            connection.close()

    with transaction.atomic():
        record_usage([make_event(started_at=MORNING)])
        other = Thread(target=roll)
        other.start()
        assert not rolled.wait(0.3), "the roll-up waits for the event that is not committed yet"
    other.join(10)
    roll_up()
    assert UsageRollup.objects.get().requests == 2


@pytest.mark.django_db(transaction=True)
def test_controls_tasks_roll_up_and_find_what_differs(caplog: pytest.LogCaptureFixture) -> None:
    from inference.tasks import audit_usage, roll_up_usage

    record_usage([make_event(started_at=database_now() - 2 * HOUR)])
    roll_up_usage()
    audit_usage()
    assert UsageRollup.objects.get().requests == 1
    UsageRollup.objects.update(requests=2)
    with caplog.at_level("ERROR", "roundhouse.control"):
        audit_usage()
    assert "differed from the ledger" in caplog.text
    roll_up_usage()
    assert UsageRollup.objects.get().requests == 1
