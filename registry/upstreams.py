"""Keys of upstream servers: kept encrypted, and each only for the URL that it was given for.

The encryption's own key is derived from `SECRET_KEY`, so a database or a backup alone opens none. The URL is
sealed in with the key: whatever changes the URL, by whichever way, the key is not sent there.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

from cryptography.fernet import Fernet, InvalidToken
from django.conf import settings
from django.core.exceptions import ValidationError

from registry.states import EngineName

MAX_KEY = 500


def url_of(wish: Any) -> str:
    """Where the server of a deployment or revision is; empty for engines that have none."""
    url = wish.arguments.get("url") if isinstance(wish.arguments, dict) else None
    return url if wish.engine == EngineName.UPSTREAM and isinstance(url, str) else ""


def check_key(key: str) -> None:
    """Raises ValidationError for what cannot be sent as a bearer token."""
    if len(key) > MAX_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ValidationError(f"Write a key of at most {MAX_KEY} ASCII characters, without spaces.")


def seal(key: str, url: str) -> str:
    """The key as it may be kept."""
    return _fernet().encrypt(json.dumps({"key": key, "url": url}).encode()).decode()


def unseal(sealed: str, url: str) -> str:
    """The key for the server at `url`; empty when it has none, or one that was given for another URL or
    sealed with another `SECRET_KEY`."""
    if not sealed or not url:
        return ""
    try:
        kept = json.loads(_fernet().decrypt(sealed.encode()))
    except (InvalidToken, ValueError):
        return ""
    return str(kept["key"]) if kept["url"] == url else ""


def last4(sealed: str, url: str) -> str:
    """What may be shown of it; empty when there is none."""
    key = unseal(sealed, url)
    return key[-4:] if len(key) >= 12 else "***" if key else ""


def _fernet() -> Fernet:
    derived = hmac.digest(settings.SECRET_KEY.encode(), b"roundhouse.upstream-key", hashlib.sha256)
    return Fernet(base64.urlsafe_b64encode(derived))
