from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import Q
from django.db.models.functions import Now
from django.utils import timezone

MOST_MICROS = 10**10
"""Of one price: ten thousand of the currency. With it no request's cost leaves 64 bits by far."""

_BOUNDS = [MinValueValidator(0), MaxValueValidator(MOST_MICROS)]


def _within(component: str) -> Q:
    return Q(**{f"{component}__gte": 0, f"{component}__lte": MOST_MICROS})


class Price(models.Model):
    """What a request on a route costs from an instant on. Append-only: the next price ends it.

    Per route, not per language model: the route is what the client names and what the ledger keeps, and
    it is known when a budget is reserved, before a deployment is chosen. Integer millionths of the
    currency (`ROUNDHOUSE_CURRENCY`) everywhere.
    """

    route = models.CharField(
        max_length=120,
        blank=True,
        help_text="The model that clients name; its adapters too, unless they have a price of their own. "
        "Empty: every model without a price of its own.",
    )
    starts_at = models.DateTimeField(
        default=timezone.now,
        help_text="Requests that begin from here on pay it. Of two with one instant the later entry counts.",
    )
    input_micros = models.BigIntegerField(
        default=0, validators=_BOUNDS, help_text="Millionths of the currency per million prompt tokens."
    )
    cached_micros = models.BigIntegerField(
        null=True,
        blank=True,
        validators=_BOUNDS,
        help_text="The same for prompt tokens that came from a cache. Empty: as other prompt tokens.",
    )
    output_micros = models.BigIntegerField(
        default=0, validators=_BOUNDS, help_text="The same for generated tokens."
    )
    request_micros = models.BigIntegerField(
        default=0, validators=_BOUNDS, help_text="Millionths of the currency for each answered request."
    )
    gpu_second_micros = models.BigIntegerField(
        default=0,
        validators=_BOUNDS,
        help_text="Millionths of the currency for each second between the end of the wait in the queue and "
        "the end of the answer.",
    )
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    created_by = models.CharField(max_length=150, blank=True, editable=False)

    class Meta:
        ordering = ["route", "-starts_at", "-id"]
        constraints = [
            models.CheckConstraint(
                condition=(Q(cached_micros__isnull=True) | _within("cached_micros"))
                & _within("input_micros")
                & _within("output_micros")
                & _within("request_micros")
                & _within("gpu_second_micros"),
                name="price_within_bounds",
            ),
        ]
        indexes = [models.Index(fields=["route", "-starts_at", "-id"], name="price_in_force_idx")]

    def __str__(self) -> str:
        return f"{self.route or 'every other model'} from {self.starts_at:%Y-%m-%d %H:%M} UTC"
