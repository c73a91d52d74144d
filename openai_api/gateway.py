"""A gateway process's parts, made once and handed to the consumers."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from inference.beats import BeatBook
from inference.client import WorkerClient
from inference.dispatch.dispatcher import Dispatcher
from inference.dispatch.explanations import LATEST
from inference.dispatch.fleet import Fleet
from inference.once import Once
from openai_api import limits
from openai_api.admission import Admission
from openai_api.auth import Key, KeyRing
from openai_api.errors import StorageAway
from openai_api.guard import Cuttable, KeyGuard
from openai_api.keep_alive import KeepAlive
from openai_api.metrics import Meter
from registry.rights import Network
from registry.spool import Spool

logger = logging.getLogger("roundhouse.gateway")

KEEP_ALIVE_SECONDS = 10.0
"""A stream that said nothing for so long gets a comment, at the latest after twice this."""

SETTLE_SECONDS = 5.0
"""How long an ending gateway waits for requests that were cut to write down what they cost."""


class Limited(Protocol):
    """An open request that some limit counts."""

    def true_up(self) -> None: ...


class Gateway:
    """Belongs to the event loop that starts it. `start` may be called by many at once and often."""

    def __init__(
        self,
        *,
        data: Path,
        peppers: Mapping[int, bytes],
        proxies: tuple[Network, ...] = (),
        redis_url: str | None = None,
    ) -> None:
        self.name = f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(3)}"
        self.loop: asyncio.AbstractEventLoop | None = None
        """Where it runs; None before the start and after the end."""
        self.started = False
        self.ending = False
        """It answers what it is asked, and tells load balancers to ask others."""
        self.ready_asked_at = float("-inf")
        """When somebody last asked whether it is ready."""
        self.fleet = Fleet()
        self.dispatcher = Dispatcher(self.fleet)
        self.explanations = LATEST
        self.client = WorkerClient()
        self.fleet.on_refresh(lambda: self.client.break_off(self.fleet.is_gone))
        self.beats = BeatBook(self.fleet, name=self.name)
        self.meter = Meter()
        self.keys = KeyRing(peppers, away_seconds=lambda: self.fleet.database_away_seconds, proxies=proxies)
        self.fleet.subscribe("api_key", self.keys.forget)
        self.admission = Admission(redis_url)
        self.guard = KeyGuard(self.keys)
        self.fleet.subscribe("api_key", self.guard.suspect)
        self._guarding: asyncio.Task[None] | None = None
        self.waiting = KeepAlive(KEEP_ALIVE_SECONDS)
        """Open streams, told every `KEEP_ALIVE_SECONDS`."""
        self.limited: set[Limited] = set()
        """Open requests that some limit counts."""
        self._ticking: asyncio.Task[None] | None = None
        self._truing: asyncio.Task[None] | None = None
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._data = data
        self._spool: Spool | None = None
        self._once = Once(self._start)

    @property
    def spool(self) -> Spool:
        """The ledger's way in. Raises StorageAway before the start and after the end."""
        if self._spool is None:
            raise StorageAway
        return self._spool

    @property
    def active(self) -> int:
        """Requests that are being answered."""
        return self._active

    def enter(self, request: Cuttable, key: Key) -> None:
        """A request was admitted; `leave` follows when it is settled. If its key ends before, it is cut."""
        self._active += 1
        self._idle.clear()
        self.guard.enter(request, key)

    def leave(self, request: Cuttable, key: Key) -> None:
        self.guard.leave(request, key)
        self._active -= 1
        if not self._active:
            self._idle.set()

    async def start(self) -> None:
        """Returns when the fleet is known (if the database answers) and requests can be served."""
        if not self.started:
            await self._once()

    async def _start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._spool = Spool(self._data / "spool", self.name)
        await self._spool.start()
        await self.client.start()
        await self.fleet.start()
        await self.beats.start()
        await self.admission.start()
        self._ticking = asyncio.create_task(self.waiting.run(), name="keep-alive")
        self._truing = asyncio.create_task(self._true_up(), name="limits true-up")
        self._guarding = asyncio.create_task(self.guard.run(), name="key guard")
        self.started = True
        logger.info("gateway started", extra={"event": "gateway_started", "gateway": self.name})

    async def _true_up(self) -> None:
        while True:
            await asyncio.sleep(limits.TRUE_UP_SECONDS)
            for request in self.limited:
                request.true_up()

    async def stop(self) -> None:
        """Settle what was cut, bring the ledger's entries in as far as the database takes them, and end."""
        if not self.started:
            return
        self.started = False
        try:
            await asyncio.wait_for(self._idle.wait(), SETTLE_SECONDS)
        except TimeoutError:
            logger.warning("requests were cut", extra={"event": "requests_cut", "requests": self._active})
        if self._ticking is not None:
            self._ticking.cancel()
        if self._truing is not None:
            self._truing.cancel()
        if self._guarding is not None:
            self._guarding.cancel()
        await self.beats.stop()
        await self.keys.stop()
        await self.admission.stop()
        await self.client.close()
        await self.spool.stop()
        await self.fleet.stop()
        self._spool = None
        self._once.forget()
        self.loop = None
        logger.info("gateway stopped", extra={"event": "gateway_stopped", "gateway": self.name})
