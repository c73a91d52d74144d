"""The only file that talks to workers for a gateway: pooled connections, streams taken apart into events."""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from functools import lru_cache, partial
from urllib.parse import urlsplit

import msgspec

from inference.connections import (
    Address,
    Answer,
    AnswerFailed,
    BrokenOff,
    CannotConnect,
    Connections,
    NothingCame,
)
from inference.dispatch.views import Timeouts, WorkerView
from inference.errors import InferenceError, WorkerBroke, WorkerRefused, WorkerUnreachable
from inference.protocol import AbortReply, AbortRequest
from inference.sse import DONE, BadStream, EventSplitter

logger = logging.getLogger("roundhouse.client")

USUAL = Timeouts()
GONE_SILENCE_SECONDS = 5.0
"""What says nothing for so long, and comes from a worker that counts as gone, is waited for no longer."""
ABORT_SECONDS = 1.0
PROBE_SECONDS = 0.5
LATE_SECONDS = 10.0
"""For a connection to a worker that is there, where this process was too busy to see it in time."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024
MAX_REFUSAL_BYTES = 64 * 1024

# 4xx that say something of the worker or of our secret, not of the request: another may take it.
NOT_THE_REQUESTS_FAULT = frozenset({401, 403, 407, 408, 421, 425, 429})

# A connection that failed because this process has run out of something says nothing of the worker.
OUR_OWN_FAULT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})

_decode_abort = msgspec.json.Decoder(AbortReply).decode


class WorkerClient:
    """One pool of connections to all workers. Belongs to the event loop that started it."""

    def __init__(self, usual: Timeouts = USUAL) -> None:
        """`usual`: for requests that bring none of their own."""
        self._usual = usual
        self._connections: Connections | None = None
        self._probes: dict[int, asyncio.Future[bool]] = {}
        """Workers, by id, of which it is asked whether they are there."""
        self._open: dict[int, set[Answer]] = {}
        """Answers that are not complete, by worker id."""

    async def start(self) -> None:
        if self._connections is None:
            self._connections = Connections()

    async def close(self) -> None:
        connections, self._connections = self._connections, None
        if connections is not None:
            await connections.close()

    def break_off(self, gone: Callable[[int], bool]) -> None:
        """End the waiting for what silent workers have not sent, those whose id is `gone`. An answer that
        is still coming is left alone: whom others do not hear may well be heard here."""
        silent = asyncio.get_running_loop().time() - GONE_SILENCE_SECONDS
        for worker_id, answers in self._open.items():
            if gone(worker_id):
                for answer in answers:
                    if answer.heard_at < silent:
                        answer.fail(BrokenOff("its worker is gone"))

    async def complete(
        self, worker: WorkerView, path: str, body: bytes, *, request_id: str, timeouts: Timeouts | None = None
    ) -> bytes:
        """The worker's whole JSON answer. Raises WorkerUnreachable or WorkerRefused."""
        answer = await self._ask(worker, path, body, request_id, timeouts or self._usual)
        try:
            _expect(answer, worker, "application/json")
            whole = await answer.read_all(MAX_ANSWER_BYTES)
        except AnswerFailed as error:
            raise WorkerUnreachable(
                f"{worker.name} broke off its answer ({error}) before anything of it was used."
            ) from error
        finally:
            self._end(worker, answer)
        if whole is None:
            raise WorkerUnreachable(f"{worker.name} answered with more than {MAX_ANSWER_BYTES} bytes.")
        if not whole.lstrip().startswith(b"{"):
            raise WorkerUnreachable(f"{worker.name} answered with something that is no JSON object.")
        return whole

    async def stream(
        self, worker: WorkerView, path: str, body: bytes, *, request_id: str, timeouts: Timeouts | None = None
    ) -> AsyncGenerator[list[bytes]]:
        """Server-sent events as they come, all that came at once together: each `b"data: …"` on one line
        without its line end; the very last is `b"data: [DONE]"`. Comments and event names are left out.

        Closing the generator closes the connection, which ends the request on the worker. Raises
        WorkerUnreachable or WorkerRefused before the first event, WorkerBroke after it.
        """
        timeouts = timeouts or self._usual
        answer = await self._ask(worker, path, body, request_id, timeouts)
        beginning = b""
        handed_on = False
        try:
            _expect(answer, worker, "text/event-stream")
            splitter = EventSplitter()
            while piece := await answer.read():
                events = splitter.feed(piece)
                if not events:
                    continue
                if not handed_on:
                    beginning = _beginning(events[0], request_id, worker)
                wrong = _cut(events, beginning)
                if events:
                    ended = events[-1] == DONE
                    if ended:
                        answer.leave()
                    elif not handed_on:
                        # From here on it has to show life more often than while it thought about the prompt.
                        answer.bound_silence(timeouts.idle)
                    handed_on = True
                    yield events
                    if ended:
                        return
                if wrong is not None:
                    raise wrong
            raise BadStream("it ended without [DONE]")
        except (AnswerFailed, BadStream) as error:
            reason = f"{worker.name} broke off its stream: {error}."
            raise (WorkerBroke(reason) if handed_on else WorkerUnreachable(reason)) from error
        finally:
            self._end(worker, answer)

    async def abort(self, worker: WorkerView, request_id: str) -> AbortReply | None:
        """Tell the worker to stop generating. What the request had cost, or None within a second if it
        does not say. Never raises."""
        try:
            async with asyncio.timeout(ABORT_SECONDS):
                body = msgspec.json.encode(AbortRequest(request_id=request_id))
                answer = await self._opened().ask(
                    _address(worker.url),
                    _request(worker, "/abort", body, request_id),
                    connect=ABORT_SECONDS,
                    silence=ABORT_SECONDS,
                )
                try:
                    await answer.head()
                    told = await answer.read_all(MAX_REFUSAL_BYTES)
                finally:
                    answer.close()
                return _decode_abort(told) if answer.status == 200 and told else None
        except (AnswerFailed, OSError, ValueError, InferenceError) as error:
            logger.info(
                "event=abort_failed %s did not confirm an abort: %s",
                worker.name,
                str(error)[:200] or type(error).__name__,
                extra={"event": "abort_failed", "request_id": request_id, "worker_id": worker.id},
            )
            return None

    async def is_there(self, worker: WorkerView) -> bool:
        """Does it take a connection? For at most half a second; asked after a failure: a dead one takes none.

        In a thread: where this process has too much to do, what came in time is seen too late, and a worker
        that is well would be taken for dead.
        """
        probe = self._probes.get(worker.id)
        if probe is None:
            probe = asyncio.ensure_future(asyncio.to_thread(_takes_connections, worker.url))
            self._probes[worker.id] = probe
            probe.add_done_callback(lambda _: self._probes.pop(worker.id, None))
        return await asyncio.shield(probe)

    def _opened(self) -> Connections:
        if self._connections is None:
            raise WorkerUnreachable("The gateway is not started, or is ending.")
        return self._connections

    async def _ask(
        self, worker: WorkerView, path: str, body: bytes, request_id: str, timeouts: Timeouts
    ) -> Answer:
        """The answer once its headers are here and say 200; `_end` is to be called with it."""
        try:
            address, request = _address(worker.url), _request(worker, path, body, request_id)
        except ValueError as error:
            raise WorkerUnreachable(f"{worker.name} cannot be asked ({error}).", took_it=False) from error
        try:
            answer = await self._headed(worker, address, request, timeouts)
        except NothingCame:
            # Most likely an idle connection that it closed in this moment; nothing was answered.
            answer = await self._headed(worker, address, request, timeouts, again=True)
        if answer.status == 200:
            return answer
        try:
            await _refuse(answer, worker)
        finally:
            self._end(worker, answer)
        raise AssertionError("unreachable: _refuse raises")

    async def _headed(
        self, worker: WorkerView, address: Address, request: bytes, timeouts: Timeouts, *, again: bool = False
    ) -> Answer:
        """Raises NothingCame where it may be asked `again`, over a new connection."""
        silence = timeouts.first_token
        ask = partial(self._opened().ask, address, request, silence=silence, fresh=again)
        try:
            try:
                answer = await ask(connect=timeouts.connect)
            except CannotConnect as error:
                if error.errno is not None or not await self.is_there(worker):
                    raise
                answer = await ask(connect=LATE_SECONDS)
        except CannotConnect as error:
            raise WorkerUnreachable(
                f"{worker.name} cannot be connected to ({error}).",
                gone=error.errno not in OUR_OWN_FAULT,
                took_it=again,
            ) from error
        self._open.setdefault(worker.id, set()).add(answer)
        try:
            await answer.head()
        except BaseException as error:
            self._end(worker, answer)
            if isinstance(error, AnswerFailed) and (again or not isinstance(error, NothingCame)):
                raise WorkerUnreachable(f"{worker.name} gave no answer ({error}).") from error
            raise
        return answer

    def _end(self, worker: WorkerView, answer: Answer) -> None:
        """Nobody reads on. One that is not complete ends with its connection, and so on the worker."""
        answer.close()
        answers = self._open[worker.id]
        answers.remove(answer)
        if not answers:
            del self._open[worker.id]


def _cut(events: list[bytes], beginning: bytes) -> BadStream | None:
    """What is handed on is JSON, in whole characters, and of this answer: leaves the events that are, up to
    the first that is not, or to the end. Returns what is wrong with that one."""
    for at, event in enumerate(events):
        if event == DONE:
            del events[at + 1 :]
            return None
        if not event.startswith(beginning) and not event.startswith(b'data: {"error"'):
            del events[at:]
            return BadStream("it sent an event of another answer")
        try:
            if not event.isascii():
                event.decode()
            _skip(event[len(b"data: ") :])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            del events[at:]
            return BadStream("it sent an event that is no JSON")
    return None


_skip = msgspec.json.Decoder(msgspec.Raw).decode
"""Reads to the end, and makes nothing of it: that takes half a microsecond."""


def _beginning(event: bytes, request_id: str, worker: WorkerView) -> bytes:
    """How all events of an answer begin, where its id has ours in it; others may change theirs. Raises
    BadStream when it has another of ours."""
    found = _ID.match(event)
    if found is None:
        return b""
    if request_id.encode() in found[0]:
        return found[0]
    if b"-req_" in found[0] and worker.engine != "upstream":
        raise BadStream("it sent another answer")
    return b""


_ID = re.compile(rb'data: \{"id": ?"[^"]*"')


@lru_cache(maxsize=4096)
def _address(url: str) -> Address:
    """Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None or parts.port is None:
        raise ValueError("its URL has no http, host or port")
    return parts.hostname, parts.port


@lru_cache(maxsize=4096)
def _head(url: str, path: str, secret: str) -> bytes:
    host = urlsplit(url).netloc
    return (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {secret}\r\n"
        "Content-Type: application/json\r\nX-Request-Id: "
    ).encode("ascii")


def _request(worker: WorkerView, path: str, body: bytes, request_id: str) -> bytes:
    """Raises ValueError."""
    if not (request_id.isascii() and request_id.isprintable()):
        raise ValueError("its request id cannot stand in a header")
    head = _head(worker.url, path, worker.secret)
    return b"%b%b\r\nContent-Length: %d\r\n\r\n%b" % (head, request_id.encode(), len(body), body)


def _takes_connections(url: str) -> bool:
    """Blocks for half a second at most."""
    try:
        socket.create_connection(_address(url), timeout=PROBE_SECONDS).close()
    except OSError as error:
        return error.errno in OUR_OWN_FAULT
    except ValueError:
        return False  # no address
    return True


def _expect(answer: Answer, worker: WorkerView, content_type: str) -> None:
    if answer.content_type != content_type:
        raise WorkerUnreachable(f"{worker.name} answered with {answer.content_type[:80]}.")


async def _refuse(answer: Answer, worker: WorkerView) -> None:
    """Raise what a status other than 200 means."""
    status = answer.status
    if not 400 <= status < 500 or status in NOT_THE_REQUESTS_FAULT:
        raise WorkerUnreachable(f"{worker.name} answered {status}.")
    body = None
    with suppress(AnswerFailed):
        body = await answer.read_all(MAX_REFUSAL_BYTES)
    raise WorkerRefused(status, body or b"")
