from django.db import models
from django.db.models.functions import Now


class Event(models.Model):
    """The timeline of every object: when, what, why, by whom. Append-only."""

    at = models.DateTimeField(db_default=Now())
    kind = models.CharField(max_length=32, help_text="What sort of object: worker, node, deployment, …")
    object_id = models.BigIntegerField()
    object_name = models.CharField(max_length=120)
    what = models.CharField(max_length=64, help_text="What happened, such as the new state.")
    reason = models.CharField(max_length=1000, blank=True)
    by = models.CharField(max_length=150, help_text="A person, or the process that did it.")
    data = models.JSONField(default=dict)

    class Meta:
        ordering = ["-id"]
        indexes = [models.Index(fields=["kind", "object_id", "-id"], name="event_by_object_idx")]

    def __str__(self) -> str:
        return f"{self.kind} {self.object_name}: {self.what}"


class Change(models.Model):
    """The change feed: every gateway polls it and forgets what it had cached of the object."""

    kind = models.CharField(max_length=32)
    key = models.CharField(max_length=120)
    at = models.DateTimeField(db_default=Now(), db_index=True)

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return f"{self.kind} {self.key}"
