"""A worker's own log: one JSON line per event on stderr. Never a prompt, never a secret."""

from __future__ import annotations

import sys
import time

import msgspec


class EventLog:
    def __init__(self, worker_id: int, epoch: int) -> None:
        self._who = {"worker_id": worker_id, "epoch": epoch}

    def __call__(self, event: str, **facts: object) -> None:
        line = {"at": round(time.time(), 3), "event": event, **self._who, **facts}
        sys.stderr.write(msgspec.json.encode(line).decode() + "\n")
        sys.stderr.flush()
