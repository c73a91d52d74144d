"""The only file that talks to workers: HTTP over pooled connections, server-sent events taken apart."""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import socket
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import aiohttp
import msgspec
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from inference.dispatch.views import WorkerView
from inference.errors import InferenceError, WorkerBroke, WorkerRefused, WorkerUnreachable
from inference.protocol import AbortReply, AbortRequest

logger = logging.getLogger("roundhouse.client")

CONNECT_SECONDS = 1.0
STREAM_GAP_SECONDS = 60.0
"""Longest silence of a worker within a stream."""
ANSWER_SECONDS = 600.0
"""Longest silence before a whole answer, or before the first byte of a streamed one (a long prompt)."""
ABORT_SECONDS = 1.0
PROBE_SECONDS = 1.0
IDLE_SECONDS = 4.0
"""A pooled connection is closed before the worker's server does it (5 s), so that a request does not
meet its closing."""
MAX_EVENT_BYTES = 1024 * 1024
MAX_ANSWER_BYTES = 64 * 1024 * 1024
MAX_REFUSAL_BYTES = 64 * 1024
LONG_BODY_BYTES = 1024 * 1024
DRAIN_SECONDS = 0.1
"""How long the end of a finished stream is waited for, so that its connection can be used again."""

DONE = b"data: [DONE]"

# 4xx that say something of the worker or of our secret, not of the request: another may take it.
NOT_THE_REQUESTS_FAULT = frozenset({401, 403, 407, 408, 421, 425, 429})

# A connection that failed because this process has run out of something says nothing of the worker.
OUR_OWN_FAULT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})

# A machine that lost its power sends no FIN: noticed in 10 + 3 * 5 seconds instead of never.
_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
        if hasattr(socket, name)
    ),
]

_decode_abort = msgspec.json.Decoder(AbortReply).decode


class WorkerClient:
    """One pool of connections to all workers. Belongs to the event loop that started it."""

    def __init__(
        self,
        *,
        connect_seconds: float = CONNECT_SECONDS,
        stream_gap_seconds: float = STREAM_GAP_SECONDS,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self._whole = aiohttp.ClientTimeout(
            total=None, sock_connect=connect_seconds, sock_read=answer_seconds
        )
        self._gap = stream_gap_seconds
        self._aborting = aiohttp.ClientTimeout(total=ABORT_SECONDS)
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0, keepalive_timeout=IDLE_SECONDS, socket_factory=_new_socket
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=self._whole,
                trust_env=False,
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            )

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def complete(self, worker: WorkerView, path: str, body: bytes, *, request_id: str) -> bytes:
        """The worker's whole JSON answer. Raises WorkerUnreachable or WorkerRefused."""
        response = await self._post(worker, path, body, request_id)
        try:
            _expect(response, worker, "application/json")
            answer = await _read(response, MAX_ANSWER_BYTES)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise WorkerUnreachable(
                f"{worker.name} broke off its answer ({_short(error)}) before anything of it was used."
            ) from error
        finally:
            response.close()
        if answer is None:
            raise WorkerUnreachable(f"{worker.name} answered with more than {MAX_ANSWER_BYTES} bytes.")
        if not answer.lstrip().startswith(b"{"):
            raise WorkerUnreachable(f"{worker.name} answered with something that is no JSON object.")
        return answer

    async def stream(
        self, worker: WorkerView, path: str, body: bytes, *, request_id: str
    ) -> AsyncGenerator[bytes]:
        """Server-sent events as they come, each `b"data: …"` on one line without its line end; the last
        is `b"data: [DONE]"`. Comments and event names are left out.

        Closing the generator closes the connection, which ends the request on the worker. Raises
        WorkerUnreachable or WorkerRefused before the first event, WorkerBroke after it.
        """
        response = await self._post(worker, path, body, request_id)
        handed_on = False
        try:
            _expect(response, worker, "text/event-stream")
            with _ending_with_its_connection(response) as protocol:
                if protocol is not None:
                    # From here on it has to show life more often than while it thought about the prompt.
                    protocol.read_timeout = self._gap
                    protocol.start_timeout()
                events = EventSplitter()
                while chunk := await response.content.readany():
                    for event in events.feed(chunk):
                        yield event
                        handed_on = True
                        if event == DONE:
                            await _drain(response)
                            return
            raise BadStream("it ended without [DONE]")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = f"{worker.name} broke off its stream: {_short(error)}."
            raise (WorkerBroke(reason) if handed_on else WorkerUnreachable(reason)) from error
        finally:
            # After the end of the answer this is a no-op; the connection is back in the pool.
            response.close()

    async def abort(self, worker: WorkerView, request_id: str) -> AbortReply | None:
        """Tell the worker to stop generating. What the request had cost, or None within a second if it
        does not say. Never raises."""
        try:
            async with self._open_session().post(
                _url(worker.url, "/abort"),
                data=msgspec.json.encode(AbortRequest(request_id=request_id)),
                headers=_headers(worker, request_id),
                timeout=self._aborting,
                allow_redirects=False,
            ) as response:
                answer = await _read(response, MAX_REFUSAL_BYTES)
                return _decode_abort(answer) if response.status == 200 and answer else None
        except (aiohttp.ClientError, OSError, ValueError, InferenceError) as error:
            logger.info(
                "event=abort_failed %s did not confirm an abort: %s",
                worker.name,
                _short(error),
                extra={"event": "abort_failed", "request_id": request_id, "worker_id": worker.id},
            )
            return None

    async def is_there(self, worker: WorkerView) -> bool:
        """Does it take a connection? For at most a second; asked after a failure: a dead one takes none."""
        address = _url(worker.url, "")
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                _, writer = await asyncio.open_connection(address.host, address.port)
        except ValueError:
            return False  # no address
        except OSError as error:
            return isinstance(error, TimeoutError) or error.errno in OUR_OWN_FAULT
        writer.close()
        return True

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise WorkerUnreachable("The gateway is not started, or is ending.")
        return self._session

    async def _post(
        self, worker: WorkerView, path: str, body: bytes, request_id: str
    ) -> aiohttp.ClientResponse:
        """The response once its headers are here and say 200."""
        session = self._open_session()
        url, headers = _url(worker.url, path), _headers(worker, request_id)
        sent = False
        try:
            try:
                response = await session.post(
                    url, data=_payload(body), headers=headers, allow_redirects=False
                )
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                if not _met_closing(error):
                    raise
                # Most likely an idle connection that it closed in this moment; nothing was answered.
                sent = True
                response = await session.post(
                    url, data=_payload(body), headers=headers, allow_redirects=False
                )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            ours = isinstance(error, aiohttp.ClientConnectorError) and error.errno in OUR_OWN_FAULT
            raise WorkerUnreachable(
                f"{worker.name} cannot be connected to ({_short(error)}).", gone=not ours, took_it=sent
            ) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise WorkerUnreachable(
                f"{worker.name} gave no answer ({_short(error)}).", took_it=not isinstance(error, ValueError)
            ) from error
        if response.status == 200:
            return response
        await _refuse(response, worker)
        raise AssertionError("unreachable: _refuse raises")


class BadStream(ValueError):
    """What came is not a stream of server-sent events with a proper end."""


class EventSplitter:
    """Takes a byte stream apart into server-sent events, however it was cut."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that `chunk` completes. Raises BadStream for what is none, or longer than 1 MB."""
        data = self._rest + chunk if self._rest else chunk
        if b"\r" in data:
            # JSON never holds a bare carriage return; a "\r" at the very end waits for its "\n".
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise BadStream(f"it sent an event of more than {MAX_EVENT_BYTES} bytes")
        # Nearly every event is one line of data and passes as it is.
        if all(event.startswith(b"data: ") and b"\n" not in event for event in events):
            if any(len(event) > MAX_EVENT_BYTES for event in events):
                raise BadStream(f"it sent an event of more than {MAX_EVENT_BYTES} bytes")
            return events
        return [event for event in map(_one_line, events) if event]


def _one_line(event: bytes) -> bytes:
    """An event in its general form, as one line of data; empty if it has none."""
    if len(event) > MAX_EVENT_BYTES:
        raise BadStream(f"it sent an event of more than {MAX_EVENT_BYTES} bytes")
    data = []
    for line in event.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
        elif name not in (b"", b"event", b"id", b"retry"):
            raise BadStream("it sent something that is no server-sent event")
    # Within JSON a line break can only stand between tokens, where a space means the same.
    return b"data: " + b" ".join(data) if data else b""


@lru_cache(maxsize=4096)
def _url(base: str, path: str) -> URL:
    return URL(base + path)


def _headers(worker: WorkerView, request_id: str) -> dict[str, str]:
    return {
        "Authorization": f"Bearer {worker.secret}",
        "Content-Type": "application/json",
        "X-Request-Id": request_id,
    }


def _payload(body: bytes) -> bytes | io.BytesIO:
    """A long body goes out in pieces: aiohttp warns that one write of it would hold the event loop."""
    return body if len(body) < LONG_BODY_BYTES else io.BytesIO(body)


def _new_socket(address: tuple[Any, ...]) -> socket.socket:
    family, kind, protocol, _, _ = address
    new = socket.socket(family, kind, protocol)
    for level, option, value in _KEEPALIVE:
        new.setsockopt(level, option, value)
    return new


def _met_closing(error: aiohttp.ClientError) -> bool:
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return True
    return (
        isinstance(error, aiohttp.ClientOSError)
        and not isinstance(error, aiohttp.ClientConnectorError)
        and error.errno in (errno.ECONNRESET, errno.EPIPE)
    )


def _expect(response: aiohttp.ClientResponse, worker: WorkerView, content_type: str) -> None:
    if response.content_type != content_type:
        raise WorkerUnreachable(f"{worker.name} answered with {response.content_type[:80]}.")


async def _refuse(response: aiohttp.ClientResponse, worker: WorkerView) -> None:
    """Raise what a status other than 200 means."""
    try:
        status = response.status
        if not 400 <= status < 500 or status in NOT_THE_REQUESTS_FAULT:
            raise WorkerUnreachable(f"{worker.name} answered {status}.")
        body = None
        with suppress(aiohttp.ClientError, OSError):
            body = await _read(response, MAX_REFUSAL_BYTES)
        raise WorkerRefused(status, body or b"")
    finally:
        response.close()


_watched: WeakSet[asyncio.Future[None]] = WeakSet()


def _take_error(closed: asyncio.Future[None]) -> None:
    if not closed.cancelled():
        closed.exception()


@contextmanager
def _ending_with_its_connection(response: aiohttp.ClientResponse) -> Iterator[ResponseHandler | None]:
    """Have reads of the body fail when the connection is lost, whatever came before.

    aiohttp (3.14) does not tell them when its parser has failed at a broken chunk: they would wait for ever.
    """
    protocol = response.connection.protocol if response.connection is not None else None
    closed = protocol.closed if protocol is not None else None

    def lost(_: asyncio.Future[None] | None) -> None:
        content = response.content
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("the connection was lost"))

    if closed is None:
        lost(None)
        yield protocol
        return
    if closed not in _watched:
        # Its connection outlives this request, and may then be lost with an error that nobody asks for.
        _watched.add(closed)
        closed.add_done_callback(_take_error)
    closed.add_done_callback(lost)
    try:
        yield protocol
    finally:
        closed.remove_done_callback(lost)


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes | None:
    """The whole body, or None as soon as it is longer than `limit`."""
    parts = []
    size = 0
    with _ending_with_its_connection(response):
        while chunk := await response.content.readany():
            size += len(chunk)
            if size > limit:
                return None
            parts.append(chunk)
    return b"".join(parts)


async def _drain(response: aiohttp.ClientResponse) -> None:
    with suppress(aiohttp.ClientError, OSError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while not response.content.at_eof():
                await response.content.readany()


def _short(error: BaseException) -> str:
    return str(error)[:200] or type(error).__name__
