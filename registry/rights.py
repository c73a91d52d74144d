"""What a key may do, in words that its row, its project and the gateway share. No database here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from django.core.exceptions import ValidationError
from django.db import models

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_ROUTES = 200
MAX_CIDRS = 100
METADATA_NAMES = 16
METADATA_NAME_LENGTH = 64
METADATA_TEXT_LENGTH = 512

_PATTERN = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._:/@*-]{0,119}")


class Scope(models.TextChoices):
    """Groups of endpoints."""

    CHAT = "chat", "chat completions"
    COMPLETIONS = "completions", "completions"
    EMBEDDINGS = "embeddings", "embeddings"
    MESSAGES = "messages", "messages (Anthropic's format), and their token counts"
    MODELS = "models", "list of models"
    RERANK = "rerank", "reranking and scores"
    RESPONSES = "responses", "responses, and reading those that are kept"
    TOKENIZE = "tokenize", "tokenize and detokenize"
    USAGE = "usage", "usage and costs of the project"


class Priority(models.TextChoices):
    """Who goes first when all workers are busy."""

    INTERACTIVE = "interactive", "interactive: before the others"
    DEFAULT = "default", "default"
    BATCH = "batch", "batch: after the others"


PRIORITY_ORDER: dict[str, int] = {Priority.INTERACTIVE: 0, Priority.DEFAULT: 1, Priority.BATCH: 2}
"""The lowest number goes first."""


class Role(models.TextChoices):
    """What a member of a project may do with its keys; each may also do what those below it may.

    owner    issues, rotates and revokes any key of the project
    member   issues keys, rotates and revokes those
    viewer   sees the project's keys
    """

    OWNER = "owner", "owner: any key of the project"
    MEMBER = "member", "member: keys of their own"
    VIEWER = "viewer", "viewer: sees keys"


# -- routes


def matches_route(names: Collection[str], route: str) -> bool:
    """Is `route` among `names`, some of which may hold `*` for any characters? No names mean every route."""
    if not names or route in names:
        return True
    return any("*" in name and _matches(name, route) for name in names)


def _matches(pattern: str, route: str) -> bool:
    """Each part between the stars at its first place after the one before: no way back, so no regex's
    endless tries either."""
    first, *between, last = pattern.split("*")
    if len(route) < len(first) + len(last) or not (route.startswith(first) and route.endswith(last)):
        return False
    at, end = len(first), len(route) - len(last)
    for part in between:
        found = route.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


def validate_routes(value: Any) -> None:
    """A list of route names; `*` stands for any characters."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValidationError('Write a list of route names, such as ["chat", "smol*"].')
    if len(value) > MAX_ROUTES:
        raise ValidationError(f"At most {MAX_ROUTES} routes can be named.")
    for name in value:
        if not _PATTERN.fullmatch(name) or name.count("*") > 4:
            raise ValidationError(
                f"{name[:120]!r} cannot be a route: use letters, digits and . _ : / @ - (at most 120), "
                "and * (at most four) for any characters."
            )


def validate_scopes(value: Any) -> None:
    """A list of scopes."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValidationError('Write a list of scopes, such as ["chat", "models"].')
    for name in value:
        if name not in Scope.values:
            raise ValidationError(f"{name[:40]!r} is no scope; there are {', '.join(Scope.values)}.")


# -- addresses


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Networks, or single addresses, as they are written. Raises ValueError naming the first that is none."""
    networks = []
    for text in texts:
        try:
            networks.append(ip_network(text.strip(), strict=False))
        except ValueError:
            raise ValueError(f"{text[:60]!r} is no address or network such as 10.0.0.0/8.") from None
    return tuple(networks)


def parse_address(text: str) -> Address | None:
    """An address as a peer or a proxy names it, perhaps with a port; None for anything else."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    # A socket that takes both families names an IPv4 client this way.
    return getattr(address, "ipv4_mapped", None) or address


def within(address: Address | None, networks: Iterable[Network]) -> bool:
    """Is the address in one of the networks? One that is not known is in none."""
    return address is not None and any(address in network for network in networks)


def client_address(peer: str, forwarded_for: str, proxies: Collection[Network]) -> Address | None:
    """Who is at the other end, seen past our own proxies.

    `forwarded_for` (X-Forwarded-For) is believed only as far as trusted proxies wrote it: read from its
    end, the first address that is not one of theirs is the client. Anybody else may write there what
    they like: it changes nothing.
    """
    address = parse_address(peer)
    if not proxies:
        return address
    hops = forwarded_for.split(",") if forwarded_for else []
    while within(address, proxies) and hops:
        address = parse_address(hops.pop())
    return address


def validate_cidrs(value: Any) -> None:
    """A list of networks or addresses."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValidationError('Write a list of networks, such as ["10.0.0.0/8", "2001:db8::/32"].')
    if len(value) > MAX_CIDRS:
        raise ValidationError(f"At most {MAX_CIDRS} networks can be named.")
    try:
        parse_networks(value)
    except ValueError as error:
        raise ValidationError(str(error)) from error


def validate_metadata(value: Any) -> None:
    """A small JSON object of texts."""
    if not isinstance(value, dict):
        raise ValidationError('Write a JSON object, such as {"team": "search"}.')
    if len(value) > METADATA_NAMES:
        raise ValidationError(f"At most {METADATA_NAMES} names can be kept.")
    for name, text in value.items():
        if not isinstance(name, str) or not 1 <= len(name) <= METADATA_NAME_LENGTH or not name.isprintable():
            raise ValidationError(
                f"{str(name)[:64]!r}: a name has 1 to {METADATA_NAME_LENGTH} printable characters."
            )
        if not isinstance(text, str) or len(text) > METADATA_TEXT_LENGTH or "\x00" in text:
            raise ValidationError(f"{name}: write a text of at most {METADATA_TEXT_LENGTH} characters.")


def validate_zone(value: str) -> None:
    """A time zone of IANA's list."""
    from zoneinfo import ZoneInfo

    try:
        ZoneInfo(value)
    except (KeyError, ValueError, OSError) as error:
        raise ValidationError("Name a time zone such as UTC or Europe/Vienna.") from error
