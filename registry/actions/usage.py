"""The ledger's one way in. What an event costs, and which budgets it uses up, is settled with it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from django.db import transaction

from registry.actions.budgets import open_holds, settle, within_holds
from registry.actions.rollups import hour_of, mark_stale
from registry.costs import PriceBook, cost_micros
from registry.models import Price, UsageEvent
from registry.statements import insert, select
from registry.states import Outcome

_RECORDED = "SELECT request_id FROM registry_usageevent WHERE request_id IN %s"
_COLUMNS = tuple(field.attname for field in UsageEvent._meta.concrete_fields if not field.primary_key)
_figures = attrgetter(*_COLUMNS)

MORE_THAN_HELD = "used more than it could"
"""A flag: more than its prompt and what it asked for allow, as a worker that miscounts reports it."""


@transaction.atomic
def record_usage(events: Sequence[UsageEvent]) -> None:
    """Append events, charge them, and settle them with the budgets, all in one transaction. An event whose
    request id is in the ledger already is left as it stands there: a batch may be brought twice (the sender
    died after the commit), and counts once.

    An event may come long after its hour: it marks that hour stale, so that it is added up again.
    """
    if not events:
        return
    # First of all, for it locks the hours until the end: whoever brings the same events in this moment waits
    # here, and finds them in the ledger afterwards. So "new" below is certain, and settled once.
    mark_stale(hour_of(event.started_at) for event in events)
    unique = {event.request_id: event for event in reversed(events)}
    known = {request_id for (request_id,) in select(_RECORDED, tuple(unique))}
    new = [event for event in reversed(unique.values()) if event.request_id not in known]
    if not new:
        return
    holds = open_holds(event.request_id for event in new)
    book = PriceBook({name for event in new for name in (event.route, event.base)})
    for event in new:
        if event.corrects:
            continue
        held = holds.get(event.request_id, ())
        # The price at admission, where there was one: what was set aside is then enough.
        price = (
            book.by_id(held[0].price_id) if held else book.in_force(event.route, event.started_at, event.base)
        )
        event.cost_micros, event.price_id = charge(event, price)
        if not within_holds(event, held):
            event.flagged = event.flagged or MORE_THAN_HELD
    # Conflicts are not ignored: none is left, and SQLite would also swallow an event that breaks a check.
    insert(UsageEvent, _COLUMNS, [*map(_figures, new)])
    settle(new, holds)


def charge(event: UsageEvent, price: Price | None) -> tuple[int, int | None]:
    """What an event costs by a price, and the number of the price. What was not answered costs nothing."""
    if price is None or not _answered(event):
        return 0, None
    cost = cost_micros(
        price,
        prompt_tokens=event.prompt_tokens,
        cached_tokens=event.cached_tokens,
        completion_tokens=event.completion_tokens,
        milliseconds=max(0, (event.duration_ms or 0) - (event.queue_ms or 0)),
    )
    return cost, price.pk


def _answered(event: UsageEvent) -> bool:
    """False too for one whose client left, or whose gateway died, before anything was counted: it may not
    even have been let through by its budgets, which would pay for what nobody set aside."""
    if event.outcome == Outcome.OK:
        return True
    return event.outcome != Outcome.FAILED and bool(event.prompt_tokens or event.completion_tokens)
