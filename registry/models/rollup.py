from django.db import models

from registry.states import Outcome


class UsageHour(models.Model):
    """An hour in which requests started. Whoever appends an event of it marks it stale, in the same
    transaction; rolling it up clears the mark. So a mark says whether its rollups are the whole truth."""

    start = models.DateTimeField(unique=True)
    stale = models.BooleanField(default=True)
    sealed_at_event = models.BigIntegerField(
        null=True,
        help_text="Number of the last event that its rollups have; those up to it may be gone by retention.",
    )

    class Meta:
        ordering = ["start"]
        indexes = [
            # What a report must read from the events themselves, and what is to be rolled up.
            models.Index(fields=["start"], name="usage_hour_stale_idx", condition=models.Q(stale=True)),
        ]

    def __str__(self) -> str:
        return f"{self.start:%Y-%m-%d %H}:00 UTC"


class UsageDay(models.Model):
    """A day of UTC that has rollups. Whoever rolls up an hour of it marks it stale, in the same
    transaction; adding up its hours clears the mark."""

    start = models.DateTimeField(unique=True)
    stale = models.BooleanField(default=True)

    class Meta:
        ordering = ["start"]
        indexes = [
            models.Index(fields=["start"], name="usage_day_stale_idx", condition=models.Q(stale=True)),
        ]

    def __str__(self) -> str:
        return f"{self.start:%Y-%m-%d} UTC"


class UsageSums(models.Model):
    """What requests add up to. `status` is the exact one: its class, and the cause of an error, follow."""

    project_id = models.BigIntegerField()
    project_name = models.CharField(max_length=120)
    key_public_id = models.CharField(max_length=16)
    key_name = models.CharField(max_length=120)
    route = models.CharField(max_length=120)
    endpoint = models.CharField(max_length=64)
    outcome = models.CharField(max_length=16, choices=Outcome)
    status = models.PositiveSmallIntegerField()
    requests = models.PositiveBigIntegerField()
    prompt_tokens = models.PositiveBigIntegerField()
    cached_tokens = models.PositiveBigIntegerField()
    completion_tokens = models.PositiveBigIntegerField()
    cost_micros = models.BigIntegerField(default=0, help_text="Negative where more was corrected than used.")
    duration_ms = models.PositiveBigIntegerField(help_text="Sum over the requests that have one.")
    duration_count = models.PositiveBigIntegerField()
    ttft_ms = models.PositiveBigIntegerField(help_text="Sum over the requests that have one.")
    ttft_count = models.PositiveBigIntegerField()
    histograms = models.JSONField(
        default=dict, help_text="For each of queue, ttft, e2e and speed: bucket and number of requests."
    )

    class Meta:
        abstract = True


class UsageRollup(UsageSums):
    """What the events of an hour add up to. Derived: may be thrown away and computed again, as long as the
    events are kept."""

    hour = models.DateTimeField()

    class Meta:
        ordering = ["-hour"]
        constraints = [
            # Begins with the hour: the report's range is read by it.
            models.UniqueConstraint(
                fields=["hour", "project_id", "key_public_id", "route", "endpoint", "outcome", "status"],
                name="usage_rollup_is_one",
            ),
        ]
        indexes = [models.Index(fields=["key_public_id", "hour"], name="usage_rollup_by_key_idx")]

    def __str__(self) -> str:
        return f"{self.hour:%Y-%m-%d %H}:00 UTC, {self.key_name}, {self.route}, {self.outcome}"


class Grain(models.IntegerChoices):
    """What rows of summaries leave out of the hourly rollups."""

    PROJECT_HOUR = 1
    """The key."""
    DAY = 2
    """The hour."""
    PROJECT_DAY = 3
    """Both."""


class UsageSummary(UsageSums):
    """Rollups added up further, so that a report reads hundreds of rows where there are many thousands of
    rollups. Where the grain leaves out the key, its columns are empty."""

    grain = models.PositiveSmallIntegerField(choices=Grain)
    start = models.DateTimeField()

    class Meta:
        ordering = ["grain", "-start"]
        constraints = [
            models.UniqueConstraint(
                fields=[
                    "grain",
                    "start",
                    "project_id",
                    "key_public_id",
                    "route",
                    "endpoint",
                    "outcome",
                    "status",
                ],
                name="usage_summary_is_one",
            ),
        ]
        indexes = [models.Index(fields=["key_public_id", "grain", "start"], name="usage_summary_by_key_idx")]

    def __str__(self) -> str:
        return f"{self.start:%Y-%m-%d %H}:00 UTC, {self.get_grain_display()}, {self.route}, {self.outcome}"


class UsageAudit(models.Model):
    """One comparison of the rollups with the ledger."""

    checked_at = models.DateTimeField()
    since = models.DateTimeField()
    until = models.DateTimeField()
    hours = models.PositiveIntegerField(help_text="How many were compared.")
    differences = models.JSONField(
        default=list, help_text="The hours that differed, with what the events and the rollups said."
    )

    class Meta:
        ordering = ["-checked_at"]
        indexes = [models.Index(fields=["-checked_at"], name="usage_audit_newest_idx")]

    def __str__(self) -> str:
        return f"{self.checked_at:%Y-%m-%d %H:%M} UTC: {len(self.differences)} of {self.hours} hours differed"
