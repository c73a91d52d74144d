"""A load generator that costs little: HTTP/1.1 over keep-alive connections, nothing parsed twice."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

OK = 200


@dataclass(slots=True)
class Seen:
    """One answer as its client saw it. Times are in seconds since the request was sent."""

    status: int
    head: bytes
    """Status line and headers, in lower case."""
    first: float = 0.0
    """When the first of the body came."""
    seconds: float = 0.0
    """When all of it was there."""
    events: int = 0
    """Of a stream, its last one included."""
    last: bytes = b""
    """The last piece of the body, as it came."""

    def header(self, name: str) -> str:
        """Empty without it."""
        _, found, rest = self.head.partition(f"\r\n{name}:".encode())
        return rest.partition(b"\r\n")[0].decode().strip() if found else ""


@dataclass
class Tally:
    """What the clients saw."""

    events: int = 0
    seconds: float = 0.0
    first_seconds: list[float] = field(default_factory=list)
    """Of answers, streams or not."""


class Target:
    """One endpoint, and the bytes of the request that is sent to it over and over."""

    def __init__(
        self, base_url: str, key: str, body: dict[str, object], *, path: str = "/chat/completions"
    ) -> None:
        address = urlsplit(base_url)
        assert address.hostname is not None
        self.host, self.port = address.hostname, address.port or 80
        payload = json.dumps(body).encode()
        self.request = (
            f"POST {address.path}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
            f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n"
        ).encode() + payload

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Connection]:
        connection = Connection(self)
        try:
            yield connection
        finally:
            connection.close()


class Connection:
    """One client, which asks one question after the other."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self) -> Seen:
        """Send the request and read the answer to its end, whatever its status is."""
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(self.target.host, self.target.port)
        started = time.perf_counter()
        self._writer.write(self.target.request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        seen = Seen(int(head[9:12]), head)
        if b"transfer-encoding: chunked" in head:
            await self._read_chunks(self._reader, seen, started)
        else:
            length = int(seen.header("content-length"))
            seen.last = await self._reader.readexactly(length)
            seen.first = time.perf_counter() - started
        seen.seconds = time.perf_counter() - started
        if b"\r\nconnection: close" in head:
            self.close()
        return seen

    @staticmethod
    async def _read_chunks(reader: asyncio.StreamReader, seen: Seen, started: float) -> None:
        while True:
            size = int(await reader.readuntil(b"\r\n"), 16)
            piece = await reader.readexactly(size + 2)
            if seen.first == 0.0:
                seen.first = time.perf_counter() - started
            if size == 0:
                return
            seen.events += piece.count(b"data: ")
            seen.last = piece

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


async def run(target: Target, *, requests: int, connections: int, spread: float = 0.0) -> Tally:
    """Send `requests` over `connections` connections, each one after the other. All must be answered.

    `spread`: the seconds over which the first of each connection are spread evenly.
    """
    tally = Tally()
    left = requests

    async def client(at: int) -> None:
        nonlocal left
        await asyncio.sleep(spread * at / connections)
        async with target.connected() as connection:
            while left > 0:
                left -= 1
                seen = await connection.ask()
                if seen.status != OK:
                    raise RuntimeError(f"the answer was {seen.head.splitlines()[0].decode()}")
                tally.events += seen.events
                tally.first_seconds.append(seen.first)

    started = time.perf_counter()
    await asyncio.gather(*[client(at) for at in range(connections)])
    tally.seconds = time.perf_counter() - started
    return tally
