"""The engine of an upstream worker: it answers nothing itself, and knows how the server behind it is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from inference.engines.base import EngineSpec, LoadError
from inference.engines.upstream.arguments import read_arguments
from inference.engines.upstream.presets import PRESETS
from inference.engines.upstream.remote import Away, BadKey, Card, Remote
from inference.protocol import Cause, Load, Progress, Upstream

logger = logging.getLogger(__name__)

AWAY_SECONDS = 30.0
"""A server that has answered no look for so long is away: the worker ends, and the next one waits for it."""
_AGAIN_SECONDS = 2.0
"""Between looks at a server that does not answer."""
_NAMED = 10


class UpstreamEngine:
    """`inference.engines.base.Model` for a server of somebody else's."""

    def __init__(self, spec: EngineSpec) -> None:
        arguments = read_arguments(spec.arguments)
        self.capabilities = frozenset(arguments.capabilities or PRESETS[arguments.preset].capabilities)
        self.context_length = arguments.context_length or 0
        self.model = arguments.model or ""
        """What the server calls the model; known after `load`."""
        self.remote = Remote(arguments, spec.upstream or Upstream())
        self.running = 0
        """Requests that are with the server."""
        self.tokens = 0
        """Generated there so far."""
        self._steps = 0
        self._failure: LoadError | None = None
        self._doubt = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    async def load(self, progress: Callable[[Progress], None]) -> None:
        """Wait until the server is there, for as long as that takes. Raises LoadError."""
        await self.remote.open()
        waits = ""
        while True:
            try:
                cards = await self.remote.models()
                await self.remote.look()
                card = self._chosen(cards)
                break
            except Away as away:
                if str(away) != waits:
                    waits = str(away)
                    logger.warning("event=upstream_waited_for %s", away)
                    progress(Progress(step=f"waiting for the server: {away}"[:100], unit=""))
            await asyncio.sleep(_AGAIN_SECONDS)
        if not self.context_length:
            self.context_length = await self.remote.context_length(card)
        logger.info("event=upstream_found model=%s", self.model)
        self._watch = asyncio.create_task(self._look_after())

    def load_report(self) -> Load:
        # What the server does is not seen from here. That this loop runs is the sign of life; a server that
        # hangs is ended by the time limit of each request, and noticed by looking after it.
        self._steps += 1
        return Load(running=self.running, steps=self._steps, tokens=self.tokens)

    def healthy(self) -> bool:
        """Always; raises LoadError, which says why, when the server is away or refuses the key."""
        if self._failure is not None:
            raise self._failure
        return True

    def doubt(self, failure: LoadError | None = None) -> None:
        """A request made it likely that something is wrong: look soon, or end with `failure`."""
        self._failure = self._failure or failure
        self._doubt.set()

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        await self.remote.close()

    def _chosen(self, cards: list[Card] | None) -> Card | None:
        """What the server tells of the model to serve. Raises LoadError, or Away when it does not list its
        models now."""
        preset = self.remote.preset
        ids = [card["id"] for card in cards or () if isinstance(card.get("id"), str)]
        if not self.model:
            if cards is None and preset.lists_models:
                raise Away("it does not list its models now")
            if len(ids) != 1:
                raise LoadError(Cause.BAD_ARGUMENT, f"Set the argument 'model': {_served(ids)}")
            self.model = ids[0]
        if self.model not in ids and preset.lists_all and cards is not None:
            raise LoadError(Cause.BAD_ARGUMENT, f"The server does not serve {self.model!r}: {_served(ids)}")
        return next((card for card in cards or () if card.get("id") == self.model), None)

    async def _look_after(self) -> None:
        away_since: float | None = None
        while True:
            poll = self.remote.preset.poll_seconds
            doubted = await _set_within(self._doubt, poll if away_since is None else _AGAIN_SECONDS)
            self._doubt.clear()
            try:
                if doubted:
                    await self.remote.models()
                await self.remote.look()
            except BadKey as error:
                self._failure = error
            except (Away, LoadError) as away:
                # What would end a start may be a proxy's word while the server behind it is exchanged.
                away_since = away_since or time.monotonic()
                silent = time.monotonic() - away_since
                logger.warning("event=upstream_silent seconds=%.0f %s", silent, away)
                if silent >= AWAY_SECONDS:
                    self._failure = LoadError(Cause.LOST, f"The server is away: {str(away).rstrip('.')}.")
            else:
                away_since = None
            if doubted:  # many requests may doubt it at once
                await asyncio.sleep(_AGAIN_SECONDS)


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


def _served(ids: list[str]) -> str:
    if not ids:
        return "the server lists none."
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return f"the server lists {', '.join(one[:100] for one in ids[:_NAMED])}{more}."
