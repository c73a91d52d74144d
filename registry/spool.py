"""The ledger's way in: what a gateway serves is on its local disk before it is in the database.

Each start of a gateway has a folder of its own, `<root>/<gateway>~<random>/`:

    lock            held (flock) while the process lives; a folder whose lock is free is a dead gateway's
    000001.log …    segments: one JSON line per opened and per closed request, appended by one write each
    000.counters …  memory-mapped: per open request a slot of four 32-bit numbers: tag, prompt, cached (and
                    in its top bit, whether all of the answer was counted), completion tokens

A write survives the process that made it, and so does a store into a shared mapping: after a
`kill -9` the counters hold every token that was counted, without a system call per token. A power
cut may take the last 0.2 s (the time between two fsyncs). The tag tells a slot's request from the
next one's, should a power cut have taken the records in between.

Moved to `UsageEvent` by the gateway itself within 0.25 s, or, once its lock is free, by any other gateway
or by control (`recover_all`). The unique request id makes it exactly once.
"""

from __future__ import annotations

import asyncio
import errno
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
_ANSWERED = 2**31
_MAX_SMALL = 2**15 - 1
_STATUS_OK = 200
_STATUS_INTERRUPTED = 500
_BLANK = b"\n" * 1024
"""No record, as long as a long one."""
_DRAFT = ".new-"
_DONE = ".done-"


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
    base: str = ""
    """Of a route `base:adapter`: the route itself."""


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
    flagged: str = ""
    """What is odd about these figures (`registry.figures`)."""


class _OpenRecord(msgspec.Struct, tag_field="record", tag="open"):
    number: int
    slot: int
    opened: Opened


class _CloseRecord(msgspec.Struct, tag_field="record", tag="close"):
    number: int
    closed: Closed


Recorder = Callable[[Sequence[UsageEvent]], None]
"""Appends events to the ledger, in a database thread."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_OpenRecord | _CloseRecord).decode


class _Segment:
    """A file of records. `needed` counts the records of requests that are not in the ledger yet."""

    __slots__ = ("fd", "full", "needed", "path", "size", "unsynced")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = 0
        self.full = False
        self.needed = 0
        self.unsynced = False

    def append(self, line: bytes) -> None:
        """Raises OSError if the disk did not take the whole line."""
        try:
            _write_whole(self.fd, line)
        except OSError:
            # Unless what it took is off again, nothing may be appended to it.
            self.full = True
            os.ftruncate(self.fd, self.size)
            self.full = False
            raise
        self.size += len(line)
        self.full = self.size >= SEGMENT_BYTES
        self.needed += 1
        self.unsynced = True


class _Chunk:
    """A mapped file of `CHUNK_SLOTS` slots."""

    __slots__ = ("fd", "numbers")

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Its blocks are taken now: a store into a hole of a full disk would end the process.
            _write_whole(self.fd, bytes(_CHUNK_BYTES))
            # As 32-bit numbers: one store writes a whole one, so a kill never leaves half of it.
            self.numbers = memoryview(mmap.mmap(self.fd, _CHUNK_BYTES)).cast("I")
        except BaseException:
            os.close(self.fd)
            path.unlink(missing_ok=True)
            raise


class Entry:
    """One request's place in the spool, from `Spool.open` to `close`."""

    __slots__ = (
        "_answered",
        "_base",
        "_closed",
        "_counters",
        "_spool",
        "number",
        "opened",
        "segment",
        "slot",
    )

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
        self._answered = 0
        self._closed = False

    def count(self, *, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> None:
        """Tokens so far. Call it before the client is sent them: then whatever the client saw is paid for,
        even if this process is killed in the next instruction."""
        if self._closed:
            return
        counters, base = self._counters, self._base
        try:
            counters[base + 1] = prompt_tokens
            counters[base + 2] = cached_tokens | self._answered
            counters[base + 3] = completion_tokens
        except ValueError:
            # A worker's report out of all bounds.
            counters[base + 1] = _within(prompt_tokens)
            counters[base + 2] = _within(cached_tokens) | self._answered
            counters[base + 3] = _within(completion_tokens)

    def answered(self) -> None:
        """All of the answer is counted. Call it before the client is sent the end of it: a request whose
        client saw that end is then `ok`, even if this process is killed before it can `close`."""
        self._answered = _ANSWERED
        if not self._closed:
            self._counters[self._base + 2] |= _ANSWERED

    def close(self, closed: Closed) -> None:
        """The request has ended. Never raises for the disk's sake; a second call does nothing."""
        if not self._closed:
            # The final figures: they count if the record of them cannot be written.
            self.count(
                prompt_tokens=closed.prompt_tokens,
                completion_tokens=closed.completion_tokens,
                cached_tokens=closed.cached_tokens,
            )
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
        self._chunks: list[_Chunk] = []
        self._files_added = False
        self._free_slots: list[int] = []
        self._next_number = 1
        self._open_count = 0
        self._pending: list[tuple[Entry, _Segment | None, Closed]] = []
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._away = False
        self._refused = False
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
        counters = self._chunks[slot // CHUNK_SLOTS].numbers
        base = slot % CHUNK_SLOTS * _SLOT_NUMBERS
        counters[base] = number & _U32
        counters[base + 1] = counters[base + 2] = counters[base + 3] = 0
        try:
            segment = self._append(_encode(_OpenRecord(number, slot, opened)) + b"\n")
        except BaseException:
            self._free_slots.append(slot)
            self._refused = True
            raise
        self._refused = False
        self._next_number = number + 1
        self._open_count += 1
        self._wake.set()
        return Entry(self, opened, number, slot, counters, segment)

    def has_room(self) -> bool:
        """Whether a request could be noted now. If the disk did not take the last one, it is tried again."""
        if self._refused:
            with suppress(OSError):
                self._append(_BLANK).needed -= 1
                self._refused = False
        return not self._refused and len(self._pending) < MAX_PENDING

    def _close(self, entry: Entry, closed: Closed) -> None:
        segment: _Segment | None = None
        try:
            segment = self._append(_encode(_CloseRecord(entry.number, closed)) + b"\n")
        except OSError as error:
            # It is in memory and goes to the database all the same. Should this process die before, the
            # request is settled from its counters: the slot is kept until then.
            logger.warning(
                "event=spool_write_failed the end of %s is not on disk: %s",
                entry.opened.request_id,
                error.strerror,
                extra={"event": "spool_write_failed", "request_id": entry.opened.request_id},
            )
        else:
            self._free_slots.append(entry.slot)
        self._open_count -= 1
        self._pending.append((entry, segment, closed))
        self._wake.set()

    def _append(self, line: bytes) -> _Segment:
        segment = self._segments[-1]
        if segment.full:
            segment = self._add_segment()
        segment.append(line)
        return segment

    def _add_segment(self) -> _Segment:
        segment = _Segment(self.folder / f"{self._next_segment:06}.log")
        self._next_segment += 1
        self._files_added = True
        self._segments.append(segment)
        return segment

    def _add_chunk(self) -> None:
        first = len(self._chunks) * CHUNK_SLOTS
        if first >= MAX_SLOTS:
            raise SpoolFull("Too many requests are open.")
        self._chunks.append(_Chunk(self.folder / f"{len(self._chunks):03}.counters"))
        self._files_added = True
        self._free_slots.extend(reversed(range(first, first + CHUNK_SLOTS)))

    # -- the ledger's side

    @property
    def pending(self) -> int:
        """Ended requests that are not in the database yet."""
        return len(self._pending)

    async def start(self) -> None:
        """Move what ends to the ledger from now on, and settle what dead gateways left."""
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._move_forever(), name="spool-move"),
                asyncio.create_task(self._recover_forever(), name="spool-recover"),
            ]

    async def stop(self) -> None:
        """Move what is left, for at most `STOP_SECONDS`. Call it when all requests have ended: what is
        still open then stays on disk, and is settled by others once this process is gone."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        deadline = time.monotonic() + STOP_SECONDS
        while self._pending and time.monotonic() < deadline:
            if not await self._move():
                await asyncio.sleep(MOVE_SECONDS)
        if self._open_count or self._ended:
            return
        self._ended = True
        await self._sync()
        for segment in self._segments:
            os.close(segment.fd)
        for chunk in self._chunks:
            os.close(chunk.fd)
        if not self._pending:
            _remove_folder(self.folder)
        self._lock.close()

    async def _move_forever(self) -> None:
        while True:
            # While requests are open their counters change without a word here.
            # Not `wait_for`: on Python 3.11 it can swallow the cancellation that ends this loop.
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0 if self._open_count else None):
                    await self._wake.wait()
            self._wake.clear()
            _, moved = await asyncio.gather(self._sync(), self._move())
            self._drop_segments()
            if moved:
                await asyncio.sleep(MOVE_SECONDS)
            else:
                self._wake.set()
                await asyncio.sleep(RETRY_SECONDS)

    async def _move(self) -> bool:
        """Move everything that has ended; False if the database does not take it now."""
        while self._pending:
            batch = self._pending[:BATCH]
            events = [_event(entry.opened, closed, self.gateway) for entry, _, closed in batch]
            try:
                await in_database(_record_or_set_aside, self.root, events, self._record)
            except Exception as error:
                if not self._away:
                    self._away = True
                    logger.warning(
                        "event=ledger_away usage waits on disk until the database takes it: %s",
                        type(error).__name__,
                        extra={"event": "ledger_away"},
                        exc_info=error,
                    )
                return False
            del self._pending[: len(batch)]
            for entry, close_segment, _ in batch:
                entry.segment.needed -= 1
                if close_segment is not None:
                    close_segment.needed -= 1
                else:
                    self._free_slots.append(entry.slot)
        if self._away:
            self._away = False
            logger.warning(
                "event=ledger_back waiting usage is in the database", extra={"event": "ledger_back"}
            )
        return True

    def _drop_segments(self) -> None:
        """Delete full segments of which nothing is needed any more."""
        kept = []
        for segment in self._segments[:-1]:
            if segment.needed:
                kept.append(segment)
                continue
            os.close(segment.fd)
            # A disk that cannot be written must not end the mover; what stays goes with the folder.
            with suppress(OSError):
                segment.path.unlink()
        self._segments[:-1] = kept

    async def _sync(self) -> None:
        """Have the disk itself take what was written."""
        unsynced = [segment for segment in self._segments if segment.unsynced]
        for segment in unsynced:
            segment.unsynced = False
        fds = [segment.fd for segment in unsynced]
        if self._open_count or unsynced:
            fds += [chunk.fd for chunk in self._chunks]
        folder = self.folder if self._files_added else None
        self._files_added = False
        try:
            await asyncio.to_thread(_sync_files, fds, folder)
        except OSError as error:
            logger.error(
                "event=spool_sync_failed the spool cannot be synced to disk: %s",
                error.strerror,
                extra={"event": "spool_sync_failed"},
            )

    async def _recover_forever(self) -> None:
        while True:
            try:
                await in_database(recover_all, self.root, record=self._record)
            except Exception as error:
                # `_move` tells of the database's absence; what dead gateways left can wait for it.
                logger.info(
                    "event=recover_failed dead gateways' spools could not be read now: %s",
                    type(error).__name__,
                    extra={"event": "recover_failed"},
                )
            await asyncio.sleep(RECOVER_SECONDS)


def recover_all(root: Path, *, record: Recorder | None = None) -> int:
    """Bring what dead gateways left below `root` into the ledger, then delete it; returns how many events.

    Ended requests as they ended; those still open with the tokens counted so far: as `ok` if that was the
    whole answer, else as `interrupted`.
    Safe to call at any time, by anyone, also twice at once. Raises the database's error when it is away;
    everything then stays as it is.
    """
    recovered = 0
    if not root.is_dir():
        return 0
    for folder in sorted(root.iterdir()):
        if not folder.is_dir():
            continue
        if folder.name.startswith(_DONE):
            shutil.rmtree(folder, ignore_errors=True)
            continue
        if folder.name.startswith(_DRAFT):
            with suppress(FileNotFoundError):
                if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)
            continue
        with _lock_of_dead(folder) as dead:
            if not dead:
                continue
            events = list(_left_in(folder))
            for start in range(0, len(events), BATCH):
                _record_or_set_aside(root, events[start : start + BATCH], record or record_durably)
            _remove_folder(folder)
            recovered += len(events)
            if events:
                logger.warning(
                    "event=spool_recovered %d requests of a gateway that ended are settled",
                    len(events),
                    extra={"event": "spool_recovered"},
                )
    return recovered


def record_durably(events: Sequence[UsageEvent]) -> None:
    """Append to the ledger so that it is on disk before its copy in the spool is deleted."""
    if connection.vendor != "sqlite" or connection.in_atomic_block:
        record_usage(events)
        return
    # NORMAL, what the other tables get, may lose the last transactions in a power cut.
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA synchronous=FULL")
        try:
            record_usage(events)
        finally:
            cursor.execute("PRAGMA synchronous=NORMAL")


def _record_or_set_aside(root: Path, events: Sequence[UsageEvent], record: Recorder) -> None:
    """One event that the ledger refuses must not hold up the others: it goes to `refused.jsonl`."""
    # Within one statement PostgreSQL refuses a second row of the same id.
    unique = list({event.request_id: event for event in reversed(events)}.values())
    try:
        record(unique)
        return
    except (IntegrityError, DataError):
        if len(unique) > 1:
            for event in unique:
                _record_or_set_aside(root, [event], record)
            return
        refused = unique[0]
    logger.exception(
        "event=usage_refused the ledger refuses the event of %s; it is kept in refused.jsonl",
        refused.request_id,
        extra={"event": "usage_refused", "request_id": refused.request_id},
    )
    facts = {field.attname: getattr(refused, field.attname) for field in UsageEvent._meta.concrete_fields}
    with open(root / "refused.jsonl", "ab") as file:
        file.write(_encode(facts) + b"\n")


def _event(opened: Opened, closed: Closed, gateway: str) -> UsageEvent:
    """A row that the table takes: texts and numbers cut to its columns."""
    prompt_tokens = _within(closed.prompt_tokens)
    return UsageEvent(
        request_id=_text(opened.request_id, 64),
        started_at=datetime.fromtimestamp(opened.started_at, UTC),
        project_id=opened.project_id,
        project_name=_text(opened.project_name, 120),
        key_public_id=_text(opened.key_public_id, 16),
        key_name=_text(opened.key_name, 120),
        route=_text(opened.route, 120),
        base=_text(opened.base, 120),
        deployment=_text(closed.deployment, 63),
        worker=_text(closed.worker, 100),
        endpoint=_text(opened.endpoint, 64),
        stream=opened.stream,
        status=_within(closed.status, _MAX_SMALL),
        outcome=closed.outcome,
        prompt_tokens=prompt_tokens,
        cached_tokens=min(_within(closed.cached_tokens), prompt_tokens),
        completion_tokens=_within(closed.completion_tokens),
        attempts=_within(closed.attempts, _MAX_SMALL),
        queue_ms=None if closed.queue_ms is None else _within(closed.queue_ms),
        ttft_ms=None if closed.ttft_ms is None else _within(closed.ttft_ms),
        duration_ms=None if closed.duration_ms is None else _within(closed.duration_ms),
        gateway=_text(gateway, 63),
        flagged=_text(closed.flagged, 100),
    )


def _within(number: int, most: int = _MAX_INTEGER) -> int:
    return min(max(0, number), most)


def _text(text: str, length: int) -> str:
    # PostgreSQL takes no NUL.
    return text.replace("\0", "")[:length]


def _left_in(folder: Path) -> Iterator[UsageEvent]:
    """What a dead gateway's folder says: one event per request of which the opening is there."""
    gateway = folder.name.rpartition("~")[0]
    opens: dict[int, _OpenRecord] = {}
    for record in _records(sorted(folder.glob("*.log"))):
        if isinstance(record, _OpenRecord):
            opens[record.number] = record
        else:
            # Without its opening it has been moved already: that segment is deleted.
            opening = opens.pop(record.number, None)
            if opening is not None:
                yield _event(opening.opened, record.closed, gateway)
    chunks = [memoryview(path.read_bytes()).cast("I") for path in sorted(folder.glob("*.counters"))]
    for opening in opens.values():
        prompt, cached, completion, answered = _counted(chunks, opening)
        closed = Closed(
            status=_STATUS_OK if answered else _STATUS_INTERRUPTED,
            outcome=Outcome.OK if answered else Outcome.INTERRUPTED,
            prompt_tokens=prompt,
            cached_tokens=cached,
            completion_tokens=completion,
        )
        yield _event(opening.opened, closed, gateway)


def _records(paths: Iterable[Path]) -> Iterator[_OpenRecord | _CloseRecord]:
    for path in paths:
        for line in filter(None, path.read_bytes().splitlines()):
            try:
                yield _decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                # The machine lost its power, or the disk was full, in mid-write.
                logger.warning(
                    "event=torn_record %s has a torn record, which is left out",
                    path.name,
                    extra={"event": "torn_record"},
                )


def _counted(chunks: Sequence[memoryview], opening: _OpenRecord) -> tuple[int, int, int, bool]:
    """Prompt, cached and completion tokens, and whether they are those of a whole answer."""
    chunk, slot = divmod(opening.slot, CHUNK_SLOTS)
    base = slot * _SLOT_NUMBERS
    if chunk >= len(chunks) or len(chunks[chunk]) < base + _SLOT_NUMBERS:
        return 0, 0, 0, False
    tag, prompt, cached, completion = chunks[chunk][base : base + _SLOT_NUMBERS]
    if tag != opening.number & _U32:
        return 0, 0, 0, False
    return prompt, cached & _MAX_INTEGER, completion, bool(cached & _ANSWERED)


def _make_folder(root: Path, gateway: str) -> tuple[Path, BinaryIO]:
    """A new folder, locked before it has a name under which anyone would take it for a dead one's."""
    name = f"{re.sub(r'[^A-Za-z0-9._-]', '-', gateway)[:63].lstrip('.')}~{secrets.token_hex(6)}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = root / f"{_DRAFT}{name}"
    draft.mkdir(mode=0o700)
    lock = open(draft / "lock", "xb")  # noqa: SIM115 - held for the life of the spool
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = draft.rename(root / name)
    except BaseException:
        lock.close()
        raise
    return folder, lock


@contextmanager
def _lock_of_dead(folder: Path) -> Iterator[bool]:
    """Take a folder's lock if nobody has it. False: its gateway lives, or someone else settles it."""
    path = folder / "lock"
    try:
        lock = open(path, "rb")  # noqa: SIM115 - closed below; only its absence is caught here
    except FileNotFoundError:
        yield False
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it until now may have settled and deleted the folder.
            dead = os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            dead = False
        yield dead


def _remove_folder(folder: Path) -> None:
    """Delete a settled folder. It loses its name first, so that a half deleted one is never read."""
    with suppress(OSError):
        folder = folder.rename(folder.with_name(f"{_DONE}{folder.name}"))
    shutil.rmtree(folder, ignore_errors=True)


def _write_whole(fd: int, data: bytes) -> None:
    if os.write(fd, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _sync_files(fds: Sequence[int], folder: Path | None) -> None:
    for fd in fds:
        os.fsync(fd)
    if folder is not None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
