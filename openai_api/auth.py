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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from django.conf import settings
from django.db import Error as DatabaseError
from django.http import HttpRequest
from rest_framework.authentication import BaseAuthentication
from rest_framework.permissions import BasePermission
from rest_framework.request import Request as DrfRequest

from inference.http import credential_of
from openai_api.admission.rules import Rule, load_rules
from openai_api.errors import ForbiddenAddress, ForbiddenScope, MissingKey, StorageAway, WrongKey
from registry.actions.api_keys import note_key_use
from registry.actions.budgets import hard_budgets, route_budgets
from registry.keys import digest_key, public_id_of
from registry.models import ApiKey
from registry.querysets import owner_may_use
from registry.rights import (
    Address,
    Network,
    Priority,
    client_address,
    matches_route,
    parse_networks,
    within,
)
from registry.threads import in_database, read_from_database

if TYPE_CHECKING:
    from openai_api.gateway import Gateway

logger = logging.getLogger("roundhouse.auth")

KEYS_KEPT = 10_000
UNKNOWN_SECONDS = 2.0
"""An id that no key has is not looked up again for this long, nor a key for the sake of a wrong secret."""
AWAY_SECONDS = 60.0
"""A key seen before is believed this long after the database was last heard of."""
USE_NOTED_SECONDS = 60.0
"""`last_used_at` is written at most this often per secret."""
ALL: frozenset[str] = frozenset()
"""Nothing named: everything is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """One of the texts that prove a key."""

    id: int
    digest: str
    pepper: int
    expires_at: float | None = None

    def expired(self) -> bool:
        return self.expires_at is not None and time.time() >= self.expires_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An API key as requests need it. Truthy for DRF's permission, like a user that is logged in."""

    public_id: str
    name: str
    project_id: int
    project_name: str
    routes: frozenset[str]
    """Names of the routes that it may use, `*` for any characters; empty: every route."""
    expires_at: float | None
    """Seconds since the epoch."""
    revoked: bool
    """For good, or while its owner is disabled."""
    secrets: tuple[Secret, ...] = ()
    scopes: frozenset[str] = ALL
    """Groups of endpoints that it may use; empty: all."""
    cidrs: tuple[Network, ...] = ()
    """Where it may be used from; empty: everywhere."""
    project_routes: frozenset[str] = ALL
    project_scopes: frozenset[str] = ALL
    """What any key of the project may use at most."""
    priority: str = Priority.DEFAULT.value
    rules: tuple[Rule, ...] = ()
    """The limits that concern it."""
    budgets: tuple[int, ...] = ()
    """Numbers of the hard budgets that its requests may meet, those of routes among them."""
    budget_routes: Mapping[int, str] = field(default_factory=dict, hash=False)
    """Of these budgets, those that count one route only, and which."""

    is_authenticated = True

    def expired(self) -> bool:
        return self.expires_at is not None and time.time() >= self.expires_at

    def may_use(self, route: str) -> bool:
        return matches_route(self.routes, route) and matches_route(self.project_routes, route)

    @property
    def held_to_routes(self) -> bool:
        """False when it may use every route."""
        return bool(self.routes or self.project_routes)

    def budgets_for(self, route: str, base: str = "") -> tuple[int, ...]:
        """Numbers of the hard budgets that its requests of this route may meet; `base` is the route that it
        is an adapter of."""
        if not self.budget_routes:
            return self.budgets
        names = (route, base)
        return tuple(number for number in self.budgets if self.budget_routes.get(number, route) in names)

    def check(self, scope: str, address: Callable[[], Address | None]) -> None:
        """May it be used for this group of endpoints, from there? Raises ForbiddenAddress, ForbiddenScope.

        `address` is only asked where it matters.
        """
        if self.cidrs:
            client = address()
            if not within(client, self.cidrs):
                raise ForbiddenAddress(client)
        self.check_scope(scope)

    def check_scope(self, scope: str) -> None:
        """May it be used for this group of endpoints, wherever from? Raises ForbiddenScope."""
        if scope and (
            (self.scopes and scope not in self.scopes)
            or (self.project_scopes and scope not in self.project_scopes)
        ):
            raise ForbiddenScope(scope)


def load_key(public_id: str) -> Key | None:
    """Read a key from the database."""
    rows = ApiKey.objects.select_related("project", "owner").prefetch_related("secrets")
    row = rows.filter(public_id=public_id).first()
    if row is None:
        return None
    return Key(
        public_id=row.public_id,
        name=row.name,
        project_id=row.project_id,
        project_name=row.project.name,
        routes=frozenset(row.routes),
        expires_at=_seconds(row.expires_at),
        revoked=row.revoked_at is not None or not owner_may_use(row),
        secrets=tuple(
            Secret(
                id=secret.pk,
                digest=secret.digest,
                pepper=secret.pepper,
                expires_at=_seconds(secret.expires_at),
            )
            for secret in row.secrets.all()
        ),
        scopes=frozenset(row.scopes),
        cidrs=parse_networks(row.cidrs),
        project_routes=frozenset(row.project.routes),
        project_scopes=frozenset(row.project.scopes),
        priority=row.priority,
        rules=load_rules(
            api_key=row, public_id=row.public_id, project_id=row.project_id, user_id=row.owner_id
        ),
        budgets=hard_budgets(key_public_id=row.public_id, project_id=row.project_id, user_id=row.owner_id),
        budget_routes=route_budgets(),
    )


def _seconds(instant: datetime | None) -> float | None:
    return instant.timestamp() if instant is not None else None


def verify(text: str, key: Key | None, peppers: Mapping[int, bytes]) -> tuple[Key, Secret]:
    """The key, and which of its secrets `text` is, if it may be used now. Raises WrongKey."""
    if key is None or key.revoked or key.expired():
        raise WrongKey(text)
    for secret in key.secrets:
        pepper = peppers.get(secret.pepper)
        if pepper is None or secret.expired():
            continue
        if hmac.compare_digest(digest_key(text, pepper), secret.digest):
            return key, secret
    raise WrongKey(text)


class Asker(Protocol):
    """A request, as far as its key is concerned: see `inference.http.Request`."""

    @property
    def credential(self) -> str | None: ...

    client_address: str

    @property
    def forwarded_for(self) -> str: ...


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
        proxies: tuple[Network, ...] = (),
    ) -> None:
        self.proxies = proxies
        """Whose word on a client's address is taken."""
        self._peppers = peppers
        self._away_seconds = away_seconds
        self._load = load
        self._keys: OrderedDict[str, Key] = OrderedDict()
        self._salt = secrets.token_bytes(32)
        self._proofs: dict[str, tuple[Key, list[tuple[bytes, Secret]]]] = {}
        """By public id: the key as it was loaded, and digests of the texts that proved it."""
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self._reread: OrderedDict[str, float] = OrderedDict()
        """When a key may next be read again because of a wrong secret."""
        self._loading: dict[str, asyncio.Task[Key | None]] = {}
        self._noted: dict[str, dict[int, float]] = {}
        """When the use of a key's secrets was last written down."""
        self._notes: set[asyncio.Task[None]] = set()

    async def admit(self, request: Asker, scope: str) -> Key:
        """The key of a request, if it may be used for this group of endpoints from where it comes. Raises
        what `authenticate` raises."""
        return await self.authenticate(request.credential, scope, partial(self.address_of, request))

    def address_of(self, request: Asker) -> Address | None:
        """Who sent it, seen past trusted proxies."""
        forwarded = request.forwarded_for if self.proxies else ""
        return client_address(request.client_address, forwarded, self.proxies)

    async def authenticate(
        self,
        text: str | None,
        scope: str = "",
        address: Callable[[], Address | None] = lambda: None,
    ) -> Key:
        """The key that `text` is, if it may be used for `scope` from `address`. Raises MissingKey, WrongKey,
        ForbiddenAddress, ForbiddenScope or StorageAway."""
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
        try:
            proved = self._prove(text, key)
        except WrongKey:
            if key is None or key.revoked or not self._may_reread(public_id):
                raise
            # Perhaps it was rotated a moment ago, and this is the new secret.
            proved = self._prove(text, await self._find(public_id))
        proved.check(scope, address)
        return proved

    def _may_reread(self, public_id: str) -> bool:
        """At most once in a while: anybody can send wrong secrets of a key."""
        now = time.monotonic()
        if now < self._reread.get(public_id, 0.0):
            return False
        self._reread[public_id] = now + UNKNOWN_SECONDS
        self._reread.move_to_end(public_id)
        while len(self._reread) > KEYS_KEPT:
            self._reread.popitem(last=False)
        return True

    def _prove(self, text: str, key: Key | None) -> Key:
        # The same text for the same key needs no second HMAC, whose set-up costs ten times this digest.
        mark = hashlib.blake2b(text.encode(), key=self._salt).digest()
        proof = self._proofs.get(key.public_id) if key is not None else None
        if proof is not None and proof[0] is key:
            for known, secret in proof[1]:
                if hmac.compare_digest(known, mark):
                    if proof[0].revoked or proof[0].expired() or secret.expired():
                        raise WrongKey(text)
                    self._note_use(proof[0].public_id, secret.id)
                    return proof[0]
        proved, secret = verify(text, key, self._peppers)
        marks = proof[1] if proof is not None and proof[0] is proved else []
        self._proofs[proved.public_id] = (proved, [*marks, (mark, secret)])
        self._note_use(proved.public_id, secret.id)
        return proved

    def known(self, public_id: str) -> Key | None:
        """The key as it is cached."""
        return self._keys.get(public_id)

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
            task = self._loading[public_id] = asyncio.create_task(read_from_database(self._load, public_id))
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

    def _note_use(self, public_id: str, secret_id: int) -> None:
        now = time.monotonic()
        noted = self._noted.get(public_id)
        if noted is None:
            noted = self._noted[public_id] = {}
        if now - noted.get(secret_id, float("-inf")) < USE_NOTED_SECONDS:
            return
        noted[secret_id] = now
        task = asyncio.create_task(self._write_use(secret_id))
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    async def _write_use(self, secret_id: int) -> None:
        try:
            await in_database(note_key_use, secret_id=secret_id, at=datetime.now(UTC))
        except DatabaseError:
            # The next use after a minute writes it again.
            logger.info("last use of a key not noted", extra={"event": "key_use_not_noted"})


def _header(request: DrfRequest, name: bytes) -> bytes:
    # Django decoded the bytes that came as Latin-1.
    told: str = request.META.get(f"HTTP_{name.decode().upper().replace('-', '_')}", "")
    return told.encode("latin-1", "replace")


def sender_of(request: HttpRequest) -> Address | None:
    """Who sent a request that Django serves, seen past trusted proxies."""
    sent, proxies = request.META, settings.ROUNDHOUSE_TRUSTED_PROXIES
    return client_address(sent.get("REMOTE_ADDR", ""), sent.get("HTTP_X_FORWARDED_FOR", ""), proxies)


class ApiKeyAuthentication(BaseAuthentication):
    """The same check for DRF. Inside the gateway it asks the gateway's ring; elsewhere the database."""

    def authenticate(self, request: DrfRequest) -> tuple[Key, None]:
        # A view without a scope is open to no key that is held to some.
        scope: str = getattr(request.parser_context.get("view"), "scope", "none")

        address = partial(sender_of, request._request)
        text = credential_of(lambda name: _header(request, name))
        gateway = gateway_of(request)
        if gateway is not None and gateway.loop is not None:
            check = gateway.keys.authenticate(text, scope, address)
            return asyncio.run_coroutine_threadsafe(check, gateway.loop).result(timeout=30), None
        if text is None:
            raise MissingKey
        public_id = public_id_of(text)
        try:
            key = load_key(public_id) if public_id else None
        except DatabaseError as error:
            raise StorageAway from error
        proved, _ = verify(text, key, settings.ROUNDHOUSE_KEY_PEPPERS)
        proved.check(scope, address)
        return proved, None

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
