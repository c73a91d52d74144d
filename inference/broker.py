"""Where a node's agent hears nudges: the private Redis on this machine, or its own user of a shared one."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
from urllib.parse import quote, urlsplit, urlunsplit

import redis
from django.conf import settings

from registry.keys import redis_prefix
from registry.models import Node

log = logging.getLogger("roundhouse.broker")

PRIVATE = (
    "This Roundhouse runs its own private Redis, which other machines cannot reach: "
    "set REDIS_URL to a Redis that they can."
)
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
TIMEOUT_SECONDS = 2.0

# What a Celery worker that listens to one queue needs, and no command more.
COMMANDS = (
    *("+ping", "+echo", "+client|setname", "+client|id", "+hello", "+auth", "+select"),
    *("+multi", "+exec", "+discard", "+watch", "+unwatch", "+script|load", "+evalsha", "+set", "+get"),
    *("+brpop", "+rpop", "+lpush", "+rpush", "+llen", "+del", "+unlink", "+exists"),
    *("+sadd", "+srem", "+smembers", "+sismember", "+hset", "+hget", "+hdel", "+hexists", "+zadd", "+zrem"),
    *("+zrange", "+zrangebyscore", "+zrevrangebyscore"),
)


class BrokerRefused(Exception):
    """The node cannot be given a broker that it could reach. Changing REDIS_URL helps."""


def check_reachable(client_address: str) -> None:
    """Raises BrokerRefused for another machine's client when only this machine can reach the broker."""
    if settings.ROUNDHOUSE_REDIS_URL is None or _is_loopback(client_address):
        return
    parts = urlsplit(settings.ROUNDHOUSE_REDIS_URL)
    if parts.scheme == "unix" or parts.hostname in LOOPBACK_NAMES:
        raise BrokerRefused(PRIVATE)


def broker_of(node: Node) -> str | None:
    """The address for this node's agent; None without Redis: it then only asks by itself.

    A shared Redis gives each node a user that reaches its own queue and no more, where Redis lets
    us make users. Asking again gives the same address.
    """
    url = settings.ROUNDHOUSE_REDIS_URL
    if url is None or url.startswith("unix://"):
        return settings.CELERY_BROKER_URL
    user, password = f"{redis_prefix(settings.SECRET_KEY)}node-{node.pk}", _password(node)
    try:
        _make_user(url, user, password, node.queue)
    except redis.RedisError as error:
        log.warning(
            "node %s gets Roundhouse's own Redis user, because none could be made for it: %s",
            node,
            type(error).__name__,
            extra={"event": "broker_user_shared", "node_id": node.pk},
        )
        return settings.CELERY_BROKER_URL
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{quote(user)}:{quote(password)}@{host}"))


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        # A unix socket has no address, and is on this machine.
        return address == ""
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def _password(node: Node) -> str:
    """Derived, so that it need not be kept, and tied to the node's present secret: joining anew ends it."""
    text = f"roundhouse.broker.{node.pk}.{node.secret_digest}"
    return hmac.digest(settings.SECRET_KEY.encode(), text.encode(), hashlib.sha256).hex()


def _make_user(url: str, user: str, password: str, queue: str) -> None:
    # Kombu keeps one list per queue and priority; the separator is two control characters.
    bindings = [f"_kombu.binding.{queue}", f"_kombu.binding_permanent.{queue}"]
    names = [queue, f"{queue}\x06\x16*", *bindings, "unacked*"]
    keys = [f"~{redis_prefix(settings.SECRET_KEY)}{name}" for name in names]
    with redis.Redis.from_url(
        url, socket_connect_timeout=TIMEOUT_SECONDS, socket_timeout=TIMEOUT_SECONDS
    ) as client:
        client.execute_command(
            *("ACL", "SETUSER", user, "reset", "on", f">{password}"),
            *keys,
            "resetchannels",
            "-@all",
            *COMMANDS,
        )
