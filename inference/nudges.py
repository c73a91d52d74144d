"""Nudges tell an agent that there is something new to ask for. Lost, doubled or late ones do no harm."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from time import time

from celery import current_app
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

log = logging.getLogger("roundhouse.nudges")

NUDGE_SECONDS = 30
"""An agent asks by itself more often than this; an older nudge says nothing."""

_unreachable = False


def send_nudges(node_names: Iterable[str]) -> None:
    """Nudge the agents of these nodes. Never fails: without Redis they find out with their next beat."""
    global _unreachable
    try:
        for name in node_names:
            current_app.send_task(
                "inference.agent.nudge",
                args=[int(time())],
                queue=f"node.{name}",
                expires=NUDGE_SECONDS,
                retry=False,
                ignore_result=True,
            )
    except (OperationalError, RedisError, OSError) as error:
        if not _unreachable:
            log.warning(
                "nodes are not nudged, because Redis cannot be reached; they ask by themselves: %s",
                type(error).__name__,
                extra={"event": "nudges_unsent"},
            )
        _unreachable = True
    else:
        _unreachable = False
