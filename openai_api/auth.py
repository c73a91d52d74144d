"""Who sends a request: one check of API keys, for consumers and for DRF's views."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.db import Error as DatabaseError
from rest_framework.authentication import BaseAuthentication
from rest_framework.permissions import BasePermission
from rest_framework.request import Request as DrfRequest

from openai_api.errors import MissingKey, StorageAway, WrongKey
from registry.actions.api_keys import note_key_use
from registry.keys import digest_key, public_id_of
from registry.models import ApiKey
from registry.threads import in_database

if TYPE_CHECKING:
    from openai_api.gateway import Gateway

logger = logging.getLogger("roundhouse.auth")

KEYS_KEPT = 10_000
UNKNOWN_SECONDS = 2.0
"""An id that no key has is not looked up again for this long."""
AWAY_SECONDS = 60.0
"""A key seen before is believed this long after the database was last heard of."""
USE_NOTED_SECONDS = 60.0
"""`last_used_at` is written at most this often per key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An API key as requests need it. Truthy for DRF's permission, like a user that is logged in."""

    public_id: str
    name: str
    project_id: int
    project_name: str
    digest: str
    pepper: int
    routes: frozenset[str]
    """Names of the routes that it may use; empty: every route."""
    expires_at: float | None
    """Seconds since the epoch."""
    revoked: bool

    is_authenticated = True

    def expired(self) -> bool:
        return self.expires_at is not None and time.time() >= self.expires_at

    def may_use(self, route: str) -> bool:
        return not self.routes or route in self.routes


def load_key(public_id: str) -> Key | None:
    """Read a key from the database."""
    row = ApiKey.objects.select_related("project").filter(public_id=public_id).first()
    if row is None:
        return None
    return Key(
        public_id=row.public_id,
        name=row.name,
        project_id=row.project_id,
        project_name=row.project.name,
        digest=row.digest,
        pepper=row.pepper,
        routes=frozenset(row.routes),
        expires_at=row.expires_at.timestamp() if row.expires_at else None,
        revoked=row.revoked_at is not None,
    )


def verify(text: str, key: Key | None, peppers: Mapping[int, bytes]) -> Key:
    """The key, if `text` proves it and it may be used now. Raises WrongKey."""
    if key is None or key.revoked:
        raise WrongKey(text)
    pepper = peppers.get(key.pepper)
    if pepper is None or not hmac.compare_digest(digest_key(text, pepper), key.digest):
        raise WrongKey(text)
    if key.expired():
        raise WrongKey(text)
    return key


class KeyRing:
    """The keys that this gateway has seen. One event loop owns it.

    A key is loaded when it is first used, and forgotten when the change feed names it. While the
    database is away, keys in the ring are believed for a minute; others raise StorageAway.
    """

    def __init__(
        self,
        peppers: Mapping[int, bytes],
        *,
        away_seconds: Callable[[], float],
        load: Callable[[str], Key | None] = load_key,
    ) -> None:
        self._peppers = peppers
        self._away_seconds = away_seconds
        self._load = load
        self._keys: OrderedDict[str, Key] = OrderedDict()
        self._salt = secrets.token_bytes(32)
        self._proofs: dict[str, tuple[Key, bytes]] = {}
        """By public id: the key as it was loaded, and a digest of the text that proved it."""
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Key | None]] = {}
        self._noted: dict[str, float] = {}
        self._notes: set[asyncio.Task[None]] = set()

    async def authenticate(self, text: str | None) -> Key:
        """The key that `text` is. Raises MissingKey, WrongKey or StorageAway."""
        if text is None:
            raise MissingKey
        public_id = public_id_of(text)
        if public_id is None:
            raise WrongKey(text)
        key = self._keys.get(public_id)
        if key is None:
            key = await self._find(public_id)
        elif self._away_seconds() > AWAY_SECONDS:
            raise StorageAway
        else:
            self._keys.move_to_end(public_id)
        return self._prove(text, key)

    def _prove(self, text: str, key: Key | None) -> Key:
        # The same text for the same key needs no second HMAC, whose set-up costs ten times this digest.
        mark = hashlib.blake2b(text.encode(), key=self._salt).digest()
        proof = self._proofs.get(key.public_id) if key is not None else None
        if proof is None or proof[0] is not key or not hmac.compare_digest(proof[1], mark):
            proved = verify(text, key, self._peppers)
            self._proofs[proved.public_id] = (proved, mark)
        else:
            proved = proof[0]
            if proved.revoked or proved.expired():
                raise WrongKey(text)
        self._note_use(proved.public_id)
        return proved

    def forget(self, public_id: str) -> None:
        """What was cached of this key may be wrong; `*` means of every key."""
        if public_id == "*":
            self._keys.clear()
            self._proofs.clear()
            self._unknown.clear()
            self._loading.clear()
            return
        self._keys.pop(public_id, None)
        self._proofs.pop(public_id, None)
        self._unknown.pop(public_id, None)
        # An answer on its way was perhaps read before the change: its waiters get it, the ring does not.
        self._loading.pop(public_id, None)

    async def stop(self) -> None:
        """Wait for what is still being written."""
        if self._notes:
            await asyncio.wait(self._notes, timeout=2.0)

    async def _find(self, public_id: str) -> Key | None:
        if time.monotonic() < self._unknown.get(public_id, 0.0):
            return None
        task = self._loading.get(public_id)
        if task is None:
            # One query however many wait for it, and not cancelled with the one who asked first.
            task = self._loading[public_id] = asyncio.create_task(in_database(self._load, public_id))
        try:
            key = await asyncio.shield(task)
        except DatabaseError as error:
            logger.warning("an API key could not be looked up", extra={"event": "key_lookup_failed"})
            raise StorageAway from error
        finally:
            current = self._loading.get(public_id) is task
            if current and task.done():
                del self._loading[public_id]
        if current:
            self._keep(public_id, key)
        return key

    def _keep(self, public_id: str, key: Key | None) -> None:
        if key is not None:
            self._keys[public_id] = key
            while len(self._keys) > KEYS_KEPT:
                oldest, _ = self._keys.popitem(last=False)
                self._noted.pop(oldest, None)
                self._proofs.pop(oldest, None)
            return
        self._unknown[public_id] = time.monotonic() + UNKNOWN_SECONDS
        while len(self._unknown) > KEYS_KEPT:
            self._unknown.popitem(last=False)

    def _note_use(self, public_id: str) -> None:
        now = time.monotonic()
        if now - self._noted.get(public_id, float("-inf")) < USE_NOTED_SECONDS:
            return
        self._noted[public_id] = now
        task = asyncio.create_task(self._write_use(public_id))
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    async def _write_use(self, public_id: str) -> None:
        try:
            await in_database(note_key_use, public_id=public_id, at=datetime.now(UTC))
        except DatabaseError:
            # The next use after a minute writes it again.
            logger.info("last use of a key not noted", extra={"event": "key_use_not_noted"})


def bearer_of(authorization: str) -> str | None:
    """The token of an Authorization header's value; None if it carries none."""
    scheme, _, token = authorization.partition(" ")
    return (token.strip() or None) if scheme.lower() == "bearer" else None


class ApiKeyAuthentication(BaseAuthentication):
    """The same check for DRF. Inside the gateway it asks the gateway's ring; elsewhere the database."""

    def authenticate(self, request: DrfRequest) -> tuple[Key, None]:
        sent = request.META
        text = bearer_of(sent.get("HTTP_AUTHORIZATION", ""))
        text = text or sent.get("HTTP_X_API_KEY", "").strip() or sent.get("HTTP_API_KEY", "").strip() or None
        gateway = gateway_of(request)
        if gateway is not None and gateway.loop is not None:
            check = gateway.keys.authenticate(text)
            return asyncio.run_coroutine_threadsafe(check, gateway.loop).result(timeout=30), None
        if text is None:
            raise MissingKey
        public_id = public_id_of(text)
        try:
            key = load_key(public_id) if public_id else None
        except DatabaseError as error:
            raise StorageAway from error
        return verify(text, key, settings.ROUNDHOUSE_KEY_PEPPERS), None

    def authenticate_header(self, request: DrfRequest) -> str:
        # Without it DRF turns every 401 into a 403.
        return "Bearer"


class HasApiKey(BasePermission):
    """Whoever got through ApiKeyAuthentication."""

    def has_permission(self, request: DrfRequest, view: Any) -> bool:
        return isinstance(request.user, Key)


def gateway_of(request: DrfRequest) -> Gateway | None:
    """The gateway that serves this request; None outside one (Django's test client)."""
    gateway: Gateway | None = getattr(request._request, "scope", {}).get("gateway")
    return gateway
