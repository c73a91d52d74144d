"""What machines ask: is it alive, can it serve, how does it do."""

from __future__ import annotations

import asyncio
import hmac
import time
from http.cookies import CookieError, SimpleCookie
from importlib import import_module, metadata
from ipaddress import ip_address

import redis.asyncio
from django.conf import settings
from django.contrib.auth import get_user
from django.db import Error as DatabaseError
from django.http import HttpRequest
from django.http.request import split_domain_port
from redis.exceptions import RedisError

from inference.http import Header, HttpConsumer, Request, error_payload
from openai_api.consumers import ApiConsumer
from openai_api.gateway import Gateway
from openai_api.metrics import CONTENT_TYPE, render
from registry.threads import in_database

ASK_REDIS_SECONDS = 2.0
"""Redis is asked at most this often, however often we are."""
REDIS_TIMEOUT_SECONDS = 0.5
FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})


class RedisProbe:
    """Whether Redis answers, as of a moment ago."""

    def __init__(self, url: str | None) -> None:
        self._url = url
        self._asked_at = float("-inf")
        self._answer = "ok" if url else "not used"

    async def state(self) -> str:
        now = time.monotonic()
        if self._url and now - self._asked_at > ASK_REDIS_SECONDS:
            # Before the question: those who come meanwhile get the last answer.
            self._asked_at = now
            self._answer = await self._ask(self._url)
        return self._answer

    async def _ask(self, url: str) -> str:
        client = redis.asyncio.Redis.from_url(url)
        try:
            async with asyncio.timeout(REDIS_TIMEOUT_SECONDS):
                await client.ping()
        except (RedisError, OSError, TimeoutError):
            return "away"
        finally:
            await client.aclose()
        return "ok"


class Alive(ApiConsumer):
    """GET /healthz: the process answers."""

    methods = frozenset({"GET", "HEAD"})

    async def handle(self, request: Request) -> None:
        await self.send_json(200, {"status": "ok"})


class Ready(ApiConsumer):
    """GET /readyz: it can serve any key; 503 while it cannot, and when it is about to end.

    The database decides, and the spool, without which no request is begun. Without Redis all is served.
    """

    methods = frozenset({"GET", "HEAD"})

    def __init__(self, gateway: Gateway, redis: RedisProbe) -> None:
        super().__init__()
        self._gateway = gateway
        self._redis = redis

    async def handle(self, request: Request) -> None:
        self._gateway.ready_asked_at = time.monotonic()
        ending = self._gateway.ending
        away = self._gateway.fleet.database_away_seconds
        room = self._gateway.spool.has_room()
        status = "it is ending" if ending else "ok" if room else "the spool has no room"
        details = {
            "status": "the database does not answer" if away > 0 else status,
            "database": f"away for {away:.0f} s" if away > 0 else "ok",
            "redis": await self._redis.state(),
            "spool_pending": self._gateway.spool.pending,
        }
        await self.send_json(200 if room and not away and not ending else 503, details)


class Answering(HttpConsumer):
    """GET /health, as load balancers in front of vLLM ask it: nothing but a status, 503 while no worker can
    answer anything."""

    methods = frozenset({"GET", "HEAD"})

    def __init__(self, gateway: Gateway) -> None:
        super().__init__()
        self._gateway = gateway

    async def handle(self, request: Request) -> None:
        able = any(deployment.workers for deployment in self._gateway.fleet.deployments)
        await self._start(200 if able else 503, [(b"content-length", b"0"), (b"cache-control", b"no-store")])
        await self._send({"type": "http.response.body", "body": b""})


class Version(ApiConsumer):
    """GET /version."""

    methods = frozenset({"GET", "HEAD"})

    async def handle(self, request: Request) -> None:
        await self.send_json(200, {"version": VERSION})


class NotForYou(Exception):
    """The metrics are not for this client."""


class Metrics(HttpConsumer):
    """GET /metrics: for a scraper on this machine, one with the token, or a member of the staff."""

    methods = frozenset({"GET", "HEAD"})

    def __init__(self, gateway: Gateway, token: str) -> None:
        super().__init__()
        self._gateway = gateway
        self._token = token

    async def handle(self, request: Request) -> None:
        if not (
            self._has_token(request) or is_from_this_machine(request) or await _is_staff_session(request)
        ):
            raise NotForYou
        text = render(self._gateway, version=VERSION)
        headers = [
            (b"content-type", CONTENT_TYPE),
            (b"content-length", b"%d" % len(text)),
            (b"cache-control", b"no-store"),
        ]
        await self._start(200, headers)
        await self._send({"type": "http.response.body", "body": text})

    def _has_token(self, request: Request) -> bool:
        given = request.bearer
        if not self._token or given is None:
            return False
        return hmac.compare_digest(given.encode("latin-1"), self._token.encode())

    def error_response(self, error: Exception) -> tuple[int, object, list[Header]]:
        if isinstance(error, NotForYou):
            message = (
                "Metrics are for this machine, for staff who are logged in, and for the bearer token "
                "ROUNDHOUSE_METRICS_TOKEN."
            )
            return 403, error_payload(message, "permission_error"), []
        return super().error_response(error)


def is_from_this_machine(request: Request) -> bool:
    """True for a client here, asking by a loopback name; False for whatever a proxy here passes on."""
    if any(name in request.headers for name in FORWARDED):
        return False
    host, _ = split_domain_port(request.headers.get(b"host", b"").decode("latin-1"))
    if host not in LOOPBACK_HOSTS:
        return False
    try:
        return ip_address(request.client_address).is_loopback
    except ValueError:
        return False


async def _is_staff_session(request: Request) -> bool:
    try:
        cookies = SimpleCookie(request.headers.get(b"cookie", b"").decode("latin-1"))
    except CookieError:
        return False
    cookie = cookies.get(settings.SESSION_COOKIE_NAME)
    if cookie is None:
        return False
    try:
        return await in_database(_is_staff, cookie.value)
    except DatabaseError:
        return False


def _is_staff(session_key: str) -> bool:
    """In a database thread: the same question that the admin asks."""
    request = HttpRequest()
    request.session = import_module(settings.SESSION_ENGINE).SessionStore(session_key)
    user = get_user(request)
    return bool(user.is_active and getattr(user, "is_staff", False))


def _version() -> str:
    try:
        return metadata.version("roundhouse")
    except metadata.PackageNotFoundError:
        return ""


VERSION = _version()
