"""The environment, read and checked once. Nothing else in the control plane reads `os.environ` for
settings; a node, which runs without Django, reads three of these itself: ROUNDHOUSE_DATA, ROUNDHOUSE_CACHE
and ROUNDHOUSE_VLLM_PYTHON.

| variable | default | meaning |
|---|---|---|
| ROUNDHOUSE_PORT | 8000 | the gateway's port |
| ROUNDHOUSE_HOST | 127.0.0.1 | the address the gateway listens on |
| ROUNDHOUSE_ALLOWED_HOSTS | (loopback names) | further names by which clients may call it, comma-separated |
| ROUNDHOUSE_DATA | var/ | database, secrets, spool, logs of this machine |
| ROUNDHOUSE_CACHE | the user's cache folder | models and their converted copies |
| DATABASE_URL | SQLite in the data folder | `postgres://user:password@host/name` |
| REDIS_URL | a private Redis | `redis://host:6379/0`; shared by several machines |
| ROUNDHOUSE_SECRET_KEY | generated into the data folder | signs sessions, derives worker secrets |
| ROUNDHOUSE_KEY_PEPPERS | derived from the secret key | `1:HEX,2:HEX`: numbered peppers of API key digests |
| ROUNDHOUSE_HTTPS | no | `yes`: browsers reach it through a proxy that speaks TLS |
| ROUNDHOUSE_TRUSTED_PROXIES | (none) | addresses or networks of proxies whose X-Forwarded-For is believed |
| ROUNDHOUSE_UPSTREAM_HOSTS | (any) | networks and host names where upstream servers may be, comma-separated |
| ROUNDHOUSE_CORS_ORIGINS | (closed) | origins whose pages may call /v1, comma-separated |
| ROUNDHOUSE_LOG_LEVEL | INFO | of the whole project |
| ROUNDHOUSE_LOG_FORMAT | line | `line` for people, `json` for machines |
| ROUNDHOUSE_METRICS_TOKEN | (none) | bearer token that opens /metrics from other machines |
| ROUNDHOUSE_CURRENCY | USD | three letters: of all prices, costs and budgets |
| ROUNDHOUSE_USAGE_DAYS | (all) | how many days single usage events are kept; their hourly sums stay |
| ROUNDHOUSE_MAIL_URL | (no mail) | `smtp://user:password@host:587`, with STARTTLS, or `smtps://…:465` |
| ROUNDHOUSE_MAIL_FROM | roundhouse@localhost | sender of notices |
| ROUNDHOUSE_VLLM_PYTHON | .venv-vllm beside the code | of a node: the Python that has vLLM |
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
_HOST_NAME = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
Network = IPv4Network | IPv6Network
MIN_SECRET_KEY = 50
MIN_METRICS_TOKEN = 20
MIN_USAGE_DAYS = 32
"""The longest month, and a day: the running month can always be charged anew."""


class BadEnvironment(Exception):
    """A variable that cannot be used; the message names it and says what to set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mail:
    """A server that takes mail."""

    host: str
    port: int
    user: str
    password: str
    implicit_tls: bool
    starttls: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Env:
    host: str
    port: int
    allowed_hosts: tuple[str, ...]
    data: Path
    cache: Path
    database_url: str
    redis_url: str | None
    """None: `manage.py up` starts a private Redis and passes its address on as REDIS_URL."""
    secret_key: str
    key_peppers: dict[int, bytes]
    https: bool
    trusted_proxies: tuple[Network, ...]
    upstream_hosts: tuple[str, ...]
    """Networks and names; empty: anywhere that is not refused always."""
    cors_origins: tuple[str, ...]
    log_level: str
    log_format: str
    metrics_token: str
    currency: str
    usage_days: int | None
    """None: usage events are kept for good."""
    mail: Mail | None
    """None: no mail is sent."""
    mail_from: str
    vllm_python: Path | None
    """None: the one that `make vllm` makes, if any."""


def read_env(environ: Mapping[str, str] = os.environ) -> Env:
    """Read every variable of the table above. Raises BadEnvironment naming the first bad one.

    Creates the data folder (0700) and, when ROUNDHOUSE_SECRET_KEY is not set, the secret key in it.
    """
    data = _folder(environ.get("ROUNDHOUSE_DATA") or str(ROOT / "var"))
    secret_key = _secret_key(environ, data)
    return Env(
        host=environ.get("ROUNDHOUSE_HOST") or "127.0.0.1",
        port=_port(environ.get("ROUNDHOUSE_PORT") or "8000"),
        allowed_hosts=_allowed_hosts(environ.get("ROUNDHOUSE_ALLOWED_HOSTS", "")),
        data=data,
        cache=_cache(environ),
        database_url=environ.get("DATABASE_URL") or f"sqlite:///{data / 'roundhouse.sqlite3'}",
        redis_url=environ.get("REDIS_URL") or None,
        secret_key=secret_key,
        key_peppers=_peppers(environ.get("ROUNDHOUSE_KEY_PEPPERS", ""), secret_key),
        https=_yes_or_no("ROUNDHOUSE_HTTPS", environ.get("ROUNDHOUSE_HTTPS") or "no"),
        trusted_proxies=_networks(environ.get("ROUNDHOUSE_TRUSTED_PROXIES", "")),
        upstream_hosts=_upstream_hosts(environ.get("ROUNDHOUSE_UPSTREAM_HOSTS", "")),
        cors_origins=tuple(_split(environ.get("ROUNDHOUSE_CORS_ORIGINS", ""))),
        log_level=_log_level(environ.get("ROUNDHOUSE_LOG_LEVEL") or "INFO"),
        log_format=_log_format(environ.get("ROUNDHOUSE_LOG_FORMAT") or "line"),
        metrics_token=_metrics_token(environ.get("ROUNDHOUSE_METRICS_TOKEN") or ""),
        currency=_currency(environ.get("ROUNDHOUSE_CURRENCY") or "USD"),
        usage_days=_usage_days(environ.get("ROUNDHOUSE_USAGE_DAYS") or ""),
        mail=_mail(environ.get("ROUNDHOUSE_MAIL_URL") or ""),
        mail_from=_mail_from(environ.get("ROUNDHOUSE_MAIL_FROM") or "roundhouse@localhost"),
        vllm_python=_interpreter("ROUNDHOUSE_VLLM_PYTHON", environ.get("ROUNDHOUSE_VLLM_PYTHON") or ""),
    )


def celery_broker(redis_url: str | None) -> str | None:
    """A Redis address as Celery writes it: a unix socket has another form there.

    `unix:///run/redis.sock?db=1` becomes `redis+socket:///run/redis.sock?virtual_host=1`.
    """
    if redis_url is None or not redis_url.startswith("unix://"):
        return redis_url
    parts = urlsplit(redis_url)
    database = parse_qs(parts.query).get("db", ["0"])[0]
    return f"redis+socket://{parts.netloc}{parts.path}?virtual_host={database}"


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _folder(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BadEnvironment(
            f"ROUNDHOUSE_DATA: the folder {path} cannot be created ({error.strerror}); "
            "set it to a folder this user may write to."
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise BadEnvironment(
            f"ROUNDHOUSE_DATA: the folder {path} cannot be written to; "
            "set it to a folder this user may write to."
        )
    return path


def _cache(environ: Mapping[str, str]) -> Path:
    text = environ.get("ROUNDHOUSE_CACHE")
    if text:
        return Path(text).expanduser().absolute()
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "roundhouse"


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise BadEnvironment(f"ROUNDHOUSE_PORT: {text!r} is not a port; set a number from 1 to 65535.")
    return int(text)


def _allowed_hosts(text: str) -> tuple[str, ...]:
    hosts = _split(text)
    if "*" in hosts:
        raise BadEnvironment(
            "ROUNDHOUSE_ALLOWED_HOSTS: '*' would let any web page speak to Roundhouse; "
            "list the host names that clients use."
        )
    return (*LOOPBACK_NAMES, *hosts)


def _networks(text: str) -> tuple[Network, ...]:
    try:
        networks = tuple(ip_network(part) for part in _split(text))
    except ValueError as error:
        raise BadEnvironment(
            f"ROUNDHOUSE_TRUSTED_PROXIES: {error}; list addresses or networks such as 10.1.2.3, 10.1.0.0/16."
        ) from error
    if any(network.prefixlen == 0 for network in networks):
        raise BadEnvironment(
            "ROUNDHOUSE_TRUSTED_PROXIES: a network of everybody would let any client name its own address."
        )
    return networks


def _upstream_hosts(text: str) -> tuple[str, ...]:
    hosts = _split(text)
    for host in hosts:
        if _HOST_NAME.fullmatch(host):
            continue
        try:
            ip_network(host)
        except ValueError as error:
            raise BadEnvironment(
                f"ROUNDHOUSE_UPSTREAM_HOSTS: {error}; list networks such as 10.1.0.0/16, or host names."
            ) from error
    return tuple(hosts)


def _log_level(text: str) -> str:
    level = text.upper()
    if level not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
        raise BadEnvironment(f"ROUNDHOUSE_LOG_LEVEL: {text!r}; set DEBUG, INFO, WARNING or ERROR.")
    return level


def _yes_or_no(name: str, text: str) -> bool:
    if text.lower() not in {"yes", "no"}:
        raise BadEnvironment(f"{name}: {text!r}; set yes or no.")
    return text.lower() == "yes"


def _log_format(text: str) -> str:
    if text not in {"line", "json"}:
        raise BadEnvironment(f"ROUNDHOUSE_LOG_FORMAT: {text!r}; set line or json.")
    return text


def _metrics_token(text: str) -> str:
    if text and (len(text) < MIN_METRICS_TOKEN or not text.isascii() or not text.isprintable()):
        raise BadEnvironment(
            f"ROUNDHOUSE_METRICS_TOKEN: set at least {MIN_METRICS_TOKEN} random ASCII characters."
        )
    return text


def _currency(text: str) -> str:
    if len(text) != 3 or not text.isascii() or not text.isalpha():
        raise BadEnvironment(f"ROUNDHOUSE_CURRENCY: {text!r}; set three letters such as EUR.")
    return text.upper()


def _usage_days(text: str) -> int | None:
    if not text:
        return None
    if not text.isdecimal() or not MIN_USAGE_DAYS <= int(text) <= 36_500:
        raise BadEnvironment(
            f"ROUNDHOUSE_USAGE_DAYS: {text!r}; set at least {MIN_USAGE_DAYS}, or unset it to keep them all."
        )
    return int(text)


def _mail(text: str) -> Mail | None:
    if not text:
        return None
    # Never shown: there is a password in it.
    refusal = "ROUNDHOUSE_MAIL_URL: write smtp://user:password@host:587 or smtps://user:password@host:465."
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise BadEnvironment(refusal) from error
    if parts.scheme not in {"smtp", "smtps"} or not parts.hostname:
        raise BadEnvironment(refusal)
    implicit = parts.scheme == "smtps"
    user = unquote(parts.username or "")
    return Mail(
        host=parts.hostname,
        port=port or (465 if implicit else 587 if user else 25),
        user=user,
        password=unquote(parts.password or ""),
        implicit_tls=implicit,
        # A password never goes out in the clear.
        starttls=not implicit and bool(user),
    )


def _mail_from(text: str) -> str:
    if "@" not in text or not text.isprintable():
        raise BadEnvironment(f"ROUNDHOUSE_MAIL_FROM: {text!r} is no address.")
    return text


def _interpreter(name: str, text: str) -> Path | None:
    if not text:
        return None
    path = Path(text)
    if not path.is_absolute() or not path.is_file() or not os.access(path, os.X_OK):
        raise BadEnvironment(f"{name}: {text!r} is no program; set the full path of a Python.")
    return path


def _secret_key(environ: Mapping[str, str], data: Path) -> str:
    given = environ.get("ROUNDHOUSE_SECRET_KEY")
    if given:
        if len(given) < MIN_SECRET_KEY:
            raise BadEnvironment(
                f"ROUNDHOUSE_SECRET_KEY: {len(given)} characters; set at least {MIN_SECRET_KEY} random ones, "
                "or unset it and one is generated into the data folder."
            )
        return given
    path = data / "secret_key"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        pass
    # Several processes may start at once on a new folder: only one link() wins, all read the winner's.
    draft = data / f"secret_key.{os.getpid()}"
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(64))
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
        return path.read_text().strip()
    except OSError as error:
        raise BadEnvironment(
            f"ROUNDHOUSE_DATA: the secret key cannot be kept in {data} ({error.strerror})."
        ) from error


def _peppers(text: str, secret_key: str) -> dict[int, bytes]:
    if not text:
        return {1: hmac.digest(secret_key.encode(), b"roundhouse.api-key-pepper.1", hashlib.sha256)}
    peppers: dict[int, bytes] = {}
    for part in _split(text):
        number, _, value = part.partition(":")
        try:
            pepper = bytes.fromhex(value)
        except ValueError:
            pepper = b""
        if not number.isdecimal() or len(pepper) < 16:
            raise BadEnvironment(
                "ROUNDHOUSE_KEY_PEPPERS: write NUMBER:HEX pairs of at least 16 bytes, separated by commas."
            )
        peppers[int(number)] = pepper
    return peppers
