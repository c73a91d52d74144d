"""Answers while they are written: what their readers follow, in this process and in others.

Each answer has an append log, a Redis stream of its own. A piece of text is an entry whose id is the
length of the text up to its end, `<length>-0`; the end is `<length>-1`. So a place in the log is a place
in the text, wherever it came from: a reader that has 120 characters goes on behind them, from this
process's memory, from the log or from what the database keeps, and nothing comes twice.

An answer written in this process reaches its readers here directly. For all others one task reads every
log that somebody here follows. What the log lacks (Redis is away, an entry was trimmed, the writer died)
comes from the database, two seconds behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from django.conf import settings
from django.db import DatabaseError, InterfaceError
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from registry.keys import redis_prefix
from registry.threads import in_database
from webchat.models import Message, MessageState
from webchat.protocol import show_end

logger = logging.getLogger("roundhouse.chat")

ENTRIES = 50_000
"""Kept of each log, about; older text is in the database."""
EXPIRY_SECONDS = 3600
EXPIRY_AGAIN_SECONDS = 60.0
BLOCK_MILLISECONDS = 200
"""How long a read waits for news; a reader that comes meanwhile waits no longer."""
SILENT_SECONDS = 2.0
"""An answer without news for this long is looked up in the database."""
AWAY_SECONDS = 1.0
"""Pause after Redis failed."""
GIVE_UP_SECONDS = 60.0
"""An ended answer that Redis does not take for this long is not written there any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """An answer as the database has it."""

    content: str
    end: dict[str, Any] | None
    """None while it is written."""


class Answer:
    """An answer as far as this process knows it. Grows at its end only."""

    def __init__(self, message_id: uuid.UUID, text: str = "") -> None:
        self.message_id = message_id
        self.text = text
        self.end: dict[str, Any] | None = None
        self.ahead: tuple[int, float | None] | None = None
        """While it waits for a worker: how many are served first, and in how many seconds its turn comes.
        Readers in other processes do not hear of it."""
        self.news = asyncio.Event()
        """Set with the next change; take it before looking, then wait."""
        self.changed_at = time.monotonic()

    def append(self, text: str) -> None:
        if text:
            self.text += text
            self._tell()

    def wait(self, ahead: int, seconds: float | None) -> None:
        self.ahead = ahead, seconds
        self._tell()

    def finish(self, end: dict[str, Any]) -> None:
        if self.end is None:
            self.end = end
            self._tell()

    def _tell(self) -> None:
        self.changed_at = time.monotonic()
        news, self.news = self.news, asyncio.Event()
        news.set()


class _Written(Answer):
    """One that this process writes, and how much of it the log has."""

    logged = 0
    ended_at = 0.0
    expires_at = 0.0


class _Followed(Answer):
    """One that another process writes."""

    followers = 0
    gap = False


class AnswerLog:
    """All answers that this process writes or follows. Belongs to one event loop."""

    def __init__(self, redis_url: str | None) -> None:
        self._redis_url = redis_url
        self._redis: Any = None
        self._reading: Any = None
        self._prefix = f"{redis_prefix(settings.SECRET_KEY)}chat:"
        self._written: dict[uuid.UUID, _Written] = {}
        self._followed: dict[uuid.UUID, _Followed] = {}
        self._behind: set[_Written] = set()
        """What the log does not have all of."""
        self._to_write = asyncio.Event()
        self._to_read = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._away = False

    async def start(self) -> None:
        """Redis may be away: then it is tried again and again."""
        self._tasks = [asyncio.create_task(self._look_up_forever(), name="chat look-up")]
        if self._redis_url is not None:
            # One connection each: a read that waits must not hold up a write.
            self._redis = Redis.from_url(self._redis_url, socket_timeout=2, socket_connect_timeout=1)
            self._reading = Redis.from_url(self._redis_url, socket_timeout=5, socket_connect_timeout=1)
            self._tasks.append(asyncio.create_task(self._write_forever(), name="chat log writer"))
            self._tasks.append(asyncio.create_task(self._read_forever(), name="chat log reader"))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._redis is not None:
            # Readers elsewhere hear of the last words at once, if Redis takes them.
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(AWAY_SECONDS):
                    await self._write(list(self._behind))
            await self._redis.aclose()
            await self._reading.aclose()
            self._redis = self._reading = None

    # -- writers

    def begin(self, message_id: uuid.UUID) -> Answer:
        """A new answer, written in this process until `release`."""
        answer = self._written[message_id] = _Written(message_id)
        return answer

    def append(self, answer: Answer, text: str) -> None:
        answer.append(text)
        self._log(answer)

    def finish(self, answer: Answer, end: dict[str, Any]) -> None:
        answer.finish(end)
        self._log(answer)

    def release(self, message_id: uuid.UUID) -> None:
        """The database has all of it: new readers are served from there."""
        self._written.pop(message_id, None)

    def _log(self, answer: Answer) -> None:
        if self._redis is not None and isinstance(answer, _Written):
            self._behind.add(answer)
            self._to_write.set()

    async def _write_forever(self) -> None:
        while True:
            await self._to_write.wait()
            self._to_write.clear()
            try:
                await self._write(list(self._behind))
            except (RedisError, OSError) as error:
                self._note_away(error)
                self._give_up()
                await asyncio.sleep(AWAY_SECONDS)
                self._to_write.set()
            else:
                self._note_back()

    async def _write(self, answers: list[_Written]) -> None:
        """Bring the log up to date. What was written meanwhile comes with the next round."""
        if not answers:
            return
        now = time.monotonic()
        reached: list[tuple[_Written, int, bool]] = []
        pipeline = self._redis.pipeline(transaction=False)
        for answer in answers:
            key, length = self._key(answer.message_id), len(answer.text)
            if length > answer.logged:
                entry = {"t": answer.text[answer.logged :]}
                pipeline.xadd(key, entry, id=f"{length}-0", maxlen=ENTRIES, approximate=True)
            if answer.end is not None:
                pipeline.xadd(key, {"e": msgspec.json.encode(answer.end)}, id=f"{length}-1")
            if answer.end is not None or now >= answer.expires_at:
                pipeline.expire(key, EXPIRY_SECONDS)
                answer.expires_at = now + EXPIRY_AGAIN_SECONDS
            reached.append((answer, length, answer.end is not None))
        for result in await pipeline.execute(raise_on_error=False):
            # "Equal or smaller": it was written before, and only the reply was lost.
            if isinstance(result, Exception) and not (
                isinstance(result, ResponseError) and "equal or smaller" in str(result)
            ):
                raise result
        for answer, length, ended in reached:
            answer.logged = length
            if ended or (len(answer.text) == length and answer.end is None):
                self._behind.discard(answer)

    def _give_up(self) -> None:
        now = time.monotonic()
        for answer in list(self._behind):
            if answer.end is not None and now - answer.changed_at > GIVE_UP_SECONDS:
                self._behind.discard(answer)

    # -- readers

    @contextlib.asynccontextmanager
    async def following(self, message_id: uuid.UUID, kept: Kept) -> AsyncIterator[Answer]:
        """The answer, growing while it is written. `kept` is what the database had just now."""
        written = self._written.get(message_id)
        if written is not None:
            yield written
            return
        if kept.end is not None:
            answer = Answer(message_id, kept.content)
            answer.end = kept.end
            yield answer
            return
        followed = self._followed.get(message_id)
        if followed is None:
            followed = self._followed[message_id] = _Followed(message_id, kept.content)
        else:
            _add(followed, 0, kept.content)
        followed.followers += 1
        self._to_read.set()
        try:
            yield followed
        finally:
            followed.followers -= 1
            if not followed.followers:
                del self._followed[message_id]

    async def rest(self, message_id: uuid.UUID, position: int) -> str:
        """What the log has behind this position; empty when Redis is away."""
        if self._redis is None:
            return ""
        answer = _Followed(message_id, " " * position)
        try:
            entries = await self._redis.xrange(self._key(message_id), min=f"({position}-0")
        except (RedisError, OSError) as error:
            self._note_away(error)
            return ""
        _take_over(answer, entries)
        return answer.text[position:]

    async def _read_forever(self) -> None:
        while True:
            wanted = {
                self._key(answer.message_id).encode(): answer
                for answer in self._followed.values()
                if answer.end is None
            }
            if not wanted:
                self._to_read.clear()
                await self._to_read.wait()
                continue
            places = {key: f"{len(answer.text)}-0" for key, answer in wanted.items()}
            try:
                found = await self._reading.xread(places, block=BLOCK_MILLISECONDS)
            except (RedisError, OSError) as error:
                self._note_away(error)
                await asyncio.sleep(AWAY_SECONDS)
                continue
            for key, entries in found or ():
                _take_over(wanted[key], entries)
            if any(answer.gap for answer in wanted.values()):
                # Until the database has filled it, each read would answer at once.
                await asyncio.sleep(BLOCK_MILLISECONDS / 1000)

    async def _look_up_forever(self) -> None:
        while True:
            await asyncio.sleep(SILENT_SECONDS / 2)
            horizon = time.monotonic() - SILENT_SECONDS
            silent = [
                answer.message_id
                for answer in self._followed.values()
                if answer.end is None and (answer.gap or answer.changed_at < horizon)
            ]
            if not silent:
                continue
            try:
                kept = await in_database(read_kept, silent)
            except (DatabaseError, InterfaceError) as error:
                logger.warning(
                    "answers could not be looked up (%s)",
                    type(error).__name__,
                    extra={"event": "chat_look_up_failed"},
                )
                continue
            for message_id in silent:
                answer = self._followed.get(message_id)
                if answer is None:
                    continue
                found = kept.get(message_id)
                if found is None:
                    answer.finish({"state": MessageState.STOPPED.value})
                    continue
                _add(answer, 0, found.content)
                answer.gap = False
                if found.end is not None:
                    answer.finish(found.end)

    # -- parts

    def _key(self, message_id: uuid.UUID) -> str:
        return f"{self._prefix}{message_id}"

    def _note_away(self, error: Exception) -> None:
        if not self._away:
            logger.warning(
                "Redis takes no answers (%s); they go on, and are followed from the database elsewhere",
                type(error).__name__,
                extra={"event": "chat_log_away"},
            )
        self._away = True

    def _note_back(self) -> None:
        if self._away:
            logger.info("Redis takes answers again", extra={"event": "chat_log_back"})
        self._away = False


def _take_over(answer: _Followed, entries: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> None:
    for entry_id, fields in entries:
        length = int(entry_id.partition(b"-")[0])
        if (ending := fields.get(b"e")) is not None:
            if length <= len(answer.text):
                answer.finish(msgspec.json.decode(ending))
            else:
                answer.gap = True
            return
        text = fields.get(b"t", b"").decode()
        if not _add(answer, length - len(text), text):
            answer.gap = True
            return


def _add(answer: Answer, start: int, text: str) -> bool:
    """Add what is new of a text that begins at `start`. False: something is missing before it."""
    known = len(answer.text)
    if start > known:
        return False
    answer.append(text[known - start :])
    return True


def read_kept(message_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Kept]:
    """Answers as the database has them. For readers whose right to see them was checked when they came."""
    messages = Message.objects.filter(pk__in=list(message_ids)).select_related("conversation")
    return {message.pk: kept_of(message) for message in messages}


def kept_of(message: Message) -> Kept:
    """A message with its conversation, as something to follow."""
    generating = message.state == MessageState.GENERATING
    end = None if generating else show_end(message, title=message.conversation.title)
    return Kept(content=message.content, end=end)
