from django.db import models
from django.db.models import Q

from registry.states import Outcome


class UsageEvent(models.Model):
    """One accounted request. Append-only: names are copied, so it outlives what it names."""

    request_id = models.CharField(max_length=64, unique=True)
    started_at = models.DateTimeField()
    project_id = models.BigIntegerField()
    project_name = models.CharField(max_length=120)
    key_public_id = models.CharField(max_length=16)
    key_name = models.CharField(max_length=120)
    route = models.CharField(max_length=120)
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

    class Meta:
        ordering = ["-started_at", "-id"]
        constraints = [
            models.CheckConstraint(condition=Q(outcome__in=Outcome.values), name="usage_outcome_is_known"),
            models.CheckConstraint(
                condition=Q(cached_tokens__lte=models.F("prompt_tokens")), name="usage_cached_within_prompt"
            ),
        ]
        indexes = [
            # The report's question: one key's, or everybody's, requests within a range.
            models.Index(fields=["key_public_id", "started_at"], name="usage_by_key_idx"),
            models.Index(fields=["started_at"], name="usage_by_time_idx"),
        ]

    def __str__(self) -> str:
        return self.request_id
