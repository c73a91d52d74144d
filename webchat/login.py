"""Logging in, to the pages and to the admin: Django's own views, with a bound on guessing."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_network
from typing import Any, NamedTuple

from django.contrib import admin
from django.contrib.admin.forms import AdminAuthenticationForm
from django.contrib.auth.forms import AuthenticationForm
from django.contrib.auth.views import LoginView
from django.core.exceptions import NON_FIELD_ERRORS, ValidationError
from django.http import HttpRequest, HttpResponse

from openai_api.auth import sender_of


class Bound(NamedTuple):
    most: int
    seconds: float


OF_NAME = Bound(5, 15 * 60.0)
"""Wrong passwords for one name from one address."""
OF_ADDRESS = Bound(50, 3600.0)
"""Wrong passwords from one address, whatever the names."""
PLACES_KEPT = 10_000
PASSWORD_CHARACTERS = 1024
"""A longer one is nobody's, and is not hashed."""


class Place(NamedTuple):
    """Where a password is tried."""

    name: str
    address: str


class Attempts:
    """Wrong passwords, in this process. Safe in threads."""

    def __init__(self) -> None:
        self._at: OrderedDict[tuple[str | None, str], list[float]] = OrderedDict()
        """When they were tried, by name and address, and by address alone."""
        self._lock = threading.Lock()

    def begin(self, place: Place) -> int:
        """How long until an attempt is allowed. 0: now, and it counts as a wrong one from here on, so that
        many at once are no more than many in turn."""
        now = time.monotonic()
        with self._lock:
            recent = [(key, bound, self._recent(key, bound, now)) for key, bound in _bounds(place)]
            waits = [at[0] + bound.seconds - now for _, bound, at in recent if len(at) >= bound.most]
            if waits:
                return max(1, round(max(waits)))
            for key, _, at in recent:
                self._at[key] = [*at, now]
                self._at.move_to_end(key)
            while len(self._at) > PLACES_KEPT:
                self._at.popitem(last=False)
            return 0

    def take_back(self, place: Place) -> None:
        """It was no wrong password after all: those that this name had before are forgotten, too."""
        with self._lock:
            self._at.pop(place, None)
            if others := self._at.get((None, place.address)):
                others.pop()

    def _recent(self, key: tuple[str | None, str], bound: Bound, now: float) -> list[float]:
        return [at for at in self._at.get(key, ()) if at > now - bound.seconds]


def _bounds(place: Place) -> Iterator[tuple[tuple[str | None, str], Bound]]:
    yield place, OF_NAME
    yield (None, place.address), OF_ADDRESS


attempts = Attempts()


def _address(request: HttpRequest | None) -> str:
    """Of whoever asks; of IPv6 the network, for one person has as many addresses as they like."""
    found = sender_of(request) if request is not None else None
    return str(ip_network((found, 64), strict=False) if isinstance(found, IPv6Address) else found)


class LoginForm(AuthenticationForm):
    """After five wrong passwords for one name from one address, or fifty from an address, not even the right
    one counts for a while."""

    wait_seconds = 0

    def clean(self) -> dict[str, Any]:
        if len(str(self.cleaned_data.get("password", ""))) > PASSWORD_CHARACTERS:
            raise ValidationError(
                f"A password has at most {PASSWORD_CHARACTERS} characters.", code="too_long"
            )
        name = str(self.cleaned_data.get("username", ""))[:150].casefold()
        place = Place(name, _address(self.request))
        self.wait_seconds = attempts.begin(place)
        if self.wait_seconds:
            minutes = -(-self.wait_seconds // 60)
            raise ValidationError(f"Too many wrong passwords. Try again in {minutes} minutes.")
        wrong = False
        try:
            cleaned: dict[str, Any] = super().clean()
        except ValidationError:
            wrong = True
            raise
        finally:
            if not wrong:
                attempts.take_back(place)
        return cleaned


class AdminLoginForm(LoginForm, AdminAuthenticationForm):
    """The same for staff."""


class Login(LoginView):
    template_name = "webchat/login.html"
    authentication_form = LoginForm
    redirect_authenticated_user = True

    def form_invalid(self, form: AuthenticationForm) -> HttpResponse:
        return _with_status(super().form_invalid(form), form)


def admin_login(request: HttpRequest) -> HttpResponse:
    """The admin's own page; its form is `AdminLoginForm`."""
    response = admin.site.login(request)
    context = getattr(response, "context_data", None) or {}
    return _with_status(response, context.get("form"))


def _with_status(response: HttpResponse, form: Any) -> HttpResponse:
    if wait := getattr(form, "wait_seconds", 0):
        response.status_code = 429
        response["Retry-After"] = str(wait)
    elif form is not None and form.has_error(NON_FIELD_ERRORS, "too_long"):
        response.status_code = 400
    return response
