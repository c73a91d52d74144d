"""Who a browser's cookie belongs to, for consumers, which Django's middleware does not see."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any, cast

from django.conf import settings
from django.contrib.auth import get_user
from django.http import HttpRequest, parse_cookie


def session_key_of(headers: list[tuple[bytes, bytes]]) -> str | None:
    """The session that the handshake's cookies name."""
    for name, value in headers:
        if name == b"cookie":
            key = parse_cookie(value.decode("latin-1")).get(settings.SESSION_COOKIE_NAME)
            if key:
                return key
    return None


def user_of_session(session_key: str) -> int | None:
    """The id of the person who is logged in with it, if they may be now. In a database thread.

    None when the session ended, the password was changed, or the account was disabled or deleted.
    """
    engine: Any = import_module(settings.SESSION_ENGINE)
    session = engine.SessionStore(session_key)
    # Reads the session, checks its hash against the password's, and asks the backend for the user.
    user = get_user(cast(HttpRequest, SimpleNamespace(session=session)))
    return user.pk if user.is_authenticated and user.is_active else None
