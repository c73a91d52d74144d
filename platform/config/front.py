"""One wrapper around everything, Channels' routing in it, Django behind.

Consumers bypass Django's middleware, so what holds for every answer is here: Host check, request id,
security headers, CORS, and a last net for faults. The one websocket is the chat's; there is no channel
layer.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Iterable
from typing import Any

import msgspec
from asgiref.sync import ThreadSensitiveContext, sync_to_async
from channels.routing import URLRouter
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.db import connections
from django.http.request import split_domain_port, validate_host
from django.urls import path, re_path

from inference.fleet import fleet_routes
from inference.http import (
    INTERNAL_ERROR,
    BodyTooLarge,
    ClientGone,
    Header,
    Message,
    Receive,
    Request,
    Scope,
    Send,
    error_payload,
    new_request_id,
    request_id_now,
)
from inference.once import Once
from openai_api import limits
from openai_api.consumers import Answers, OfEngine, OpenApiDocument, TokenCheckUp, UnknownUrls
from openai_api.endpoints import EMBEDDINGS, ENDPOINTS
from openai_api.gateway import Gateway
from openai_api.health import Alive, Answering, Metrics, Ready, RedisProbe, Version
from openai_api.responses.consumers import CancelResponse, InputItems, OneResponse
from webchat.consumers import Chat, ChatSocket

logger = logging.getLogger("roundhouse.http")

API = ("/v1/", "/v2/", "/fleet/", "/api/v1/", "/tokenize", "/detokenize", "/score")
"""Paths whose every answer is JSON for programs."""

ANTHROPIC_URLS = "/v1/messages"
"""What they begin with: Anthropic's clients speak there."""

PROBES = ("/healthz", "/readyz", "/health")
"""Asked by address, by machines; they tell nothing worth protecting."""

RESPONSE = r"v1/responses/(?P<response_id>resp_[A-Za-z0-9_]{1,59})"
"""One that is kept, in URLs."""

PAGE_HEADERS: dict[bytes, bytes] = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
    b"x-frame-options": b"DENY",
    b"content-security-policy": (
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        b"connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
}
API_HEADERS: dict[bytes, bytes] = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
    b"openai-version": b"2020-10-01",
}
EXPOSED = b", ".join(
    [
        *(b"x-request-id", b"request-id", b"openai-processing-ms", b"retry-after", b"x-should-retry"),
        b"server-timing",
        *(b"x-ratelimit-limit-requests", b"x-ratelimit-remaining-requests", b"x-ratelimit-reset-requests"),
        *(b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens"),
    ]
)
"""Headers of answers that pages of other origins may read."""
HEADER_LIST = re.compile(rb"[A-Za-z0-9, _-]{1,2000}")


class DjangoPages:
    """Django, each page in a thread of its own that takes its database connection with it.

    Django's own handler would leave the connection to the garbage collector: the thread ends with the
    request, so no later one finds it. It would also write a body of any length to the disk before a view
    could refuse it: none longer than a form is handed to it.
    """

    def __init__(self) -> None:
        self._django = get_asgi_application()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await Request(scope, receive).body(limits.FORM_BYTES)
        except BodyTooLarge as error:
            await _refuse(send, 413, str(error), scope["path"].startswith(API), "request_too_large")
            return
        except ClientGone:
            return
        read: list[Message] = [{"type": "http.request", "body": body}]

        async def read_already() -> Message:
            return read.pop() if read else await receive()

        await self._handle(scope, read_already, send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with ThreadSensitiveContext():
            try:
                await self._django(scope, receive, send)  # type: ignore[arg-type]
            finally:
                await asyncio.shield(sync_to_async(connections.close_all)())


class Front:
    """The ASGI application. Starts the gateway, and then the chat, when the server offers a lifespan,
    else at the first request."""

    def __init__(
        self, gateway: Gateway, chat: Chat, *, allowed_hosts: Iterable[str], cors_origins: Iterable[str]
    ) -> None:
        self.gateway = gateway
        self.chat = chat
        self._start = Once(self._start_parts)
        self._allowed_hosts = list(allowed_hosts)
        self._hosts: dict[bytes, bool] = {}
        self._origins = frozenset(origin.encode() for origin in cors_origins)
        django: Any = DjangoPages()
        self._chat_socket = ChatSocket.as_asgi(chat=chat)
        self._http = URLRouter(
            [
                *(path(one.path[1:], Answers.as_asgi(gateway=gateway, endpoint=one)) for one in ENDPOINTS),
                *fleet_routes(gateway.fleet, gateway.beats),
                path("healthz", Alive.as_asgi()),
                path("health", Answering.as_asgi(gateway=gateway)),
                path("version", Version.as_asgi()),
                path("api/v1/token_check", TokenCheckUp.as_asgi(gateway=gateway)),
                path(
                    "v1/engines/<path:model>/embeddings",
                    OfEngine.as_asgi(gateway=gateway, endpoint=EMBEDDINGS),
                ),
                path(
                    "readyz",
                    Ready.as_asgi(gateway=gateway, redis=RedisProbe(settings.ROUNDHOUSE_REDIS_URL)),
                ),
                path("metrics", Metrics.as_asgi(gateway=gateway, token=settings.ROUNDHOUSE_METRICS_TOKEN)),
                re_path(rf"^{RESPONSE}\Z", OneResponse.as_asgi(gateway=gateway)),
                re_path(rf"^{RESPONSE}/cancel\Z", CancelResponse.as_asgi(gateway=gateway)),
                re_path(rf"^{RESPONSE}/input_items\Z", InputItems.as_asgi(gateway=gateway)),
                path("v1/openapi.json", OpenApiDocument.as_asgi()),
                re_path(r"^v1/models(/.+)?\Z", django),
                re_path(r"^v1/organization/usage/completions\Z", django),
                re_path(r"^v1/organization/usage/embeddings\Z", django),
                re_path(r"^v1/organization/costs\Z", django),
                re_path(r"^api/v1/(projects|keys)(/[A-Za-z0-9_-]{1,60}){0,2}\Z", django),
                re_path(r"^(v1|v2|fleet|api/v1|tokenize|detokenize|score)(/|\Z)", UnknownUrls.as_asgi()),
                re_path(r"", django),
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await self._serve(scope, receive, send)
            case "websocket":
                await self._connect(scope, receive, send)
            case "lifespan":
                await self._live(receive, send)
            case kind:
                raise ValueError(f"This application does not speak {kind}.")

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self._start()
        except Exception as error:
            logger.exception("the gateway cannot start", extra={"event": "gateway_failed"})
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.chat.stop()
        await self.gateway.stop()
        self._start.forget()
        await send({"type": "lifespan.shutdown.complete"})

    async def _start_parts(self) -> None:
        await self.gateway.start()
        await self.chat.start()

    async def _connect(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/chat/ws" or not self._host_is_ours(scope["headers"]):
            await receive()
            await send({"type": "websocket.close", "code": 4404})
            return
        if not self.chat.runner.accepting:
            await self._start()
        try:
            await self._chat_socket(scope, receive, send)
        except Exception:
            logger.exception("a socket failed by a fault of ours", extra={"event": "socket_crashed"})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        request_id = new_request_id()
        url: str = scope["path"]
        is_api = url.startswith(API) or url in ("/v1", "/v2", "/fleet")
        headers: list[Header] = scope["headers"]
        scope["request_id"] = request_id
        request_id_now.set(request_id)
        scope["gateway"] = self.gateway
        cors = self._cors_headers(headers) if self._origins and is_api else ()
        started = False

        async def decorated(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                out = list(message.get("headers", ()))
                present = {name.lower() for name, _ in out}
                for header in (API_HEADERS if is_api else PAGE_HEADERS).items():
                    if header[0] not in present:
                        out.append(header)
                out.append((b"x-request-id", request_id.encode()))
                if url.startswith(ANTHROPIC_URLS):
                    # What Anthropic's clients read it from.
                    out.append((b"request-id", request_id.encode()))
                if is_api:
                    out.append((b"openai-processing-ms", b"%d" % ((time.monotonic() - began) * 1000)))
                out.extend(cors)
                message["headers"] = out
            await send(message)

        try:
            if not self._host_is_ours(headers) and url not in PROBES:
                await _refuse(decorated, 400, "The Host header names a host that is not served here.", is_api)
            elif cors and scope["method"] == "OPTIONS":
                await _send(decorated, 204, b"", _preflight(headers))
            else:
                if not self.chat.runner.accepting:
                    await self._start()
                await self._http(scope, receive, decorated)
        except Exception:
            logger.exception(
                "a request failed by a fault of ours",
                extra={"event": "request_crashed", "request_id": request_id},
            )
            if not started:
                await _refuse(decorated, 500, INTERNAL_ERROR, is_api)

    def _host_is_ours(self, headers: list[Header]) -> bool:
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1:
            return False
        known = self._hosts.get(hosts[0])
        if known is None:
            domain, _ = split_domain_port(hosts[0].decode("latin-1"))
            known = bool(domain) and validate_host(domain, self._allowed_hosts)
            if len(self._hosts) < 256:
                self._hosts[hosts[0]] = known
        return known

    def _cors_headers(self, headers: list[Header]) -> list[Header]:
        origin = next((value for name, value in headers if name == b"origin"), None)
        vary = (b"vary", b"origin")
        if origin not in self._origins or origin is None:
            return [vary]
        return [vary, (b"access-control-allow-origin", origin), (b"access-control-expose-headers", EXPOSED)]


def _preflight(headers: list[Header]) -> list[Header]:
    """Answer a browser that asks before it sends. It carries no key; the request itself must."""
    asked = next((value for name, value in headers if name == b"access-control-request-headers"), b"")
    return [
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (
            b"access-control-allow-headers",
            asked if HEADER_LIST.fullmatch(asked) else b"authorization, content-type",
        ),
        (b"access-control-max-age", b"600"),
    ]


async def _refuse(send: Send, status: int, message: str, is_api: bool, code: str | None = None) -> None:
    if is_api:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body, content_type = msgspec.json.encode(error_payload(message, kind, code=code)), b"application/json"
    else:
        body, content_type = message.encode(), b"text/plain; charset=utf-8"
    await _send(send, status, body, [(b"content-type", content_type), (b"connection", b"close")])


async def _send(send: Send, status: int, body: bytes, headers: list[Header]) -> None:
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def make_application(**changes: Any) -> Front:
    """An application with a gateway of its own; `changes` are for tests."""
    gateway = Gateway(
        data=settings.ROUNDHOUSE_DATA,
        peppers=settings.ROUNDHOUSE_KEY_PEPPERS,
        proxies=settings.ROUNDHOUSE_TRUSTED_PROXIES,
        redis_url=settings.ROUNDHOUSE_REDIS_URL,
    )
    chat = Chat(gateway, settings.ROUNDHOUSE_REDIS_URL)
    options: dict[str, Any] = {
        "allowed_hosts": settings.ALLOWED_HOSTS,
        "cors_origins": settings.ROUNDHOUSE_CORS_ORIGINS,
    }
    return Front(gateway, chat, **options | changes)
