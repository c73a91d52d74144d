"""Control's tasks: thin, idempotent, derived from the database each time. Scheduled in the settings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from pathlib import Path
from threading import Lock

from celery import shared_task
from django.conf import settings
from django.db import close_old_connections, connection

from inference.liveness import reap
from inference.nudges import send_nudges
from inference.reconcile import reconcile
from registry.actions.budgets import release_dead_holds
from registry.actions.events import forget_old_changes
from registry.actions.gateways import forget_silent_gateways
from registry.actions.notices import deliver_notices, note_thresholds
from registry.actions.projects import note_people_changed
from registry.actions.retention import forget_usage
from registry.actions.rollups import reconcile_usage, roll_up
from registry.querysets import database_now

log = logging.getLogger("roundhouse.control")

AUDITED = timedelta(days=3)


def one_at_a_time(body: Callable[[], None]) -> Callable[[], None]:
    """Run on a fresh connection, skip while the same task still runs in this process, survive errors.

    Two controls at once need no lock between them: constraints and compare-and-set let one win.
    """
    running = Lock()
    failing: type[Exception] | None = None

    @wraps(body)
    def task() -> None:
        nonlocal failing
        if not running.acquire(blocking=False):
            return
        try:
            close_old_connections()
            body()
            failing = None
        except Exception as error:
            # Every second the same, while the database is away: told once.
            if type(error) is not failing:
                log.exception(
                    "%s failed; it comes again", body.__name__, extra={"event": f"{body.__name__}_failed"}
                )
            failing = type(error)
            # Whatever broke in mid-transaction must not be met again.
            connection.close()
        finally:
            running.release()

    return task


@shared_task(name="inference.tick")  # type: ignore[untyped-decorator]
@one_at_a_time
def tick() -> None:
    """Judge silence, then bring the facts nearer to the wishes."""
    reap(database_now())
    reconcile(send_nudges)


_disabled: frozenset[int] = frozenset()
"""People, as `watch_people` last saw them. A control that starts tells of all of them, which does no harm."""


@shared_task(name="inference.watch_people")  # type: ignore[untyped-decorator]
@one_at_a_time
def watch_people() -> None:
    """Have the gateways end what people began who were disabled since, however that was done."""
    global _disabled
    _disabled = note_people_changed(_disabled)


@shared_task(name="inference.recover_spools")  # type: ignore[untyped-decorator]
@one_at_a_time
def recover_spools() -> None:
    """Bring into the ledger what dead gateways of this machine left on disk."""
    from registry.spool import recover_all

    recover_all(Path(settings.ROUNDHOUSE_DATA) / "spool")


@shared_task(name="inference.housekeeping")  # type: ignore[untyped-decorator]
@one_at_a_time
def housekeeping() -> None:
    """Forget what nobody asks for any more."""
    forget_old_changes()
    release_dead_holds()
    forget_silent_gateways()


@shared_task(name="inference.roll_up_usage")  # type: ignore[untyped-decorator]
@one_at_a_time
def roll_up_usage() -> None:
    """Add up the hours that have ended, and again those to which a late event came."""
    roll_up()


@shared_task(name="inference.budget_notices")  # type: ignore[untyped-decorator]
@one_at_a_time
def budget_notices() -> None:
    """Tell of budgets that have reached a threshold."""
    note_thresholds()
    deliver_notices()


@shared_task(name="inference.forget_usage")  # type: ignore[untyped-decorator]
@one_at_a_time
def forget_usage_events() -> None:
    """Delete single usage events that are older than they are kept, if there is a limit."""
    if settings.ROUNDHOUSE_USAGE_DAYS is not None:
        forget_usage(before=database_now() - timedelta(days=settings.ROUNDHOUSE_USAGE_DAYS))


@shared_task(name="inference.audit_usage")  # type: ignore[untyped-decorator]
@one_at_a_time
def audit_usage() -> None:
    """Hold the rollups of the last days against the ledger. They never differ, unless someone changed the
    tables by hand."""
    for difference in reconcile_usage(since=database_now() - AUDITED):
        log.error(
            "the rollups of %s differed from the ledger; they are added up again",
            difference.hour.isoformat(),
            extra={"event": "rollups_differed"},
        )
