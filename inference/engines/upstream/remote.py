"""The server behind an upstream worker: asked, looked after, and what its statuses mean.

It gets its key, and nothing of ours or of a client's besides the request's own fields. Redirects are never
followed, proxies of the environment never used.
"""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import aiohttp
import msgspec
from yarl import URL

from inference.engines.base import BadRequest, LoadError
from inference.engines.http import Refusal
from inference.engines.upstream.addresses import Addresses, Forbidden
from inference.engines.upstream.arguments import Arguments, read_url
from inference.engines.upstream.presets import PRESETS
from inference.protocol import Cause, Upstream

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
LOOK_SECONDS = 10.0
IDLE_SECONDS = 4.0
"""Less than most servers keep an idle connection."""
LONG_BODY_BYTES = 1024 * 1024
MAX_REFUSAL_BYTES = 64 * 1024
MAX_LIST_BYTES = 16 * 1024 * 1024
MAX_TEXT = 1000

ABOUT_THE_REQUEST = frozenset({400, 413, 422})
"""Of its statuses; every other one but 200 says something of the server, of its key, or of our settings."""

AWAY = "The server behind this model does not answer."
OVERLOADED = "The server behind this model takes no more requests at the moment."
REFUSED = "The server behind this model refused the request."

_CONTEXT_KEYS = (
    ("max_model_len",),
    ("context_window",),
    ("context_length",),
    ("max_context_length",),
    ("meta", "n_ctx"),
    ("meta", "n_ctx_train"),
)
"""Where a list of models tells a context length."""
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")

Card = dict[str, Any]


class _List(msgspec.Struct):
    data: list[Card]


_decode_list = msgspec.json.Decoder(_List).decode


class Away(Exception):
    """It does not answer as it should, which may pass. The message is for operators."""


class BadKey(LoadError):
    """It refuses our key."""


class Doubtful(Refusal):
    """A refusal that makes it worth a look whether the server, or our key, is still good."""


class Remote:
    """One server. Belongs to the event loop that opened it."""

    def __init__(self, arguments: Arguments, access: Upstream) -> None:
        self.arguments = arguments
        self.preset = PRESETS[arguments.preset]
        self._url = read_url(arguments.url)
        self._root = self._url.parent if self._url.name == "v1" else self._url.origin()
        self._key = access.key
        self._addresses = Addresses(access.allowed)
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        headers = {"User-Agent": "roundhouse", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                keepalive_timeout=IDLE_SECONDS,
                socket_factory=self._addresses.socket_factory(self._url.host or ""),
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_SECONDS, sock_read=self.arguments.timeout
            ),
            headers=headers,
            trust_env=False,
            auto_decompress=False,
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    # -- is it there, and what does it serve

    async def models(self) -> list[Card] | None:
        """What it lists; None where it lists nothing, or not to us now. Raises Away, or LoadError for what
        only an operator can mend."""
        if not self.preset.lists_models:
            return None
        status, body = await self._get(self._url / "models")
        if status == 429:
            return None
        if status == 404:
            raise LoadError(
                Cause.BAD_ARGUMENT,
                "The server answers 404 to /models below the URL: is the URL right, with its /v1?",
            )
        self._check(status)
        try:
            return _decode_list(body).data
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise LoadError(
                Cause.BAD_ARGUMENT,
                "What the server answers to /models below the URL is no list of models: is the URL right, "
                "with its /v1?",
            ) from None

    async def look(self) -> None:
        """Is it well? Raises Away, or LoadError."""
        if self.preset.health is not None:
            self._check((await self._get(self._beside(self.preset.health)))[0])
        elif self.preset.lists_models:
            status, _ = await self._get(self._url / "models")
            if status != 429:
                self._check(status)
        else:
            status, _ = await self._get(self._url)
            if status >= 500:
                raise Away(f"it answers {status}")

    async def context_length(self, card: Card | None) -> int:
        """As it says of the model, or of itself; 0 when it says nothing."""
        if self.preset.context_at is not None:
            path, keys = self.preset.context_at
            try:
                status, body = await self._get(self._beside(path))
                told = msgspec.json.decode(body) if status == 200 else None
            except (Away, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                told = None
            if found := _number_at(told, keys):
                return found
        return next((found for keys in _CONTEXT_KEYS if (found := _number_at(card, keys))), 0)

    def _beside(self, path: str) -> URL:
        """A path that is not below /v1 but beside it."""
        return self._root.with_path(self._root.path.rstrip("/") + path)

    def _check(self, status: int) -> None:
        if status in (401, 403):
            raise self.bad_key(status)
        if 300 <= status < 400:
            raise LoadError(
                Cause.BAD_ARGUMENT,
                f"The server redirects ({status}), which is never followed: give the URL that it leads to.",
            )
        if status != 200:
            raise Away(f"it answers {status}")

    def bad_key(self, status: int) -> BadKey:
        what = "refuses the key" if self._key else "wants a key, and the deployment has none"
        return BadKey(Cause.BAD_ARGUMENT, f"The server {what} ({status}).")

    async def _get(self, url: URL) -> tuple[int, bytes]:
        """Status and body. Raises Away, or LoadError for an address that is not allowed."""
        timeout = aiohttp.ClientTimeout(total=LOOK_SECONDS)
        try:
            async with self._opened().get(url, timeout=timeout, allow_redirects=False) as response:
                return response.status, await read_bounded(response, MAX_LIST_BYTES) or b""
        except aiohttp.InvalidURL:
            detail = "The server may not be asked: the URL's host is neither a name nor an address in full."
            raise LoadError(Cause.BAD_ARGUMENT, detail) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if (forbidden := _forbidden(error)) is not None:
                raise LoadError(Cause.BAD_ARGUMENT, f"The server may not be asked: {forbidden}.") from None
            raise Away(f"it does not answer ({_short(error)})") from None

    # -- requests

    async def post(self, path: str, body: bytes) -> aiohttp.ClientResponse:
        """The response, once its headers are here and say 200. Raises Refusal, BadRequest or BadKey."""
        # What lies below /v1 lies below the URL; the rest beside it.
        url = self._url / path.removeprefix("/v1/") if path.startswith("/v1/") else self._beside(path)
        response = await self._answered(url, body)
        if response.status == 200:
            return response
        try:
            raise await self._refusal(response)
        finally:
            response.close()

    async def _answered(self, url: URL, body: bytes) -> aiohttp.ClientResponse:
        for last in (False, True):
            try:
                # A long body goes out in pieces: aiohttp warns that one write of it would hold the loop.
                payload = body if len(body) < LONG_BODY_BYTES else io.BytesIO(body)
                return await self._opened().post(
                    url,
                    data=payload,
                    headers={"Content-Type": "application/json"},
                    allow_redirects=False,
                )
            except (aiohttp.ClientError, OSError, ValueError) as error:
                if last or not _met_closing(error):
                    logger.warning("event=upstream_away %s", _short(error))
                    raise unavailable(AWAY, Doubtful) from None
                # Most likely an idle connection that it closed in this moment.
        raise AssertionError("unreachable")

    async def _refusal(self, response: aiohttp.ClientResponse) -> Exception:
        status = response.status
        try:
            body = await read_bounded(response, MAX_REFUSAL_BYTES) or b""
        except (aiohttp.ClientError, OSError):
            body = b""
        message, param, code = _told(body)
        if status in ABOUT_THE_REQUEST:
            if self._key:  # before it is cut: half a key is too much as well
                message = message.replace(self._key, "***")
            return BadRequest(message[:MAX_TEXT] or REFUSED, param=param, code=code)
        # Its words may be about somebody's prompt: only its code is kept.
        logger.warning("event=upstream_refused status=%d code=%s", status, code)
        if status == 401:
            return self.bad_key(status)
        if status in (402, 429) or status >= 500:
            return unavailable(OVERLOADED)
        return unavailable(AWAY, Doubtful)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise ValueError("it is not open")
        return self._session


def unavailable(message: str, kind: type[Refusal] = Refusal) -> Refusal:
    """Another worker may take the request; this one cannot now."""
    return kind(503, message, kind="service_unavailable_error", code="server_is_overloaded")


async def read_bounded(response: aiohttp.ClientResponse, most: int) -> bytes | None:
    """The whole body, or None as soon as it is longer."""
    parts, size = [], 0
    while chunk := await response.content.readany():
        size += len(chunk)
        if size > most:
            return None
        parts.append(chunk)
    return b"".join(parts)


def _fail(content: aiohttp.StreamReader, reason: str) -> None:
    """Have the reads of a body that is not complete raise an error."""
    if not content.is_eof() and content.exception() is None:
        content.set_exception(aiohttp.ClientPayloadError(reason))


_watched: WeakSet[asyncio.Future[None]] = WeakSet()


def _take_error(closed: asyncio.Future[None]) -> None:
    if not closed.cancelled():
        closed.exception()


@contextmanager
def ending_with_its_connection(response: aiohttp.ClientResponse) -> Iterator[None]:
    """Have reads of the body fail when the connection is lost, whatever came before.

    aiohttp (3.14) does not tell them when its parser has failed at a broken chunk: they would wait for ever.
    """
    protocol = response.connection.protocol if response.connection is not None else None
    closed = protocol.closed if protocol is not None else None

    def lost(_: asyncio.Future[None] | None) -> None:
        _fail(response.content, "the connection was lost")

    if closed is None:
        lost(None)
        yield
        return
    if closed not in _watched:
        # Its connection outlives this request, and may then be lost with an error that nobody asks for.
        _watched.add(closed)
        closed.add_done_callback(_take_error)
    closed.add_done_callback(lost)
    try:
        yield
    finally:
        closed.remove_done_callback(lost)


def _told(body: bytes) -> tuple[str, str | None, str | None]:
    """Message, field and code of a refusal, in whichever of the usual forms it is."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "", None, None
    answer = answer if isinstance(answer, dict) else {}
    error = answer.get("error")
    inner = error if isinstance(error, dict) else answer
    message = next(
        (
            text
            for text in (inner.get("message"), error, answer.get("detail"))
            if isinstance(text, str) and text
        ),
        "",
    )
    if not message and isinstance(answer.get("detail"), list):
        # A list of fields and what is wrong with each, as FastAPI tells it.
        found = [one for one in answer["detail"] if isinstance(one, dict) and isinstance(one.get("msg"), str)]
        message = "; ".join(one["msg"] for one in found)
    param, code = inner.get("param"), inner.get("code") or inner.get("type")
    return message, _word(param), _word(code)


def _word(given: Any) -> str | None:
    return given if isinstance(given, str) and _WORD.fullmatch(given) else None


def _number_at(told: Any, keys: tuple[str, ...]) -> int:
    for key in keys:
        told = told.get(key) if isinstance(told, dict) else None
    return told if isinstance(told, int) and not isinstance(told, bool) and 0 < told <= 2**40 else 0


def _forbidden(error: BaseException | None) -> Forbidden | None:
    while error is not None:
        if isinstance(error, Forbidden):
            return error
        if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, Forbidden):
            return error.os_error
        error = error.__cause__
    return None


def _met_closing(error: BaseException) -> bool:
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return True
    return (
        isinstance(error, aiohttp.ClientOSError)
        and not isinstance(error, aiohttp.ClientConnectorError)
        and error.errno in (errno.ECONNRESET, errno.EPIPE)
    )


def _short(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "it took too long"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its certificate is not trusted here"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "it takes no connection"
    return type(error).__name__
