"""A load generator that costs little: HTTP/1.1 over keep-alive connections, nothing parsed twice."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Tally:
    """What the clients saw."""

    answers: int = 0
    chunks: int = 0
    seconds: float = 0.0
    first_chunk_seconds: list[float] = field(default_factory=list)


class Target:
    """One endpoint, and the bytes of the request that is sent to it over and over."""

    def __init__(self, base_url: str, key: str, body: dict[str, object]) -> None:
        address = urlsplit(base_url)
        assert address.hostname is not None
        self.host, self.port = address.hostname, address.port or 80
        payload = json.dumps(body).encode()
        self.request = (
            f"POST {address.path}/chat/completions HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
            f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n"
        ).encode() + payload
        self.stream = bool(body.get("stream"))

    async def ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tally: Tally) -> None:
        started = time.perf_counter()
        writer.write(self.request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the gateway answered {head.splitlines()[0].decode()}")
        if self.stream:
            await self._read_chunks(reader, tally, started)
        else:
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
        tally.answers += 1

    async def _read_chunks(self, reader: asyncio.StreamReader, tally: Tally, started: float) -> None:
        first = True
        while True:
            size = int(await reader.readuntil(b"\r\n"), 16)
            piece = await reader.readexactly(size + 2)
            if first:
                tally.first_chunk_seconds.append(time.perf_counter() - started)
                first = False
            if size == 0:
                return
            tally.chunks += piece.count(b"data: ")


async def run(target: Target, *, requests: int, connections: int) -> Tally:
    """Send `requests` over `connections` connections, each one after the other."""
    tally = Tally()
    left = requests

    async def client() -> None:
        nonlocal left
        reader, writer = await asyncio.open_connection(target.host, target.port)
        try:
            while left > 0:
                left -= 1
                await target.ask(reader, writer, tally)
        finally:
            writer.close()

    started = time.perf_counter()
    await asyncio.gather(*[client() for _ in range(connections)])
    tally.seconds = time.perf_counter() - started
    return tally
