from django.db import models

from registry.states import Outcome


class UsageHour(models.Model):
    """An hour in which requests started. Whoever appends an event of it marks it stale, in the same
    transaction; rolling it up clears the mark. So a mark says whether its rollups are the whole truth."""

    start = models.DateTimeField(unique=True)
    stale = models.BooleanField(default=True)

    class Meta:
        ordering = ["start"]
        indexes = [
            # What a report must read from the events themselves, and what is to be rolled up.
            models.Index(fields=["start"], name="usage_hour_stale_idx", condition=models.Q(stale=True)),
        ]

    def __str__(self) -> str:
        return f"{self.start:%Y-%m-%d %H}:00 UTC"


class UsageRollup(models.Model):
    """What the events of an hour add up to. Derived: may be thrown away and computed again."""

    hour = models.DateTimeField()
    project_id = models.BigIntegerField()
    project_name = models.CharField(max_length=120)
    key_public_id = models.CharField(max_length=16)
    key_name = models.CharField(max_length=120)
    route = models.CharField(max_length=120)
    endpoint = models.CharField(max_length=64)
    outcome = models.CharField(max_length=16, choices=Outcome)
    requests = models.PositiveBigIntegerField()
    prompt_tokens = models.PositiveBigIntegerField()
    cached_tokens = models.PositiveBigIntegerField()
    completion_tokens = models.PositiveBigIntegerField()
    duration_ms = models.PositiveBigIntegerField(help_text="Sum over the requests that have one.")
    duration_count = models.PositiveBigIntegerField()
    ttft_ms = models.PositiveBigIntegerField(help_text="Sum over the requests that have one.")
    ttft_count = models.PositiveBigIntegerField()

    class Meta:
        ordering = ["-hour"]
        constraints = [
            # Begins with the hour: the report's range is read by it.
            models.UniqueConstraint(
                fields=["hour", "project_id", "key_public_id", "route", "endpoint", "outcome"],
                name="usage_rollup_is_one",
            ),
        ]
        indexes = [models.Index(fields=["key_public_id", "hour"], name="usage_rollup_by_key_idx")]

    def __str__(self) -> str:
        return f"{self.hour:%Y-%m-%d %H}:00 UTC, {self.key_name}, {self.route}, {self.outcome}"
