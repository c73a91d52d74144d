"""Clients that ask for an answer with a word of their own, many at once, and leave in every way there is.
What each of them gets must be its own."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import re
import socket
import struct
from typing import Any

from tests.chaos.clients import request_of

NONCE = re.compile(rb"nonce-[0-9a-f]{12}")
SAID = re.compile(rb'"content":"((?:[^"\\]|\\.)*)"')
REQUEST_ID = re.compile(rb"req_[0-9a-f]{32}")

STAYING = "stays"
LEAVING = ("closes", "resets", "half-closes")


class Crowd:
    """`count` requests by `at_once` clients. `seen` counts what became of them; whatever is not as it should
    be is in `wrong`."""

    def __init__(self, port: int, key: str, model: str, *, seed: int, leaving: float = 0.4) -> None:
        self.seen: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.limited = 0
        """Answers that tell of a limit."""
        self.whole: set[str] = set()
        """The ids of requests that were answered whole."""
        self._address = "127.0.0.1", port
        self._key = key
        self._model = model
        self._random = random.Random(seed)
        self._leaving = leaving

    async def come(self, count: int, *, at_once: int = 64) -> None:
        numbers = iter(range(count))
        await asyncio.gather(*(self._client(numbers) for _ in range(at_once)))

    async def _client(self, numbers: Any) -> None:
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        for _ in numbers:
            if connection is None:
                connection = await asyncio.open_connection(*self._address)
            if not await self._ask(*connection):
                connection = None
        if connection is not None:
            connection[1].close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request. True: the connection can be used again."""
        choose = self._random
        nonce = f"nonce-{choose.getrandbits(48):012x}"
        tokens = choose.randint(1, 12)
        slow = " !slow 0.003" if choose.random() < 0.3 else ""
        stream = choose.random() < 0.6
        how = choose.choice(LEAVING) if choose.random() < self._leaving else STAYING
        words = f"!say {nonce} !tokens {tokens}{slow}"
        body = {"model": self._model, "messages": [{"role": "user", "content": words}], "stream": stream}
        writer.write(request_of(self._key, body))
        if how == STAYING:
            return await self._stay(reader, writer, nonce, tokens, stream)
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(choose.uniform(0, choose.choice((0.01, 0.05, 0.3)))):
                while part := await reader.read(65536):
                    received += part
        self._leave(writer, how)
        if how == "half-closes":
            # Whatever the gateway still says is read; it ends the connection by itself.
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(10):
                    while part := await reader.read(65536):
                        received += part
            writer.close()
        strange = set(NONCE.findall(received)) - {nonce.encode()}
        if strange:
            self.wrong.append(f"{nonce} {how} and was told {strange}")
        self.seen[f"{how} after {'some' if received else 'nothing'}"] += 1
        return False

    def _leave(self, writer: asyncio.StreamWriter, how: str) -> None:
        if how == "closes":
            writer.close()
        elif how == "half-closes":
            with contextlib.suppress(OSError):
                writer.write_eof()
        else:
            connected = writer.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _stay(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        nonce: str,
        tokens: int,
        stream: bool,
    ) -> bool:
        try:
            async with asyncio.timeout(60):
                head = await reader.readuntil(b"\r\n\r\n")
                if b"content-length: " in head:
                    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                    answer = await reader.readexactly(length)
                else:
                    answer = b""
                    while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
                        answer += (await reader.readexactly(size + 2))[:-2]
                    await reader.readexactly(2)
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            self.wrong.append(f"{nonce} got no whole answer: {type(error).__name__}")
            writer.close()
            return False
        said = b"".join(SAID.findall(answer)).decode()
        ids = set(REQUEST_ID.findall(head + answer))
        expected = " ".join([nonce] * tokens)
        if not head.startswith(b"HTTP/1.1 200 ") or said != expected or len(ids) != 1:
            self.wrong.append(f"{nonce}: {said!r} for {expected!r}, {ids}, {head[:60]!r}")
        elif stream and not answer.endswith(b"data: [DONE]\n\n"):
            self.wrong.append(f"{nonce} has no end")
        else:
            self.whole.add(ids.pop().decode())
        self.seen["answered whole"] += 1
        self.limited += b"\r\nx-ratelimit-limit-requests: 1000000000\r\n" in head
        return True
