"""A proxy between two parts that does to their bytes what a bad network does: it delays them, cuts them into
pieces, changes them, closes one direction, stops, or ends.

    with proxy_to(worker.url) as between:
        between.delay = 0.2
        ask(between.url)
        between.cut()
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit


def reset(connected: socket.socket) -> None:
    """Close with RST instead of FIN."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connected.close()


class Proxy:
    """One that runs. Its attributes may be set at any time and hold from the next piece on."""

    def __init__(self, host: str, port: int) -> None:
        self.delay = 0.0
        """Seconds that each piece waits."""
        self.piece = 65536
        """Bytes of the longest piece."""
        self.changed: Callable[[bytes], bytes] = bytes
        """What becomes of a piece of an answer."""
        self.url = ""
        self.connections = 0
        """Taken so far."""
        self._to = host, port
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()

    # -- called by tests

    def hold(self) -> None:
        """Nothing passes any more, in either direction, and nothing is closed: as if a cable were pulled,
        but that the kernel still confirms what it has room for."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def go_on(self) -> None:
        self._loop.call_soon_threadsafe(self._flowing.set)

    def cut(self) -> None:
        """Reset all connections, on both sides."""
        self._loop.call_soon_threadsafe(self._each, lambda client, server: (_abort(client), _abort(server)))

    def half_close(self) -> None:
        """Tell the servers that their clients will send nothing more."""
        self._loop.call_soon_threadsafe(self._each, lambda client, server: server.write_eof())

    # -- within the loop

    def _each(self, do: Callable[[asyncio.StreamWriter, asyncio.StreamWriter], object]) -> None:
        for client, server in tuple(self._pairs):
            do(client, server)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            from_server, to_server = await asyncio.open_connection(*self._to)
        except OSError:
            _abort(writer)
            return
        pair = writer, to_server
        self._pairs.add(pair)
        try:
            await asyncio.gather(
                self._pass(reader, to_server, bytes),
                self._pass(from_server, writer, lambda data: self.changed(data)),
            )
        except (OSError, asyncio.CancelledError):  # a cancelled one would be reported as an error
            for end in pair:
                _abort(end)
        finally:
            self._pairs.discard(pair)
            for end in pair:
                end.close()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, changed: Callable[[bytes], bytes]
    ) -> None:
        while data := await reader.read(self.piece):
            await asyncio.sleep(self.delay)
            await self._flowing.wait()
            writer.write(changed(data))
            await writer.drain()
        await self._flowing.wait()
        if writer.can_write_eof():
            writer.write_eof()

    async def _run(self, listener: socket.socket, ending: asyncio.Event) -> None:
        server = await asyncio.start_server(self._serve, sock=listener)
        await ending.wait()
        server.close()
        self._flowing.set()
        self._each(lambda client, upstream: (_abort(client), _abort(upstream)))
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await asyncio.sleep(0.01)  # the transports close in the next rounds of the loop


def _abort(writer: asyncio.StreamWriter) -> None:
    connected = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.contextmanager
def proxy_to(url: str) -> Iterator[Proxy]:
    """A proxy in front of the server at `url`, on a port of its own."""
    parts = urlsplit(url)
    proxy = Proxy(str(parts.hostname), int(parts.port or 80))
    listener = socket.create_server(("127.0.0.1", 0))
    proxy.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    ending = asyncio.Event()

    def run() -> None:
        asyncio.set_event_loop(proxy._loop)
        proxy._loop.run_until_complete(proxy._run(listener, ending))
        proxy._loop.close()

    thread = threading.Thread(target=run, name="proxy")
    thread.start()
    try:
        yield proxy
    finally:
        proxy._loop.call_soon_threadsafe(ending.set)
        thread.join(10)
