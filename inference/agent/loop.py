"""The agent's loop: tells the gateway what runs here, hears what should, and makes it so."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import msgspec

from inference.agent.copies import SOURCES_COMMAND, Copies
from inference.agent.identity import Identity
from inference.agent.inventory import inventory, version
from inference.agent.listener import listen
from inference.agent.processes import POLL_SECONDS, WORKER_COMMAND, Key, Workers
from inference.protocol import (
    BEAT_SECONDS,
    Assignment,
    Cause,
    CopyPhase,
    NodeOrders,
    NodeReport,
    Wish,
)

log = logging.getLogger(__name__)

RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0)
"""Pauses while the gateway does not answer; the last one repeats."""

REFUSED_SECONDS = 10.0
"""Between beats while the gateway does not know this node."""

ANSWER_SECONDS = 10.0
"""How long an answer to a beat may take."""

DRAIN_MARGIN_SECONDS = 10.0
"""A worker ends its own drain in time; this much later the agent no longer believes it."""

WITHOUT_WEIGHTS = frozenset({"simulated", "upstream"})
"""Engines that need no model files."""


class GatewayUnreachable(Exception):
    """No answer, or none that makes sense."""


class NodeRefused(Exception):
    """The gateway does not know this node's secret."""


class Agent:
    """One node's supervision. `run` it until cancelled; the workers stay."""

    def __init__(
        self,
        identity: Identity,
        *,
        data: Path,
        cache: Path,
        worker_command: Sequence[str] = WORKER_COMMAND,
        sources_command: Sequence[str] = SOURCES_COMMAND,
        beat_seconds: float = BEAT_SECONDS,
    ) -> None:
        self._identity = identity
        self._data = data
        self._workers = Workers(data, command=worker_command)
        self._copies = Copies(cache, self._copy_changed, command=sources_command)
        self._beat_seconds = beat_seconds
        self._orders = NodeOrders()
        self._wake = asyncio.Event()
        self._trouble = ""

    async def run(self) -> None:
        """Adopt what runs, then supervise. The gateway and the broker may come and go."""
        self._workers.adopt()
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS, connect=2.0)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch(), name="watch")
                tasks.create_task(self._beats(session), name="beats")
                if self._identity.broker_url is not None:
                    tasks.create_task(listen(self._data, self._nudged), name="listen")
        finally:
            await self._copies.close()
            self._workers.leave()

    async def _watch(self) -> None:
        while True:
            if self._workers.poll():
                self._wake.set()
            await asyncio.sleep(POLL_SECONDS)

    async def _beats(self, session: aiohttp.ClientSession) -> None:
        failures = 0
        while True:
            # Whatever happens from here on is news for the next beat.
            self._wake.clear()
            try:
                orders = await self._beat(session)
            except GatewayUnreachable as error:
                self._say(f"The gateway does not answer ({error}). What runs here goes on.")
                pause = RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)]
                failures += 1
                await asyncio.sleep(_spread(pause))
            except NodeRefused:
                self._say(
                    "The gateway does not know this node any more. What runs here goes on. "
                    "To join again, remove node/identity.json from the data folder and "
                    "run `manage.py node` with a new join token."
                )
                await asyncio.sleep(_spread(REFUSED_SECONDS))
            else:
                self._say("")
                failures = 0
                self._orders = orders
                self._report_what_is_asked_in_vain()
                self._carry_out()
                try:
                    async with asyncio.timeout(_spread(self._beat_seconds)):
                        await self._wake.wait()
                except TimeoutError:
                    continue

    async def _beat(self, session: aiohttp.ClientSession) -> NodeOrders:
        """Report once. What the report carried counts as told only when the gateway took it."""
        now = inventory()
        report = NodeReport(
            agent_pid=os.getpid(),
            version=version(),
            processes=self._workers.reports(),
            copies=self._copies.reports(),
            deleted=self._copies.deleted(),
            memory_bytes=now.memory_bytes,
            memory_free_bytes=now.memory_free_bytes,
            cores=now.cores,
        )
        try:
            async with session.post(
                f"{self._identity.url}/fleet/node",
                data=msgspec.json.encode(report),
                headers={
                    "authorization": f"Bearer {self._identity.bearer}",
                    "content-type": "application/json",
                },
                allow_redirects=False,
            ) as response:
                content = await response.read()
        except TimeoutError:
            raise GatewayUnreachable("it took too long") from None
        except aiohttp.ClientError as error:
            raise GatewayUnreachable(type(error).__name__) from None
        if response.status == 401:
            raise NodeRefused
        if not 200 <= response.status < 300:
            raise GatewayUnreachable(f"status {response.status}")
        try:
            orders = msgspec.json.decode(content, type=NodeOrders)
        except msgspec.DecodeError as error:
            raise GatewayUnreachable(f"orders that cannot be read: {error}") from None
        self._workers.accepted(report.processes)
        return orders

    def _report_what_is_asked_in_vain(self) -> None:
        """The gateway asks for what ended here: it missed, or lost, our telling so."""
        for assignment in self._orders.assignments:
            key = _key(assignment)
            if key in self._workers.ended:
                self._workers.report_again(key)
            elif assignment.wish is not Wish.RUN and key not in self._workers.running:
                self._workers.refuse(key, Cause.STOPPED, "It was stopped before it was started.")

    def _carry_out(self) -> None:
        """Make this machine what the last orders say. Doing it again changes nothing."""
        orders = {_key(assignment): assignment for assignment in self._orders.assignments}
        for key in [key for key in self._workers.running if key not in orders]:
            self._workers.ask(key, Wish.STOP)

        waiting: set[tuple[int, str]] = set()
        for key, assignment in orders.items():
            if key in self._workers.running:
                self._workers.ask(
                    key, assignment.wish, drain_seconds=assignment.drain_seconds + DRAIN_MARGIN_SECONDS
                )
            elif assignment.wish is Wish.RUN and key not in self._workers.ended:
                if self._start(key, assignment):
                    self._wake.set()
                else:
                    waiting.add((assignment.model.id, assignment.model.source))
        self._copies.keep_only(waiting)
        used = {(each.model.name, each.model.source) for each in orders.values()}
        self._copies.delete([copy for copy in self._orders.unwanted if (copy.name, copy.source) not in used])
        self._workers.prune(keep=orders.keys())

    def _start(self, key: Key, assignment: Assignment) -> bool:
        """Start a worker, or find that it cannot be; False while its model's files are not ready."""
        path = None
        if assignment.engine not in WITHOUT_WEIGHTS:
            copy = self._copies.want(assignment.model, key)
            if copy.task is not None:
                return False
            if copy.report.phase is CopyPhase.FAILED:
                self._workers.refuse(key, copy.report.cause or Cause.FETCH, copy.report.detail)
                return True
            path = copy.path
        self._workers.launch(
            assignment,
            model_path=path,
            gateway_url=self._identity.url,
            listen_host=self._identity.address,
        )
        return True

    def _copy_changed(self) -> None:
        self._carry_out()
        self._wake.set()

    def _nudged(self, generation: int) -> None:
        log.debug("Nudged: generation %d.", generation)
        self._wake.set()

    def _say(self, trouble: str) -> None:
        """Log what is wrong with the gateway once, and once that it is over."""
        if trouble == self._trouble:
            return
        if trouble:
            log.warning("%s", trouble)
        else:
            log.info("The gateway answers again.")
        self._trouble = trouble


def _key(assignment: Assignment) -> Key:
    return assignment.worker_id, assignment.epoch


def _spread(seconds: float) -> float:
    """± 20 %, so that many agents do not speak at once."""
    return seconds * random.uniform(0.8, 1.2)  # noqa: S311 - not a secret
