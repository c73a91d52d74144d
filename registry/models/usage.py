from django.db import models
from django.db.models import Q
from django.db.models.functions import Now

from registry.states import Outcome


class UsageEvent(models.Model):
    """One accounted request. Append-only: names are copied, so it outlives what it names."""

    request_id = models.CharField(max_length=80, unique=True)
    started_at = models.DateTimeField()
    project_id = models.BigIntegerField()
    project_name = models.CharField(max_length=120)
    key_public_id = models.CharField(max_length=16)
    key_name = models.CharField(max_length=120)
    route = models.CharField(max_length=120)
    base = models.CharField(
        max_length=120,
        blank=True,
        default="",
        db_default="",
        help_text="Of a route `base:adapter`: the route whose limits, budgets and price hold for it too.",
    )
    deployment = models.CharField(max_length=63, blank=True)
    worker = models.CharField(max_length=100, blank=True)
    endpoint = models.CharField(max_length=64)
    stream = models.BooleanField(default=False)
    status = models.PositiveSmallIntegerField(help_text="HTTP status that the client got; 499: it left.")
    outcome = models.CharField(max_length=16, choices=Outcome)
    prompt_tokens = models.PositiveIntegerField(default=0)
    cached_tokens = models.PositiveIntegerField(default=0)
    completion_tokens = models.PositiveIntegerField(default=0)
    attempts = models.PositiveSmallIntegerField(default=1, help_text="Workers tried.")
    queue_ms = models.PositiveIntegerField(null=True)
    ttft_ms = models.PositiveIntegerField(null=True)
    duration_ms = models.PositiveIntegerField(null=True)
    gateway = models.CharField(max_length=63)
    cost_micros = models.BigIntegerField(
        default=0, db_default=0, help_text="Millionths of the currency. Negative in a correction."
    )
    price_id = models.BigIntegerField(null=True, help_text="The price that it was charged by.")
    corrects = models.CharField(
        max_length=64,
        blank=True,
        default="",
        db_default="",
        help_text="Request id of the event whose cost this one corrects; it is no request of its own.",
    )
    flagged = models.CharField(
        max_length=100, blank=True, default="", db_default="", help_text="What is odd about its figures."
    )

    class Meta:
        ordering = ["-started_at", "-id"]
        constraints = [
            models.CheckConstraint(condition=Q(outcome__in=Outcome.values), name="usage_outcome_is_known"),
            models.CheckConstraint(
                condition=Q(cached_tokens__lte=models.F("prompt_tokens")), name="usage_cached_within_prompt"
            ),
            models.CheckConstraint(
                condition=Q(cost_micros__gte=0) | ~Q(corrects=""), name="usage_cost_is_not_negative"
            ),
        ]
        indexes = [
            # The report's question: one key's, or everybody's, requests within a range.
            models.Index(fields=["key_public_id", "started_at"], name="usage_by_key_idx"),
            models.Index(fields=["started_at"], name="usage_by_time_idx"),
            models.Index(fields=["corrects"], name="usage_corrections_idx", condition=~Q(corrects="")),
        ]

    def __str__(self) -> str:
        return self.request_id


class LedgerDoor(models.Model):
    """The one way past the triggers that keep usage events as they are: a row of it, within the transaction
    that deletes events (`registry.actions.retention`). Nobody else may ever see one."""

    opened_at = models.DateTimeField(db_default=Now())
    why = models.CharField(max_length=64)

    def __str__(self) -> str:
        return self.why
