"""The ledger's way in: what a gateway serves is on its local disk before it is in the database.

Each start of a gateway has a folder of its own, `<root>/<gateway>~<random>/`:

    lock            held (flock) while the process lives; a folder whose lock is free is a dead gateway's
    000001.log …    segments: one JSON line per opened and per closed request, appended by one write each
    000.counters …  memory-mapped: per open request a slot of four 32-bit numbers: tag, prompt, cached,
                    completion tokens

A write survives the process that made it, and so does a store into a shared mapping: after a
`kill -9` the counters hold every token that was counted, without a system call per token. A power
cut may take the last 0.2 s (the time between two fsyncs). The tag tells a slot's request from the
next one's, should a power cut have taken the records in between.

Moved to `UsageEvent` by the gateway itself within 0.25 s, or, once its lock is free, by any other gateway
or by control (`recover_all`). The unique request id makes it exactly once.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import mmap
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import msgspec
from django.db import DataError, IntegrityError, connection

from registry.actions.usage import record_usage
from registry.models import UsageEvent
from registry.states import Outcome
from registry.threads import in_database

logger = logging.getLogger("roundhouse.spool")

MOVE_SECONDS = 0.2
"""Closed requests are moved, and files synced, at most this often."""
RETRY_SECONDS = 1.0
"""Time between two tries while the database is away."""
RECOVER_SECONDS = 5.0
"""Dead gateways' folders are looked for this often."""
STOP_SECONDS = 5.0
"""How long `stop` tries to move what is left; the rest waits on disk."""
BATCH = 500
SEGMENT_BYTES = 1024 * 1024
CHUNK_SLOTS = 4096
MAX_SLOTS = 256 * CHUNK_SLOTS
MAX_PENDING = 100_000
"""Closed requests that may wait for the database before new ones are refused."""
ABANDONED_SECONDS = 60.0
"""A folder still without its final name after this long was left by a gateway that died making it."""

_SLOT_NUMBERS = 4
_CHUNK_BYTES = CHUNK_SLOTS * _SLOT_NUMBERS * 4
_U32 = 0xFFFF_FFFF
_MAX_INTEGER = 2**31 - 1
_MAX_SMALL = 2**15 - 1
_STATUS_INTERRUPTED = 500
_DRAFT = ".new-"


class SpoolFull(Exception):
    """Too much waits for the database, or too many requests are open; the request must be refused."""


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a request when it starts. `request_id` must be ours: the client's may repeat."""

    request_id: str
    started_at: float
    """Seconds since the epoch."""
    project_id: int
    project_name: str
    key_public_id: str
    key_name: str
    route: str
    endpoint: str
    stream: bool


class Closed(msgspec.Struct, frozen=True, kw_only=True):
    """How a request ended."""

    status: int
    outcome: str
    deployment: str = ""
    worker: str = ""
    attempts: int = 1
    queue_ms: int | None = None
    ttft_ms: int | None = None
    duration_ms: int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class _OpenRecord(msgspec.Struct, tag_field="record", tag="open"):
    number: int
    slot: int
    opened: Opened


class _CloseRecord(msgspec.Struct, tag_field="record", tag="close"):
    number: int
    closed: Closed


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_OpenRecord | _CloseRecord).decode


class _Segment:
    """A file of records. `needed` counts the records of requests that are not in the ledger yet."""

    __slots__ = ("fd", "needed", "path", "size", "unsynced")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = 0
        self.needed = 0
        self.unsynced = False

    def append(self, line: bytes) -> None:
        """Raises OSError if the disk did not take the whole line."""
        written = os.write(self.fd, line)
        if written != len(line):
            with suppress(OSError):
                os.ftruncate(self.fd, self.size)
            raise OSError(28, "no space left for the whole record")
        self.size += written
        self.needed += 1
        self.unsynced = True


class Entry:
    """One request's place in the spool, from `Spool.open` to `close`."""

    __slots__ = ("_base", "_closed", "_counters", "_spool", "number", "opened", "segment", "slot")

    def __init__(
        self, spool: Spool, opened: Opened, number: int, slot: int, counters: memoryview, segment: _Segment
    ) -> None:
        self.opened = opened
        self.number = number
        self.slot = slot
        self.segment = segment
        self._spool = spool
        self._counters = counters
        self._base = slot % CHUNK_SLOTS * _SLOT_NUMBERS
        self._closed = False

    def count(self, *, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> None:
        """Tokens so far. Call it before the client is sent them: then whatever the client saw is paid for,
        even if this process is killed in the next instruction."""
        if self._closed:
            return
        counters, base = self._counters, self._base
        counters[base + 1] = prompt_tokens
        counters[base + 2] = cached_tokens
        counters[base + 3] = completion_tokens

    def close(self, closed: Closed) -> None:
        """The request has ended. Never raises for the disk's sake; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._spool._close(self, closed)


class Spool:
    """A gateway's spool. One event loop owns it, except `recover_all`, which anyone may call."""

    def __init__(
        self, root: Path, gateway: str, *, record: Callable[[Sequence[UsageEvent]], None] | None = None
    ):
        """Make this start's own folder below `root` (`<data>/spool`) and lock it. Raises OSError.

        Two gateways of one name do not meet: each has its folder. `gateway` is what the ledger notes.
        """
        self.root = root
        self.gateway = gateway
        self._record = record or record_durably
        self.folder, self._lock = _make_folder(root, gateway)
        self._next_segment = 1
        self._segments: list[_Segment] = []
        self._chunks: list[tuple[mmap.mmap, memoryview]] = []
        self._free_slots: list[int] = []
        self._next_number = 1
        self._open_count = 0
        self._pending: list[tuple[Entry, _Segment | None, Closed]] = []
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._away = False
        self._ended = False
        self._add_chunk()
        self._add_segment()

    # -- the request's side

    def open(self, opened: Opened) -> Entry:
        """Note that a request starts; only then may a worker be asked. Raises SpoolFull or OSError: then
        nothing was noted and the request must be refused."""
        if self._ended:
            raise SpoolFull("The gateway is ending.")
        if len(self._pending) >= MAX_PENDING:
            raise SpoolFull("Too many ended requests wait for the database.")
        if not self._free_slots:
            self._add_chunk()
        number = self._next_number
        slot = self._free_slots.pop()
        counters = self._chunks[slot // CHUNK_SLOTS][1]
        base = slot % CHUNK_SLOTS * _SLOT_NUMBERS
        counters[base] = number & _U32
        counters[base + 1] = counters[base + 2] = counters[base + 3] = 0
        try:
            segment = self._append(_encode(_OpenRecord(number, slot, opened)) + b"\n")
        except BaseException:
            self._free_slots.append(slot)
            raise
        self._next_number = number + 1
        self._open_count += 1
        self._wake.set()
        return Entry(self, opened, number, slot, counters, segment)

    def _close(self, entry: Entry, closed: Closed) -> None:
        segment: _Segment | None = None
        try:
            segment = self._append(_encode(_CloseRecord(entry.number, closed)) + b"\n")
        except OSError as error:
            # It is in memory and goes to the database all the same. Should this process die before, the
            # request is settled from its counters, so these get the final figures and keep the slot.
            logger.warning(
                "event=spool_write_failed the end of %s is not on disk: %s",
                entry.opened.request_id,
                error.strerror,
                extra={"event": "spool_write_failed", "request_id": entry.opened.request_id},
            )
            entry._write_counters(closed)
        else:
            self._free_slots.append(entry.slot)
        self._open_count -= 1
        self._pending.append((entry, segment, closed))
        self._wake.set()

    def _append(self, line: bytes) -> _Segment:
        segment = self._segments[-1]
        if segment.size >= SEGMENT_BYTES:
            segment = self._add_segment()
        try:
            segment.append(line)
        except OSError:
            # What stands at this segment's end now is unknown: nothing may be appended to it.
            segment.size = SEGMENT_BYTES
            raise
        return segment

    def _add_segment(self) -> _Segment:
        segment = _Segment(self.folder / f"{self._next_segment:06}.log")
        self._next_segment += 1
        self._segments.append(segment)
        return segment
