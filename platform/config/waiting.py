"""Waiting until a deployment serves, for the commands that change one."""

from __future__ import annotations

import time
from collections.abc import Callable

from django.core.management.base import CommandError, CommandParser

from inference.status import DeploymentState, read_statuses
from registry.models import Deployment, Worker

POLL_SECONDS = 0.5


def add_wait_argument(parser: CommandParser) -> None:
    parser.add_argument(
        "--wait",
        type=float,
        nargs="?",
        const=600.0,
        metavar="SECONDS",
        help="Return when every replica serves, or the wish failed (without a number: 600 s at most).",
    )


def wait_until_ready(
    deployment: Deployment, seconds: float | None, tell: Callable[[str], None], done: Callable[[str], None]
) -> None:
    """Tell of each change until it is ready, or stopped where 0 replicas are wished for.

    `seconds` None: do not wait. Raises CommandError with the cause when it fails, or when time is up.
    """
    if seconds is None:
        return
    started, last = time.monotonic(), ""
    while True:
        deployment.refresh_from_db()
        status = read_statuses([deployment])[deployment.pk]
        live = Worker.objects.live().filter(deployment=deployment)
        # With 0 replicas any live worker is one too many; else those of an earlier revision are.
        left = live.exclude(revision=deployment.revision) if deployment.replicas else live
        settled = status.state in (DeploymentState.READY, DeploymentState.STOPPED)
        if settled and not left.exists():
            done(f"{deployment.name} is {status.state.value}. {status.reason}")
            return
        said = f"{status.reason} {status.next_action}".strip()
        if status.state == DeploymentState.FAILED:
            raise CommandError(f"{deployment.name} failed. {said}")
        if said != last:
            tell(said)
            last = said
        if time.monotonic() - started > seconds:
            raise CommandError(f"{deployment.name} is not ready after {seconds:.0f} s. {said}")
        time.sleep(POLL_SECONDS)
