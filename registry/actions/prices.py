"""Prices: set, never edited. And what a changed price means for what was charged already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import Q

from registry.actions.events import record_event
from registry.actions.usage import charge, record_usage
from registry.adapters import model_names
from registry.costs import PriceBook
from registry.errors import InvalidInput
from registry.models import Price, UsageEvent
from registry.querysets import database_now

RERATED_AT_ONCE = 500
"""Events looked at in one transaction."""
COMPONENTS = ("input_micros", "cached_micros", "output_micros", "request_micros", "gpu_second_micros")


@transaction.atomic
def set_price(*, price: Price, by: str) -> Price:
    """Add a price; it ends the one before. Raises InvalidInput.

    With a start in the past it counts for what is charged from now on; what was charged before is put
    right by `rerate`.
    """
    price.pk = None
    price.created_by = by[:150]
    price.created_at = database_now()
    if price.route and price.route not in model_names():
        raise InvalidInput("route", f"There is no route {price.route}.")
    try:
        price.full_clean()
    except ValidationError as error:
        field, messages = next(iter(error.message_dict.items()))
        raise InvalidInput(field, " ".join(messages)) from error
    price.save(force_insert=True)
    components = {name: getattr(price, name) for name in COMPONENTS}
    record_event(price, "set", by=by, data=components)
    return price


@dataclass(slots=True, kw_only=True)
class Rerating:
    """What re-rating changed, or would change."""

    events: int = 0
    """Looked at."""
    corrected: int = 0
    difference_micros: int = 0


def rerate(*, since: datetime, until: datetime, route: str | None = None, dry_run: bool = True) -> Rerating:
    """Charge requests that began within [since, until) by the prices that are in force for them now; of one
    route with its adapters, if it is named.

    An event is never edited: the difference is a row of its own, `<request id>#r<n>`, and goes to the same
    budgets. Running it again finds nothing to do. A transaction per `RERATED_AT_ONCE` events: what was
    done stays done if it is broken off.
    """
    done = Rerating()
    for batch in _batches(since, until, route):
        with transaction.atomic():
            corrections = _corrections(batch)
            if not dry_run:
                record_usage(corrections)
        done.events += len(batch)
        done.corrected += len(corrections)
        done.difference_micros += sum(correction.cost_micros for correction in corrections)
    return done


def _batches(since: datetime, until: datetime, route: str | None) -> Iterator[list[UsageEvent]]:
    # Uses index usage_by_time_idx.
    events = UsageEvent.objects.filter(started_at__gte=since, started_at__lt=until, corrects="")
    if route is not None:
        events = events.filter(Q(route=route) | Q(base=route))
    events = events.order_by("started_at", "id")
    batch = list(events[:RERATED_AT_ONCE])
    while batch:
        yield batch
        last = batch[-1]
        after = Q(started_at__gt=last.started_at) | Q(started_at=last.started_at, id__gt=last.pk)
        batch = list(events.filter(after)[:RERATED_AT_ONCE])


def _corrections(batch: list[UsageEvent]) -> list[UsageEvent]:
    earlier: dict[str, list[int]] = {}
    # Uses index usage_corrections_idx.
    rows = UsageEvent.objects.filter(corrects__in=[event.request_id for event in batch])
    for corrects, difference in rows.exclude(corrects="").values_list("corrects", "cost_micros"):
        earlier.setdefault(corrects, []).append(difference)
    book = PriceBook({name for event in batch for name in (event.route, event.base)})
    corrections = []
    for event in batch:
        differences = earlier.get(event.request_id, [])
        charged = event.cost_micros + sum(differences)
        due, price_id = charge(event, book.in_force(event.route, event.started_at, event.base))
        if due != charged:
            corrections.append(_correction(event, due - charged, price_id, number=len(differences) + 1))
    return corrections


def _correction(event: UsageEvent, difference: int, price_id: int | None, *, number: int) -> UsageEvent:
    copied = ("started_at", "project_id", "project_name", "key_public_id", "key_name", "route", "base")
    more = ("deployment", "worker", "endpoint", "stream", "status", "outcome", "gateway")
    return UsageEvent(
        **{name: getattr(event, name) for name in (*copied, *more)},
        request_id=f"{event.request_id}#r{number}",
        corrects=event.request_id,
        cost_micros=difference,
        price_id=price_id,
        attempts=0,
    )
