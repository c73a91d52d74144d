"""The connection to Redis on which requests are admitted: one, shared by all, each reply to its caller.

redis-py's own costs 110 to 170 µs of CPU per command, which is more than all of an admission may; this one
costs 20. Replies come in the order of the commands, so many may be under way at once. A caller that is
cancelled leaves its place in the line: its reply is read and never reaches anybody else. Each reply also
carries its command's number; one that does not fit, or that does not come in time, ends the connection.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

from redis.asyncio.connection import SSLConnection, parse_url

PATIENCE_SECONDS = 0.1
"""How long a reply may take."""
GRACE_SECONDS = 0.01
"""Once more this long, for a loop that was too busy to read what had come."""
CONNECT_SECONDS = 1.0

Reply = list[int]


class RedisAway(Exception):
    """Redis did not answer, or not with what was asked. Whether it did what it was told is not known."""


class NoScript(RedisAway):
    """Redis does not know the script: it was restarted, or told to forget. Nothing was done."""


class _Waiting:
    __slots__ = ("due", "number", "orphan", "reply")

    def __init__(
        self,
        number: int | None,
        reply: asyncio.Future[Any],
        due: float,
        orphan: Callable[[Reply], None] | None,
    ) -> None:
        self.number = number
        self.reply = reply
        self.due = due
        self.orphan = orphan


def bulk(value: bytes) -> bytes:
    """One part of a command, as Redis reads it."""
    return b"$%d\r\n%b\r\n" % (len(value), value)


def command(*parts: bytes) -> bytes:
    return b"*%d\r\n%b" % (len(parts), b"".join(map(bulk, parts)))


class Line(asyncio.Protocol):
    """One connection. `lost` is called once, when it ends for whatever reason."""

    def __init__(self, lost: Callable[[Line], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[_Waiting] = deque()
        self._unread = b""
        self._timer: asyncio.TimerHandle | None = None
        self._warned = False
        self._number = 0

    # -- asking

    def next_number(self) -> int:
        """For a script's first argument."""
        self._number += 1
        return self._number

    async def ask(
        self, packed: bytes, number: int | None = None, orphan: Callable[[Reply], None] | None = None
    ) -> Any:
        """Send a command and return its reply. Raises RedisAway.

        `orphan` gets the reply if the caller is cancelled before it comes.
        """
        transport = self._transport
        if transport is None:
            raise RedisAway("The connection has ended.")
        reply = self._loop.create_future()
        self._waiting.append(_Waiting(number, reply, self._loop.time() + PATIENCE_SECONDS, orphan))
        if self._timer is None:
            self._timer = self._loop.call_later(PATIENCE_SECONDS, self._look)
        transport.write(packed)
        try:
            return await reply
        except asyncio.CancelledError:
            if orphan is not None and reply.done() and not reply.cancelled() and reply.exception() is None:
                # It had come, and the caller was cancelled before it could take it.
                orphan(reply.result())
            raise

    def end(self, why: str) -> None:
        """Leave the connection; whoever waits for a reply gets RedisAway."""
        transport, self._transport = self._transport, None
        if transport is None:
            return
        transport.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, deque()
        for one in waiting:
            if not one.reply.done():
                one.reply.set_exception(RedisAway(why))
        self._lost(self)

    def _look(self) -> None:
        self._timer = None
        if not self._waiting:
            return
        late = self._loop.time() - self._waiting[0].due
        if late < 0:
            self._warned = False
            self._timer = self._loop.call_later(-late, self._look)
        elif self._warned:
            self.end("Redis does not answer in time.")
        else:
            self._warned = True
            self._timer = self._loop.call_later(GRACE_SECONDS, self._look)

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.end("Redis closed the connection.")

    def data_received(self, data: bytes) -> None:
        unread = self._unread + data if self._unread else data
        at = 0
        try:
            while at < len(unread):
                reply, at_next = _read(unread, at)
                if at_next < 0:
                    break
                at = at_next
                self._answer(reply)
        except (ValueError, IndexError):
            self.end("Redis sent what is no reply.")
            return
        self._unread = unread[at:]

    def _answer(self, reply: Any) -> None:
        one = self._waiting.popleft()
        self._warned = False
        failed = isinstance(reply, RedisAway)
        if one.number is not None and not failed and (not isinstance(reply, list) or reply[0] != one.number):
            self.end("Redis sent another's reply.")
            if not one.reply.done():
                one.reply.set_exception(RedisAway("Redis sent another's reply."))
        elif one.reply.cancelled():
            if one.orphan is not None and not failed:
                one.orphan(reply)
        elif failed:
            one.reply.set_exception(reply)
        else:
            one.reply.set_result(reply)


def _read(data: bytes, at: int) -> tuple[Any, int]:
    """A reply and where it ends; a negative end when it has not all come yet."""
    end = data.find(b"\r\n", at)
    if end < 0:
        return None, -1
    kind, line, after = data[at], data[at + 1 : end], end + 2
    if kind == 58:  # :
        return int(line), after
    if kind == 42:  # *
        items = []
        for _ in range(int(line)):
            item, after = _read(data, after)
            if after < 0:
                return None, -1
            items.append(item)
        return items, after
    if kind == 36:  # $
        length = int(line)
        if length < 0:
            return None, after
        if len(data) < after + length + 2:
            return None, -1
        return data[after : after + length], after + length + 2
    if kind == 43:  # +
        return line, after
    if kind == 45:  # -
        return (NoScript if line.startswith(b"NOSCRIPT") else RedisAway)(
            line[:120].decode("utf-8", "replace")
        ), after
    raise ValueError(f"a reply cannot begin with {kind}")


async def connect(url: str, scripts: Sequence[str], lost: Callable[[Line], None]) -> Line:
    """A connection to the Redis at `url` that knows the scripts. Raises RedisAway or OSError."""
    facts = parse_url(url)
    loop = asyncio.get_running_loop()
    line = Line(lost)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            if "path" in facts:
                await loop.create_unix_connection(lambda: line, facts["path"])
            else:
                host, port = facts.get("host", "localhost"), facts.get("port", 6379)
                await loop.create_connection(lambda: line, host, port, ssl=_tls(facts))
    except TimeoutError as error:
        raise RedisAway("Redis takes no connection in time.") from error
    try:
        # Sent one after the other; the first that fails ends it.
        if facts.get("password"):
            user = [facts["username"].encode()] if facts.get("username") else []
            await line.ask(command(b"AUTH", *user, facts["password"].encode()))
        if facts.get("db"):
            await line.ask(command(b"SELECT", b"%d" % facts["db"]))
        for script in scripts:
            await line.ask(command(b"SCRIPT", b"LOAD", script.encode()))
    except BaseException:
        line.end("The connection could not be set up.")
        raise
    return line


def _tls(facts: dict[str, Any]) -> ssl.SSLContext | None:
    if facts.get("connection_class") is not SSLConnection:
        return None
    context = ssl.create_default_context(cafile=facts.get("ssl_ca_certs"), capath=facts.get("ssl_ca_path"))
    if facts.get("ssl_cert_reqs") == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if facts.get("ssl_certfile"):
        context.load_cert_chain(facts["ssl_certfile"], facts.get("ssl_keyfile"))
    return context
