"""The agent's Celery app: hears nudges, and tells the loop that there is something new to ask for.

The contract with the control plane:

    app.send_task("inference.agent.nudge", args=[generation], queue=f"node.{name}",
                  serializer="json", ignore_result=True, expires=30)

with the prefix for all names in the broker (`global_keyprefix`) that the node was told when it joined.
A nudge carries a number and nothing else; what to run is fetched from the gateway with the
node's secret. So a lost, doubled or stale nudge does no harm, and no secret passes the broker.

This runs in a process of its own (`python -m inference.agent.app DATA`, started by `listener`),
because a Celery worker owns its process: signals, exit and reconnects. Whatever happens to it
or to the broker, supervision in the agent goes on. It writes one line per nudge to its standard
output, logs to standard error, and ends when its standard input closes, that is, with the agent.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from celery import Celery
from celery.signals import setup_logging

from inference.agent.identity import Identity, read_identity

SAY_AGAIN_SECONDS = 600.0
"""A broker that is away is mentioned this often, not at every try."""


def queue_of(name: str) -> str:
    """The queue that the node `name` listens on."""
    return f"node.{name}"


def build_app(identity: Identity, heard: Callable[[int], object]) -> Celery:
    """The app of one node; `heard` gets the generation of every nudge."""
    app = Celery("inference.agent", broker=_broker(identity.broker_url or ""), set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        result_backend=None,
        task_ignore_result=True,
        task_default_queue=queue_of(identity.name),
        worker_send_task_events=False,
        # Nobody but the gateway's orders commands a node.
        worker_enable_remote_control=False,
        worker_redirect_stdouts=False,
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "socket_keepalive": True,
            "health_check_interval": 10,
            "global_keyprefix": identity.broker_prefix,
        },
    )

    @app.task(name="inference.agent.nudge", ignore_result=True)  # type: ignore[untyped-decorator]
    def nudge(generation: int) -> None:
        heard(generation)  # a message without a number ends here, as a failed task

    return app


def main(argv: list[str]) -> int:
    identity = read_identity(Path(argv[0]))
    if identity is None or identity.broker_url is None:
        print("This node has no broker to listen to.", file=sys.stderr)
        return 1

    # Standard output is the line to the agent: what others print must not get into it.
    line = os.dup(1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_the_agent, daemon=True).start()

    # With a receiver of this signal Celery leaves logging alone.
    setup_logging.connect(_set_up_logging)
    app = build_app(identity, lambda generation: os.write(line, b"%d\n" % generation))
    # Celery advises against root because of pickle, which this app refuses.
    warnings.filterwarnings("ignore", message="You're running the worker with superuser privileges")
    worker = app.Worker(
        hostname=f"agent@{identity.name}",
        pool="solo",
        queues=[queue_of(identity.name)],
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    worker.start()
    return int(worker.exitcode or 0)


def _broker(url: str) -> str:
    """A Redis address as Celery writes it: `unix:///run/redis.sock?db=1` has another form there."""
    if not url.startswith("unix://"):
        return url
    parts = urlsplit(url)
    database = parse_qs(parts.query).get("db", ["0"])[0]
    return f"redis+socket://{parts.netloc}{parts.path}?virtual_host={database}"


class _Seldom(logging.Filter):
    """Lets a record pass when none with the same wording did for a while."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now, wording = time.monotonic(), str(record.msg)
        if now - self._said.get(wording, -SAY_AGAIN_SECONDS) < SAY_AGAIN_SECONDS:
            return False
        self._said[wording] = now
        return True


class _Brief(logging.Formatter):
    """An error in one line: what fails here is the broker, and its tracebacks explain nothing."""

    def formatException(self, ei: Any) -> str:
        return f"{ei[0].__name__}: {ei[1]}"


def _set_up_logging(**_: object) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Brief("%(asctime)s %(levelname)s listener: %(message)s"))
    handler.addFilter(_Seldom())
    logging.basicConfig(level=logging.ERROR, handlers=[handler])


def _end_with_the_agent() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
