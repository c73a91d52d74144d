"""A worker that answers with whatever bytes a test tells it to, on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

Answer = Callable[["Asked"], AsyncIterator[bytes]]
"""Makes the pieces that are sent, one write each. When it ends the connection is closed."""

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
)
LAST = b"0\r\n\r\n"


class Asked:
    """A request that it got."""

    def __init__(self, request_id: str, body: dict[str, Any]) -> None:
        self.request_id = request_id
        self.body = body

    def event(self, text: str, count: int, *, usage_only: bool = False, **more: Any) -> bytes:
        """An event of a chat's answer as our engines write it, in a chunk of its own."""
        choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None} | more
        usage = {"prompt_tokens": 4, "completion_tokens": count, "total_tokens": 4 + count}
        about = {"id": f"chatcmpl-{self.request_id}", "object": "chat.completion.chunk", "created": 1}
        told = about | {"model": "sim", "choices": [] if usage_only else [choice], "usage": usage}
        return chunk(
            b"data: " + json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
        )


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Liar:
    def __init__(self) -> None:
        self.url = ""
        self.answer: Answer | None = None
        self.asked: list[Asked] = []
        self.aborted: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A cancelled one would be reported as an error.
        ends = ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError
        with contextlib.suppress(*ends), contextlib.closing(writer):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                lines = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
                body = json.loads(await reader.readexactly(int(lines["content-length"])))
                if head.startswith("post /abort "):
                    self.aborted.append(body["request_id"])
                    writer.write(
                        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
                    )
                    continue
                asked = Asked(lines["x-request-id"], body)
                self.asked.append(asked)
                assert self.answer is not None
                async for piece in self.answer(asked):
                    writer.write(piece)
                    await writer.drain()
                break


@contextlib.contextmanager
def liar() -> Iterator[Liar]:
    one = Liar()
    listener = socket.create_server(("127.0.0.1", 0))
    one.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    loop = asyncio.new_event_loop()
    ending = asyncio.Event()

    async def run() -> None:
        server = await asyncio.start_server(one.serve, sock=listener)
        await ending.wait()
        server.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await asyncio.sleep(0.01)  # the transports close in the next rounds of the loop

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), name="liar")
    thread.start()
    try:
        yield one
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join(10)
        loop.close()
