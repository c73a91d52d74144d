"""Routes: the public model names."""

from __future__ import annotations

from django.db import transaction

from registry.actions.events import publish_change, record_event
from registry.models import Route


@transaction.atomic
def note_route_change(*, route: Route, what: str, by: str) -> None:
    """A route or its targets were edited: tell the gateways and the timeline."""
    record_event(route, what, by=by)
    publish_change("route", route.name)
