"""Django middleware for all pages."""

from __future__ import annotations

from collections.abc import Callable

from django.db import DataError
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest


class Unaskable:
    """A word of the URL that the database cannot be asked for, such as a number longer than its own or a
    text with a NUL, is a mistake of who asks: 400. The admin's filters take any word there is."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        if request.method == "GET" and request.GET and isinstance(exception, DataError | OverflowError):
            return HttpResponseBadRequest("The database cannot be asked for this.", content_type="text/plain")
        return None
