"""The database itself keeps usage events as they are, and retention is the one way out."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from django.apps import apps
from django.core.management import call_command
from django.db import Error, IntegrityError, connection, transaction

from registry.actions import retention
from registry.actions.retention import forget_usage
from registry.actions.rollups import HOUR, reconcile_usage, roll_up
from registry.actions.usage import record_usage
from registry.exports import figures_of
from registry.ledger_guard import guard_after_migrate, lift_guard
from registry.models import LedgerDoor, UsageEvent, UsageRollup
from registry.reports import UsageQuery
from tests.usage import make_event, make_traffic, sums

MORNING = datetime(2026, 3, 2, 9, tzinfo=UTC)
COLUMNS = [field.attname for field in UsageEvent._meta.concrete_fields]


def other_value(column: str, event: UsageEvent) -> object:
    value = getattr(event, column)
    if isinstance(value, bool):
        return not value
    if isinstance(value, datetime):
        return value + timedelta(seconds=1)
    if isinstance(value, int):
        return value + 1
    return 7 if value is None else f"{value}x"


@pytest.mark.django_db
@pytest.mark.parametrize("column", COLUMNS)
def test_no_column_of_an_event_can_be_changed(column: str) -> None:
    record_usage([make_event(started_at=MORNING, prompt_tokens=9)])
    event = UsageEvent.objects.get()
    with pytest.raises(IntegrityError, match="append-only"), transaction.atomic():
        UsageEvent.objects.update(**{column: other_value(column, event)})
    assert UsageEvent.objects.values().get() == UsageEvent.objects.values().get(pk=event.pk)


@pytest.mark.django_db
def test_an_update_that_changes_nothing_passes() -> None:
    event = make_event(started_at=MORNING, prompt_tokens=9)
    record_usage([event])
    again = make_event(request_id=event.request_id, started_at=MORNING, prompt_tokens=1)
    # As gateways of before this guard bring a batch twice.
    UsageEvent.objects.bulk_create(
        [again], update_conflicts=True, unique_fields=["request_id"], update_fields=["request_id"]
    )
    assert UsageEvent.objects.get().prompt_tokens == 9


@pytest.mark.django_db
def test_no_event_can_be_deleted_by_hand() -> None:
    record_usage([make_event(started_at=MORNING)])
    with pytest.raises(IntegrityError, match="append-only"), transaction.atomic():
        UsageEvent.objects.all().delete()
    if connection.vendor == "postgresql":
        with pytest.raises(Error, match="append-only"), transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("TRUNCATE registry_usageevent")
    assert UsageEvent.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_the_guard_stands_again_after_a_flush() -> None:
    """As after each test with transactions of its own, and after a `migrate` that rebuilt the table."""
    lift_guard(connection)
    call_command("flush", interactive=False, verbosity=0)
    record_usage([make_event(started_at=MORNING)])
    with pytest.raises(IntegrityError, match="append-only"):
        UsageEvent.objects.all().delete()
    lift_guard(connection)
    UsageEvent.objects.update(prompt_tokens=5)
    guard_after_migrate(using="default", apps=apps)
    with pytest.raises(IntegrityError, match="append-only"):
        UsageEvent.objects.update(prompt_tokens=6)


# -- retention


def reported(start: datetime, end: datetime) -> dict[str, int]:
    return figures_of(UsageQuery(start=start, end=end).total())


@pytest.mark.django_db
def test_retention_deletes_events_and_no_report_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "BATCH", 7)
    end = MORNING + 6 * HOUR
    events = make_traffic(start=MORNING, end=end, events=150, keys=[("a", "A"), ("b", "B")])
    roll_up()
    cut = MORNING + 4 * HOUR + timedelta(minutes=30)
    kept = sum(event.started_at >= MORNING + 4 * HOUR for event in events)
    assert forget_usage(before=cut) == 150 - kept
    assert UsageEvent.objects.count() == kept
    assert reported(MORNING, end) == sums(events)
    assert not LedgerDoor.objects.exists()
    assert forget_usage(before=cut) == 0
    with pytest.raises(IntegrityError), transaction.atomic():
        UsageEvent.objects.all().delete()
    assert reconcile_usage(since=MORNING) == []
    # One that comes late for an hour whose events are gone is added to what they were.
    late = make_event(started_at=MORNING, prompt_tokens=5, completion_tokens=4)
    record_usage([late])
    assert forget_usage(before=cut) == 0, "it is not in the sums yet"
    roll_up()
    assert reported(MORNING, end) == sums([*events, late])
    assert forget_usage(before=cut) == 1
    assert reported(MORNING, end) == sums([*events, late])


@pytest.mark.django_db
def test_an_hour_that_is_not_added_up_keeps_its_events() -> None:
    record_usage([make_event(started_at=MORNING), make_event(started_at=MORNING + 2 * HOUR)])
    roll_up(until=MORNING + 3 * HOUR)
    record_usage([make_event(started_at=MORNING)])
    assert forget_usage(before=MORNING + 24 * HOUR) == 1
    assert sorted(UsageEvent.objects.values_list("started_at", flat=True)) == [MORNING, MORNING]
    roll_up()
    assert forget_usage(before=MORNING + 24 * HOUR) == 2
    assert sum(UsageRollup.objects.values_list("requests", flat=True)) == 3


@pytest.mark.django_db
def test_what_is_left_comes_with_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "BATCH", 2)
    monkeypatch.setattr(retention, "BATCHES_AT_ONCE", 3)
    record_usage([make_event(started_at=MORNING) for _ in range(10)])
    roll_up()
    assert [forget_usage(before=MORNING + HOUR) for _ in range(3)] == [6, 4, 0]


@pytest.mark.django_db(transaction=True)
def test_controls_task_keeps_everything_unless_it_is_told_for_how_long(settings) -> None:  # type: ignore[no-untyped-def]
    from inference.tasks import forget_usage_events

    record_usage([make_event(started_at=MORNING)])
    roll_up()
    settings.ROUNDHOUSE_USAGE_DAYS = None
    forget_usage_events()
    assert UsageEvent.objects.count() == 1
    settings.ROUNDHOUSE_USAGE_DAYS = 32
    forget_usage_events()
    assert UsageEvent.objects.count() == 0
