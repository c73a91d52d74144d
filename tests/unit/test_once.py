"""What many may ask to be started is started once."""

from __future__ import annotations

import asyncio

import pytest

from inference.once import Once


async def test_those_who_ask_together_share_one_start_and_later_ones_find_it_done() -> None:
    starts: list[int] = []

    async def start() -> None:
        starts.append(1)
        await asyncio.sleep(0.01)

    once = Once(start)
    await asyncio.gather(*[once() for _ in range(5)])
    await once()
    assert len(starts) == 1
    once.forget()
    await once()
    assert len(starts) == 2


async def test_a_start_that_fails_is_tried_again_by_the_next_who_asks() -> None:
    starts: list[int] = []

    async def start() -> None:
        starts.append(1)
        await asyncio.sleep(0.01)
        if len(starts) == 1:
            raise OSError("not yet")

    once = Once(start)
    told = await asyncio.gather(once(), once(), return_exceptions=True)
    assert [type(one) for one in told] == [OSError, OSError]
    await once()
    assert len(starts) == 2


async def test_who_stops_waiting_does_not_stop_the_start() -> None:
    done: list[int] = []

    async def start() -> None:
        await asyncio.sleep(0.05)
        done.append(1)

    once = Once(start)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(once(), 0.01)
    await once()
    assert done == [1]
