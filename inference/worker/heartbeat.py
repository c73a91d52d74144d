"""Saying "still alive" to the gateway, and hearing what it wants."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress

import aiohttp
import msgspec

from inference.protocol import Beat, BeatOrder, BeatReply
from inference.worker.events import EventLog
from inference.worker.spec import WorkerSpec

_SPREAD = 0.2
_CONNECT_SECONDS = 2.0
_TOTAL_SECONDS = 4.0
_FINAL_SECONDS = 3.0
"""How long the last beat is tried; after that `end.json` tells the agent, and it tells the gateway."""

_FINAL_PAUSE_SECONDS = 0.3
_GONE = 410


class Heartbeat:
    """Posts beats until cancelled. An order arrives in `on_order`, which must not block."""

    def __init__(
        self,
        spec: WorkerSpec,
        session: aiohttp.ClientSession,
        log: EventLog,
        *,
        make: Callable[[], Beat],
        on_order: Callable[[BeatOrder], None],
    ) -> None:
        who = spec.assignment
        self._url = f"{spec.gateway_url.rstrip('/')}/fleet/worker"
        self._headers = {
            "Authorization": f"Bearer {who.worker_id}.{who.epoch}.{who.secret}",
            "Content-Type": "application/json",
        }
        self._interval = spec.beat_seconds
        self._session = session
        self._log = log
        self._make = make
        self._on_order = on_order
        self._now = asyncio.Event()
        self._heard_at = time.monotonic()
        self._heard = True
        self._epoch_over = False

    def silence_seconds(self) -> float:
        """How long ago a gateway last took a beat; counted from the start until one did."""
        return time.monotonic() - self._heard_at

    def soon(self) -> None:
        """Something changed that the gateway should know at once."""
        self._now.set()

    async def run(self) -> None:
        while True:
            self._now.clear()
            order = await self._post(self._make())
            if order is not None:
                self._on_order(order)
            spread = random.uniform(1 - _SPREAD, 1 + _SPREAD)  # noqa: S311 - spreads load, guards nothing
            # Not `wait_for`: on Python 3.11 it can swallow the cancellation that ends this loop.
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval * spread):
                    await self._now.wait()

    async def say_last(self, beat: Beat) -> None:
        """Try for a few seconds to have the end known."""
        deadline = time.monotonic() + _FINAL_SECONDS
        while not self._epoch_over:
            if await self._post(beat) is not None or time.monotonic() + _FINAL_PAUSE_SECONDS > deadline:
                return
            await asyncio.sleep(_FINAL_PAUSE_SECONDS)

    async def _post(self, beat: Beat) -> BeatOrder | None:
        """The gateway's order; None when no gateway took the beat."""
        timeout = aiohttp.ClientTimeout(total=_TOTAL_SECONDS, sock_connect=_CONNECT_SECONDS)
        problem: str
        try:
            async with self._session.post(
                self._url,
                data=msgspec.json.encode(beat),
                headers=self._headers,
                timeout=timeout,
                allow_redirects=False,
            ) as reply:
                if reply.status == _GONE:
                    self._epoch_over = True
                    return BeatOrder.EXIT
                if reply.status == 200:
                    answer = msgspec.json.decode(await reply.content.read(65536), type=BeatReply)
                    self._note(None)
                    return answer.order
                problem = f"status {reply.status}"
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            problem = type(error).__name__
        self._note(problem)
        return None

    def _note(self, problem: str | None) -> None:
        """Remember success, and log only when hearing turns into silence or back."""
        if problem is None:
            self._heard_at = time.monotonic()
            if not self._heard:
                self._log("heard_again")
        elif self._heard:
            self._log("unheard", problem=problem)
        self._heard = problem is None
