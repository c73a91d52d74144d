"""Logging in: Django's own view, with a bound on guessing."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import Any

from django.contrib.auth.forms import AuthenticationForm
from django.contrib.auth.views import LoginView
from django.core.exceptions import NON_FIELD_ERRORS, ValidationError
from django.http import HttpResponse

ATTEMPTS = 5
WINDOW_SECONDS = 15 * 60.0
PLACES_KEPT = 10_000
PASSWORD_CHARACTERS = 1024
"""A longer one is nobody's, and is not hashed."""

Place = tuple[str, str]
"""A name and the address that tries it."""


class Attempts:
    """Wrong passwords per name and address, in this process. Safe in threads."""

    def __init__(self) -> None:
        self._failures: OrderedDict[Place, list[float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait_seconds(self, place: Place) -> int:
        """How long until another attempt is allowed; 0: now."""
        with self._lock:
            recent = self._recent(place)
            if len(recent) < ATTEMPTS:
                return 0
            return max(1, round(recent[0] + WINDOW_SECONDS - time.monotonic()))

    def note_failure(self, place: Place) -> None:
        with self._lock:
            self._failures[place] = [*self._recent(place), time.monotonic()][-ATTEMPTS:]
            self._failures.move_to_end(place)
            while len(self._failures) > PLACES_KEPT:
                self._failures.popitem(last=False)

    def forget(self, place: Place) -> None:
        with self._lock:
            self._failures.pop(place, None)

    def _recent(self, place: Place) -> list[float]:
        horizon = time.monotonic() - WINDOW_SECONDS
        return [at for at in self._failures.get(place, ()) if at > horizon]


attempts = Attempts()


class LoginForm(AuthenticationForm):
    """After five wrong passwords for one name from one address, not even the right one counts for a while."""

    wait_seconds = 0

    def clean(self) -> dict[str, Any]:
        address = self.request.META.get("REMOTE_ADDR", "") if self.request is not None else ""
        place = (str(self.cleaned_data.get("username", ""))[:150].casefold(), address)
        self.wait_seconds = attempts.wait_seconds(place)
        if len(str(self.cleaned_data.get("password", ""))) > PASSWORD_CHARACTERS:
            raise ValidationError(
                f"A password has at most {PASSWORD_CHARACTERS} characters.", code="too_long"
            )
        if self.wait_seconds:
            minutes = -(-self.wait_seconds // 60)
            raise ValidationError(f"Too many wrong passwords. Try again in {minutes} minutes.")
        try:
            cleaned: dict[str, Any] = super().clean()
        except ValidationError:
            attempts.note_failure(place)
            raise
        attempts.forget(place)
        return cleaned


class Login(LoginView):
    template_name = "webchat/login.html"
    authentication_form = LoginForm
    redirect_authenticated_user = True

    def form_invalid(self, form: AuthenticationForm) -> HttpResponse:
        response = super().form_invalid(form)
        wait = getattr(form, "wait_seconds", 0)
        if wait:
            response.status_code = 429
            response["Retry-After"] = str(wait)
        elif form.has_error(NON_FIELD_ERRORS, "too_long"):
            response.status_code = 400
        return response
