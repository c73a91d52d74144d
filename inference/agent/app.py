"""The agent's Celery app: hears nudges, and tells the loop that there is something new to ask for.

The contract with the control plane:

    app.send_task("inference.agent.nudge", args=[generation], queue=f"node.{name}",
                  serializer="json", ignore_result=True, expires=30)

A nudge carries a number and nothing else; what to run is fetched from the gateway with the
node's secret. So a lost, doubled or stale nudge does no harm, and no secret passes the broker.

This runs in a process of its own (`python -m inference.agent.app DATA`, started by `listener`),
because a Celery worker owns its process: signals, exit and reconnects. Whatever happens to it
or to the broker, supervision in the agent goes on. It writes one line per nudge to its standard
output, logs to standard error, and ends when its standard input closes, that is, with the agent.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from celery import Celery

from inference.agent.identity import Identity, read_identity


def queue_of(name: str) -> str:
    """The queue that the node `name` listens on."""
    return f"node.{name}"


def build_app(identity: Identity, heard: Callable[[int], None]) -> Celery:
    """The app of one node; `heard` gets the generation of every nudge."""
    app = Celery("inference.agent", broker=identity.broker_url, set_as_current=False)
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
        broker_transport_options={"socket_keepalive": True, "health_check_interval": 10},
    )

    @app.task(name="inference.agent.nudge", ignore_result=True)  # type: ignore[untyped-decorator]
    def nudge(generation: int) -> None:
        heard(generation)

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

    app = build_app(identity, lambda generation: _write(line, f"{generation:d}\n"))
    # Celery advises against root because of pickle, which this app refuses.
    warnings.filterwarnings("ignore", message="You're running the worker with superuser privileges")
    worker = app.Worker(
        hostname=f"agent@{identity.name}",
        pool="solo",
        queues=[queue_of(identity.name)],
        loglevel="ERROR",
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    worker.start()
    return int(worker.exitcode or 0)


def _write(descriptor: int, text: str) -> None:
    os.write(descriptor, text.encode())


def _end_with_the_agent() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
