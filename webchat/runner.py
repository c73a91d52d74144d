"""Writes answers in the gateway's own process, through the same path as the API.

Nobody need watch: a page that is left stops nothing. An answer ends by itself, by its person's word (a
flag in the database, which the gateway that writes it sees within a second), or with its gateway; in the
last case another gateway marks it interrupted.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec
from django.db import DatabaseError, InterfaceError

from inference.http import INTERNAL_ERROR
from openai_api.errors import answer_to
from openai_api.gateway import Gateway
from openai_api.generation import Generation
from registry.threads import in_database
from webchat.actions import (
    INTERRUPTED,
    Draft,
    Job,
    find_orphans,
    finish,
    interrupt,
    save_drafts,
    stopped_among,
)
from webchat.log import Answer, AnswerLog
from webchat.models import MessageState

logger = logging.getLogger("roundhouse.chat")

BATCH_SECONDS = 0.05
BATCH_CHARACTERS = 64
"""Text goes to its readers after this long, or when there is this much of it."""
WATCH_SECONDS = 0.5
SAVE_SECONDS = 2.0
ORPHANS_SECONDS = 5.0
AWAY_SECONDS = 1.0
STOP_SECONDS = 10.0
"""How long an ending gateway lets answers finish."""


class ChatRunner:
    """The answers that this gateway writes. Belongs to the gateway's event loop."""

    def __init__(self, gateway: Gateway, log: AnswerLog) -> None:
        self._gateway = gateway
        self._log = log
        self._runs: dict[uuid.UUID, _Run] = {}
        self._tasks: dict[uuid.UUID, asyncio.Task[None]] = {}
        self._stopping: set[asyncio.Task[None]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._saved_at = 0.0
        self._orphans_at = 0.0
        self.accepting = False
        """False before the start and once the gateway ends."""

    async def start(self) -> None:
        self.accepting = True
        self._watcher = asyncio.create_task(self._watch_forever(), name="chat runner")

    async def stop(self) -> None:
        """Let answers finish for a while; then cut them, keeping what there is."""
        self.accepting = False
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=STOP_SECONDS)
        await asyncio.gather(*(run.cut() for run in self._runs.values()), return_exceptions=True)
        if self._tasks:
            _, late = await asyncio.wait(self._tasks.values(), timeout=AWAY_SECONDS * 3)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)

    def begin(self, job: Job) -> None:
        """Start to write an answer."""
        run = _Run(job, self._gateway, self._log)
        self._runs[job.message_id] = run
        task = asyncio.create_task(self._write(run), name=f"answer {job.message_id}")
        self._tasks[job.message_id] = task

    def stop_answer(self, message_id: uuid.UUID) -> None:
        """End an answer if it is written here; the flag in the database reaches the others."""
        run = self._runs.get(message_id)
        if run is not None:
            self._in_background(run.stop())

    async def _write(self, run: _Run) -> None:
        message_id = run.job.message_id
        try:
            await run.write()
            saved = await self._save_end(run)
            while not saved:
                # Readers know already; only the database does not.
                await asyncio.sleep(AWAY_SECONDS)
                saved = await self._save_end(run)
        finally:
            self._runs.pop(message_id, None)
            self._tasks.pop(message_id, None)
            self._log.release(message_id)

    async def _save_end(self, run: _Run) -> bool:
        draft = run.draft()
        title = ""
        saved = True
        try:
            title = await in_database(
                finish, gateway=self._gateway.name, message_id=run.job.message_id, draft=draft
            )
        except (DatabaseError, InterfaceError) as error:
            saved = False
            logger.warning(
                "an answer could not be saved (%s); it is tried again",
                type(error).__name__,
                extra={"event": "chat_save_failed", "request_id": run.job.request_id},
            )
        if run.answer.end is None:
            end: dict[str, Any] = {
                "state": draft.state.value,
                "prompt_tokens": draft.prompt_tokens,
                "completion_tokens": draft.completion_tokens,
                "ttft_ms": draft.ttft_ms,
                "duration_ms": draft.duration_ms,
            }
            if draft.error:
                end["error"] = draft.error
            if title:
                end["title"] = title
            self._log.finish(run.answer, end)
        return saved

    # -- stop flags, drafts, orphans

    async def _watch_forever(self) -> None:
        away = False
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                await self._watch()
                away = False
            except (DatabaseError, InterfaceError) as error:
                if not away:
                    logger.warning(
                        "answers cannot be saved (%s); they go on",
                        type(error).__name__,
                        extra={"event": "chat_database_away"},
                    )
                away = True
                # After a pause of everybody's, nobody is given up at once.
                self._orphans_at = time.monotonic() + 3 * ORPHANS_SECONDS
            except Exception:
                # A fault of ours must not leave answers unwatched.
                logger.exception("answers could not be watched", extra={"event": "chat_watch_failed"})

    async def _watch(self) -> None:
        name = self._gateway.name
        running = {id_: run for id_, run in self._runs.items() if not run.over}
        if running:
            for message_id in await in_database(stopped_among, gateway=name, running=running):
                self.stop_answer(message_id)
        now = time.monotonic()
        if running and now - self._saved_at >= SAVE_SECONDS - WATCH_SECONDS / 2:
            self._saved_at = now
            drafts = {id_: run.draft() for id_, run in running.items() if run.changed()}
            await in_database(save_drafts, gateway=name, drafts=drafts, alive=running)
            for id_, draft in drafts.items():
                running[id_].saved = len(draft.content)
        if now >= self._orphans_at:
            self._orphans_at = now + ORPHANS_SECONDS
            for message_id, length in await in_database(find_orphans, besides=list(self._runs)):
                more = await self._log.rest(message_id, length)
                await in_database(interrupt, message_id=message_id, more=more)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)


class _Run:
    """One answer being written: what `Generation` answers, instead of a client's connection."""

    def __init__(self, job: Job, gateway: Gateway, log: AnswerLog) -> None:
        self.job = job
        self.client_gone = False
        self.answer: Answer = log.begin(job.message_id)
        self.saved = -1
        """How much of it the database has."""
        self.over = False
        self._log = log
        self._generation = Generation(gateway, self, on_wait=self.answer.wait)
        self._task: asyncio.Task[None] | None = None
        self._began = time.monotonic()
        self._first_at: float | None = None
        self._ended_at: float | None = None
        self._batch: list[str] = []
        self._batch_length = 0
        self._passed_on_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._complete = False
        self._stopped = False
        self._error = ""

    async def write(self) -> None:
        """Returns when the answer has ended, one way or another."""
        generation = self._generation.run_as(self.job.key, self.job.body, request_id=self.job.request_id)
        self._task = asyncio.create_task(generation)
        if self._stopped:
            self._task.cancel()
        try:
            await self._task
        except asyncio.CancelledError:
            if not self._stopped:
                self._error = INTERRUPTED
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    self._task.cancel()
                    await asyncio.gather(self._task, return_exceptions=True)
        except Exception as error:
            status, payload, _ = answer_to(error)
            if status == 500:
                logger.error(
                    "an answer failed by a fault of ours",
                    exc_info=error,
                    extra={"event": "chat_failed", "request_id": self.job.request_id},
                )
            self._error = payload["error"]["message"]
        finally:
            self._pass_on()
            self._ended_at = time.monotonic()
            self.over = True

    async def stop(self) -> None:
        """The person wants no more of it."""
        if not self._stopped and not self.over:
            self._stopped = self.client_gone = True
            await self.cut()

    async def cut(self) -> None:
        """Tell the worker while its connection is open, for then it says what it had cost; and end."""
        await self._generation.client_left()
        if self._task is not None:
            self._task.cancel()

    def changed(self) -> bool:
        return len(self.answer.text) != self.saved

    def draft(self) -> Draft:
        prompt, completion = self._generation.tokens
        return Draft(
            content=self.answer.text,
            prompt_tokens=prompt or None,
            completion_tokens=completion if prompt else None,
            ttft_ms=self._milliseconds(self._first_at),
            duration_ms=self._milliseconds(self._ended_at),
            state=self._state(),
            error="" if self._stopped or self._complete else self._error,
        )

    def _state(self) -> MessageState:
        if not self.over:
            return MessageState.GENERATING
        if self._complete:
            return MessageState.COMPLETE
        if self._stopped:
            return MessageState.STOPPED
        if not self._error:
            self._error = INTERNAL_ERROR
        return MessageState.INTERRUPTED if self.answer.text else MessageState.FAILED

    def _milliseconds(self, instant: float | None) -> int | None:
        return None if instant is None else round((instant - self._began) * 1000)

    # -- what Generation calls

    async def send_json(self, status: int, payload: object) -> None:
        """Only asked for when no stream was: never."""
        raise AssertionError("an answer in the chat is always a stream")

    async def stream_start(self, prompt_tokens: int = 0) -> None:
        """Readers need no start."""

    async def stream_events(self, events: Sequence[bytes]) -> None:
        for event in events:
            self._read(event)

    def _read(self, chunk: bytes) -> None:
        try:
            event = _decode(chunk[len(b"data: ") :])
        except (msgspec.DecodeError, UnicodeDecodeError):
            logger.warning(
                "a worker sent a chunk that is none; it was left out",
                extra={"event": "chat_chunk_dropped", "request_id": self.job.request_id},
            )
            return
        for choice in event.choices:
            if choice.delta.content:
                self._take(choice.delta.content)

    async def stream_end(self, chunk: bytes = b"") -> None:
        if chunk.startswith(b"data: [DONE]"):
            self._complete = True
            return
        try:
            self._error = msgspec.json.decode(chunk[len(b"data: ") :])["error"]["message"]
        except (msgspec.DecodeError, KeyError, TypeError):
            self._error = INTERNAL_ERROR

    # -- batches

    def _take(self, text: str) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
        # No database's text holds NUL; of the same length, so that places stay places.
        self._batch.append(text.replace("\x00", "\ufffd"))
        self._batch_length += len(text)
        due = self._passed_on_at + BATCH_SECONDS
        if self._batch_length >= BATCH_CHARACTERS or now >= due:
            self._pass_on()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(due - now, self._pass_on)

    def _pass_on(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._batch:
            self._passed_on_at = time.monotonic()
            text = "".join(self._batch)
            self._batch.clear()
            self._batch_length = 0
            self._log.append(self.answer, text)


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []


_decode = msgspec.json.Decoder(_Chunk).decode
