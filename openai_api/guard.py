"""Ends open requests whose key has ended: revoked, expired, its owner disabled."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from django.db import Error as DatabaseError

from inference.dispatch.fleet import FORGET_ALL
from openai_api.auth import Key, KeyRing
from openai_api.errors import KeyEnded
from registry.actions.api_keys import still_good
from registry.threads import read_from_database

GUARD_SECONDS = 1.0
"""How often it is looked whether the keys of open requests have expired."""


class Cuttable(Protocol):
    """An open request."""

    def cut(self, error: Exception) -> None: ...


@dataclass(slots=True)
class _Open:
    """The open requests of one key, or of one person's chats."""

    expires_at: float | None
    requests: set[Cuttable] = field(default_factory=set)

    def expired(self) -> bool:
        return self.expires_at is not None and time.time() >= self.expires_at


class KeyGuard:
    """The open requests of one gateway, by their keys. One event loop owns it."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys
        self._open: dict[str, _Open] = {}
        """By the public id of their key."""
        self._suspects: set[str] = set()
        """Keys with open requests that may have ended; asked of the database."""
        self._suspected = asyncio.Event()

    @property
    def idle(self) -> bool:
        """No request is open."""
        return not self._open

    def enter(self, request: Cuttable, key: Key) -> None:
        opened = self._open.get(key.public_id)
        if opened is None:
            opened = self._open[key.public_id] = _Open(key.expires_at)
        opened.requests.add(request)
        if self._keys.known(key.public_id) is not key:
            # It changed since it was asked for.
            self._suspects.add(key.public_id)

    def leave(self, request: Cuttable, key: Key) -> None:
        opened = self._open.get(key.public_id)
        if opened is not None:
            opened.requests.discard(request)
            if not opened.requests:
                del self._open[key.public_id]

    def suspect(self, public_id: str) -> None:
        """A key, or with `FORGET_ALL` every one, has changed."""
        if public_id == FORGET_ALL:
            self._suspects.update(self._open)
        elif public_id in self._open:
            self._suspects.add(public_id)
        else:
            return
        self._suspected.set()

    async def run(self) -> None:
        """Look after them until cancelled."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._suspected.wait(), GUARD_SECONDS)
            self._suspected.clear()
            # Perhaps it was prolonged, and the news is on its way: the database is asked.
            self._suspects.update(public_id for public_id, opened in self._open.items() if opened.expired())
            if self._suspects:
                await self._ask(frozenset(self._suspects))

    async def _ask(self, suspects: frozenset[str]) -> None:
        try:
            good = await read_from_database(still_good, suspects)
        except DatabaseError:
            # Asked again in a moment. What has expired has expired.
            for public_id in suspects:
                opened = self._open.get(public_id)
                if opened is not None and opened.expired():
                    self._cut(opened)
            await asyncio.sleep(GUARD_SECONDS)
            return
        self._suspects -= suspects
        for public_id in suspects:
            opened = self._open.get(public_id)
            if opened is None:
                continue
            if public_id not in good:
                self._cut(opened)
            else:
                ends = good[public_id]
                opened.expires_at = ends.timestamp() if ends else None

    def _cut(self, opened: _Open) -> None:
        for request in list(opened.requests):
            request.cut(KeyEnded())
