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
from registry.histograms import bucket_of
from registry.models import (
    Grain,
    Price,
    UsageAudit,
    UsageDay,
    UsageEvent,
    UsageHour,
    UsageRollup,
    UsageSummary,
)
from registry.querysets import database_now
from registry.reports import UsageQuery, Width
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
def test_histograms_in_sql_are_those_of_the_reference() -> None:
    times = [0, 1, 2, 3, 5, 6, 7, 35, 36, 1000, 86_400_000, 2**31 - 1]
    events = [make_event(started_at=MORNING, queue_ms=value, duration_ms=value) for value in times]
    # 40 tokens after the first in 2 seconds are 20 a second; one token, or no time, has no speed.
    events += [
        make_event(started_at=MORNING, completion_tokens=tokens, ttft_ms=ttft, duration_ms=duration)
        for tokens, ttft, duration in [(41, 500, 2500), (1, 500, 2500), (9, 500, 500), (2**31 - 1, 0, 1)]
    ]
    record_usage(events)
    roll_up()
    histograms = UsageRollup.objects.get().histograms
    expected: dict[str, int] = {}
    for value in times:
        bucket = str(bucket_of(value))
        expected[bucket] = expected.get(bucket, 0) + 1
    assert histograms["queue"] == expected
    speeds = [20_000, (2**31 - 2) * 1_000_000]
    assert histograms["speed"] == {str(bucket_of(value)): 1 for value in speeds}
    assert sum(histograms["e2e"].values()) == len(times) + 4
    assert sum(histograms["ttft"].values()) == 4


@pytest.mark.django_db
def test_days_and_sums_without_keys_add_up_to_the_hours() -> None:
    Price.objects.create(starts_at=MORNING - timedelta(days=1), input_micros=5_000_000)
    start = MORNING.replace(hour=0)
    events = make_traffic(
        start=start, end=start + 30 * HOUR, events=200, keys=[("a", "A"), ("b", "B"), ("c", "C")]
    )
    roll_up()
    assert UsageDay.objects.filter(stale=False).count() == 2
    of_day = [event for event in events if event.started_at < start + 24 * HOUR]
    for grain in (Grain.DAY, Grain.PROJECT_DAY):
        rows = UsageSummary.objects.filter(grain=grain, start=start)
        assert sum(row.requests for row in rows) == len(of_day)
        assert sum(row.cost_micros for row in rows) == sum(event.cost_micros for event in of_day) > 0
        counted = sum(sum(row.histograms.get("e2e", {}).values()) for row in rows)
        assert counted == len(of_day)
        assert {row.key_public_id for row in rows} == (
            {""} if grain is Grain.PROJECT_DAY else {"a", "b", "c"}
        )


@pytest.mark.django_db
def test_a_late_event_of_a_day_that_was_added_up_is_told_at_once_and_by_the_day_later() -> None:
    start = MORNING.replace(hour=0)
    record_usage(
        [make_event(started_at=start + number * HOUR, prompt_tokens=1) for number in range(0, 24, 3)]
    )
    roll_up()
    record_usage([make_event(started_at=MORNING, prompt_tokens=100)])
    query = UsageQuery(start=start, end=start + 24 * HOUR, width=Width.DAY)
    assert [row.figures.input_tokens for row in query.rows()] == [108]
    roll_up()
    assert UsageSummary.objects.get(grain=Grain.PROJECT_DAY).prompt_tokens == 108
    assert [row.figures.input_tokens for row in query.rows()] == [108]


@pytest.mark.django_db
def test_sums_outlive_events_that_retention_deleted_and_take_in_what_comes_late() -> None:
    from registry.actions.retention import forget_usage

    record_usage([make_event(started_at=MORNING, prompt_tokens=number, ttft_ms=9) for number in (1, 2, 3)])
    # Not rolled up: their sums are nowhere else yet.
    assert forget_usage(before=MORNING + 5 * HOUR) == 0
    roll_up()
    assert forget_usage(before=MORNING + 5 * HOUR) == 3
    assert not UsageEvent.objects.exists()
    assert reported(MORNING, MORNING + HOUR)["input_tokens"] == 6
    assert reconcile_usage(since=MORNING) == []
    # What is cut by a boundary counts where the hour begins: there is nothing finer any more.
    assert reported(MORNING, MORNING + HOUR / 2)["input_tokens"] == 6
    assert reported(MORNING + HOUR / 2, MORNING + HOUR)["input_tokens"] == 0
    late = make_event(started_at=MORNING, prompt_tokens=100, ttft_ms=9)
    record_usage([late])
    for _ in range(2):
        roll_up()
        assert reported(MORNING, MORNING + HOUR)["input_tokens"] == 106
        assert UsageRollup.objects.get().histograms["ttft"] == {str(bucket_of(9)): 4}
        UsageHour.objects.update(stale=True)
    assert forget_usage(before=MORNING + 5 * HOUR) == 1
    assert reported(MORNING, MORNING + HOUR)["input_tokens"] == 106


@pytest.mark.django_db
def test_every_check_is_kept_with_what_differed() -> None:
    start = MORNING.replace(hour=0)
    record_usage([make_event(started_at=start + number * HOUR) for number in (0, 9, 23)])
    roll_up()
    assert reconcile_usage(since=start) == []
    audit = UsageAudit.objects.get()
    assert (audit.hours, audit.differences) == (3, [])
    for grain in Grain:
        UsageSummary.objects.filter(grain=grain).update(requests=7)
        (found, *others) = reconcile_usage(since=start)
        assert found.events["requests"] != found.rollups["requests"]
        newest = UsageAudit.objects.all()[0]
        assert len(newest.differences) == 1 + len(others)
        roll_up()
        assert reconcile_usage(since=start) == []


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
