"""Rounds of keep-alive calls: each stream once, a few at a time."""

from __future__ import annotations

import asyncio
import time

from openai_api.keep_alive import PARTS, KeepAlive


class Stream:
    def __init__(self) -> None:
        self.called_at: list[float] = []

    def keep_alive(self) -> None:
        self.called_at.append(time.monotonic())


async def test_each_open_stream_is_called_once_a_round_and_not_all_together():
    kept = KeepAlive(0.5)
    streams = [Stream() for _ in range(3 * PARTS)]
    for stream in streams:
        kept.add(stream)
    task = asyncio.create_task(kept.run())
    while not all(len(stream.called_at) >= 2 for stream in streams):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    firsts = sorted(stream.called_at[0] for stream in streams)
    assert firsts[-1] - firsts[0] > 0.3, "spread over the round"
    assert all(len(stream.called_at) <= 4 for stream in streams)
    left = streams[0]
    kept.discard(left)
    kept.discard(left)
    before = len(left.called_at)
    await asyncio.sleep(0.7)
    assert len(left.called_at) == before
    task.cancel()
