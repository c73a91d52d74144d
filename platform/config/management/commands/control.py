"""`manage.py control`: the Celery worker and beat that reconcile, reap and tidy up."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from typing import Any

from celery.beat import EmbeddedService, Scheduler
from celery.signals import worker_ready, worker_shutting_down
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

STOP_SECONDS = 3.0
"""A warm shutdown that takes longer is cut short: every task may be begun again."""


class Command(BaseCommand):
    help = "Run control: Celery worker and beat for the queue `control`."
    requires_system_checks: list[str] = []

    def handle(self, **options: Any) -> None:
        if settings.CELERY_BROKER_URL is None:
            raise CommandError("Control needs Redis: start everything with `manage.py up`, or set REDIS_URL.")
        # Celery advises against root because of pickle, which these settings refuse.
        warnings.filterwarnings("ignore", message="You're running the worker with superuser privileges")
        sys.exit(run())


def run() -> int:
    """Work and beat in this one process, so that a killed control leaves nothing behind."""
    from config.celery import app

    # Kept in memory: the intervals are seconds, so there is nothing worth remembering across a restart.
    beat = EmbeddedService(app, thread=True, scheduler_cls=Scheduler)
    worker = app.Worker(
        hostname=f"control.{os.getpid()}@%h",
        pool="threads",
        concurrency=2,
        queues=["control"],
        loglevel="WARNING",
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )

    def begin(**_: Any) -> None:
        if not beat.is_alive():
            # The schedule's first tick would come only after its first interval.
            app.send_task("inference.tick", expires=2)
            beat.start()

    def end(**_: Any) -> None:
        timer = threading.Timer(STOP_SECONDS, os._exit, args=(0,))
        timer.daemon = True
        timer.start()

    worker_ready.connect(begin, weak=False)
    worker_shutting_down.connect(end, weak=False)
    worker.start()
    return int(worker.exitcode or 0)
