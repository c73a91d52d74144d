"""Connections to workers: HTTP/1.1 by httptools (llhttp's parser), pooled, and of a client no more than that
takes. aiohttp's does eight times the work for a short answer (docs/performance.md), and a gateway does little
else than this.

    AnswerFailed
    ├── CannotConnect   no connection came about: `errno` says why, None: it took too long
    ├── NothingCame     the connection ended before the first byte of an answer
    └── BrokenOff       it ended, fell silent or made no sense in mid-answer
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

import httptools

IDLE_SECONDS = 4.0
"""A connection that was idle for longer is not used again: the worker's server closes it (after 5 s), and a
request should not meet that."""
BUFFER_BYTES = 256 * 1024
"""What is read ahead of whoever reads an answer slowly; then its worker has to wait."""
HEAD_BYTES = 64 * 1024
FINISHING_SECONDS = 0.1
"""How long the very end of an answer is waited for once nobody reads it, so that its connection can be used
again."""

_OPTIONS = [
    # What a worker may send ahead of a client that reads slowly; left alone, the kernel would take megabytes.
    (socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES),
    # A machine that lost its power sends no FIN: noticed in 10 + 3 * 5 seconds instead of never.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
        if hasattr(socket, name)
    ),
]

Address = tuple[str, int]


class AnswerFailed(Exception):
    """Base of what keeps an answer from coming whole."""


class CannotConnect(AnswerFailed):
    """No connection came about. `errno` says why; None: it took too long."""

    def __init__(self, reason: str, errno: int | None = None) -> None:
        super().__init__(reason)
        self.errno = errno


class NothingCame(AnswerFailed):
    """The connection ended before the first byte of an answer."""


class BrokenOff(AnswerFailed):
    """The connection ended, fell silent or made no sense in mid-answer."""


class Answer:
    """What comes back for one request: first its head, then its body in pieces. One task reads it, and closes
    it whatever happens."""

    __slots__ = (
        "_connection",
        "_error",
        "_held",
        "_left",
        "_pieces",
        "_waiter",
        "chunked",
        "complete",
        "content_type",
        "heard_at",
        "length",
        "status",
    )

    def __init__(self, connection: Connection, now: float) -> None:
        self._connection = connection
        self.status = 0
        """Known after `head`."""
        self.content_type = ""
        """Without parameters, in small letters."""
        self.length: int | None = None
        self.chunked = False
        self.complete = False
        """All of it has come, though not all of it may have been read."""
        self.heard_at = now
        """When the last byte came, by the event loop's clock."""
        self._pieces: list[bytes] = []
        self._held = 0
        self._left = False
        self._error: AnswerFailed | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def head(self) -> None:
        """Returns when status and headers are here. Raises NothingCame or BrokenOff."""
        while not self.status:
            await self._news()

    async def read(self) -> bytes:
        """What has come since, at least a byte; b"" at the end. Raises BrokenOff once all that came before is
        read."""
        while not self._pieces:
            if self.complete:
                return b""
            await self._news()
        if len(self._pieces) == 1:
            piece = self._pieces.pop()
        else:
            piece = b"".join(self._pieces)
            self._pieces.clear()
        if self._held > BUFFER_BYTES:
            self._connection.go_on()
        self._held = 0
        return piece

    async def read_all(self, limit: int) -> bytes | None:
        """The rest of the body, or None as soon as it is longer than `limit`. Raises BrokenOff."""
        parts = []
        size = 0
        while piece := await self.read():
            size += len(piece)
            if size > limit:
                return None
            parts.append(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def bound_silence(self, seconds: float) -> None:
        """From here on it may be silent for so long."""
        if not self.complete:
            self._connection.bound_silence(seconds)

    def fail(self, error: AnswerFailed) -> None:
        """Whoever waits for more of it gets the error, once what has come is read."""
        if not self.complete and self._error is None:
            self._error = error
            self._wake()

    def close(self) -> None:
        """Nobody reads on. What is not complete ends with its connection, which tells the worker so."""
        if not self.complete and not self._left:
            self._connection.drop()

    def leave(self) -> None:
        """All that matters was read: the connection may be used again, if the end comes in a moment."""
        if not self.complete:
            self._left = True
            self._connection.finish_soon(self)

    # -- by its connection

    def begin(self, status: int) -> None:
        self.status = status
        self._wake()

    def add(self, piece: bytes) -> bool:
        """False: enough for now."""
        self._pieces.append(piece)
        self._held += len(piece)
        self._wake()
        return self._held <= BUFFER_BYTES

    def end(self) -> None:
        self.complete = True
        self._wake()

    async def _news(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Connection(asyncio.Protocol):
    """A connection to a worker, with at most one request on it."""

    def __init__(self, pool: Connections, address: Address) -> None:
        self._pool = pool
        self._address = address
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._head_bytes = 0
        self._silence = 0.0
        self._timer: asyncio.TimerHandle | None = None
        """Looks whether it is silent for too long. Put off rather than set anew for each byte."""
        self._waits = False
        """For whoever reads the answer."""
        self.idle_since = 0.0

    @property
    def usable(self) -> bool:
        return (
            self._transport is not None
            and not self._transport.is_closing()
            and self._loop.time() - self.idle_since < IDLE_SECONDS
        )

    def ask(self, request: bytes, silence: float) -> Answer:
        """Send a request, head and body; its answer may be silent for `silence` seconds."""
        if self._transport is None or self._answer is not None:
            raise AssertionError("a connection that has a request takes no other")
        self._head_bytes = 0
        answer = self._answer = Answer(self, self._loop.time())
        self.bound_silence(silence)
        self._transport.write(request)
        return answer

    def drop(self) -> None:
        """End it, whatever is on its way."""
        self._answer = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort()

    def finish_soon(self, answer: Answer) -> None:
        self._loop.call_later(FINISHING_SECONDS, self._drop_if_open, answer)

    def _drop_if_open(self, answer: Answer) -> None:
        if self._answer is answer:
            self.drop()

    # -- time

    def bound_silence(self, seconds: float) -> None:
        self._silence = seconds
        if self._answer is None:
            return
        due = self._answer.heard_at + seconds
        if self._timer is not None:
            if self._timer.when() <= due:
                return  # and will then see that there is time left
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._answer is None:
            return
        now = self._loop.time()
        if self._waits:
            self._answer.heard_at = now
        due = self._answer.heard_at + self._silence
        if due > now:
            self._timer = self._loop.call_at(due, self._look)
        else:
            # It may have begun to work: not the end of an idle connection, after which it is asked again.
            self._fail(BrokenOff(f"it was silent for {self._silence:g} s"))

    def go_on(self) -> None:
        """The answer was read: there is room again."""
        if self._waits and self._transport is not None and self._answer is not None:
            self._waits = False
            self._answer.heard_at = self._loop.time()
            self._transport.resume_reading()

    # -- by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer: socket.socket = transport.get_extra_info("socket")
        for level, option, value in _OPTIONS:
            peer.setsockopt(level, option, value)

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            self.drop()  # nobody asked it anything
            return
        answer.heard_at = self._loop.time()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            cause = error.__context__
            self._fail(
                cause if isinstance(cause, BrokenOff) else BrokenOff("it sent something that is no HTTP")
            )

    def connection_lost(self, error: Exception | None) -> None:
        self._pool.forget(self._address, self)
        answer = self._answer
        # It knows this object: a circle, which would wait for the collector.
        del self._parser
        if answer is None:
            self.drop()
            return
        if answer.status and answer.length is None and not answer.chunked and error is None:
            self.drop()
            answer.end()  # which the end of the connection marks
        else:
            self._fail((BrokenOff if self._head_bytes else NothingCame)("the connection was lost"))

    def _fail(self, error: AnswerFailed) -> None:
        answer = self._answer
        self.drop()
        if answer is not None:
            answer.fail(error)

    # -- by the parser

    def on_message_begin(self) -> None:
        if self._answer is None:
            raise BrokenOff("it sent more than one answer")
        self._head_bytes += 1

    def on_header(self, name: bytes, value: bytes) -> None:
        answer = cast(Answer, self._answer)
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > HEAD_BYTES:
            raise BrokenOff(f"its headers have more than {HEAD_BYTES} bytes")
        name = name.lower()
        if name == b"content-type":
            answer.content_type = value.partition(b";")[0].strip().lower().decode("latin-1")
        elif name == b"content-length":
            answer.length = int(value)
        elif name == b"transfer-encoding":
            answer.chunked = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:  # else: one that says that another comes
            cast(Answer, self._answer).begin(status)

    def on_body(self, piece: bytes) -> None:
        if not cast(Answer, self._answer).add(piece) and not self._waits and self._transport is not None:
            self._waits = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        answer = cast(Answer, self._answer)
        if not answer.status:
            return
        self._answer = None
        answer.end()
        if self._waits and self._transport is not None:
            self._waits = False
            self._transport.resume_reading()
        if self._parser.should_keep_alive():
            self.idle_since = self._loop.time()
            self._pool.put_back(self._address, self)
        else:
            self.drop()


class Connections:
    """The pool. Belongs to the event loop that uses it."""

    def __init__(self) -> None:
        self._idle: dict[Address, list[Connection]] = {}
        self._all: set[Connection] = set()

    async def ask(
        self, address: Address, request: bytes, *, connect: float, silence: float, fresh: bool = False
    ) -> Answer:
        """Send a request over an idle connection, or a new one within `connect` seconds; always a new one if
        it is to be `fresh`. Raises CannotConnect."""
        idle = None if fresh else self._idle.get(address)
        while idle:
            connection = idle.pop()
            if connection.usable:
                return connection.ask(request, silence)
            connection.drop()
        connection = Connection(self, address)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(connect):
                await loop.create_connection(cast(Any, lambda: connection), *address)
        except TimeoutError:
            raise CannotConnect(f"not within {connect:g} s") from None
        except OSError as error:
            raise CannotConnect(error.strerror or str(error), error.errno) from error
        self._all.add(connection)
        return connection.ask(request, silence)

    async def close(self) -> None:
        """End all connections, those with a request too."""
        for connection in list(self._all):
            connection.drop()
        await asyncio.sleep(0)  # in which they are lost

    # -- by connections

    def put_back(self, address: Address, connection: Connection) -> None:
        self._idle.setdefault(address, []).append(connection)

    def forget(self, address: Address, connection: Connection) -> None:
        self._all.discard(connection)
        idle = self._idle.get(address, [])
        if connection in idle:
            idle.remove(connection)
        if not idle:
            self._idle.pop(address, None)
