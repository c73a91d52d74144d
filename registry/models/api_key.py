from datetime import datetime

from django.db import models
from django.utils import timezone

from registry.querysets import ApiKeyQuerySet


class Project(models.Model):
    """Owns keys; usage is added up per project."""

    name = models.CharField(max_length=120, unique=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name


class ApiKey(models.Model):
    """Lets a program in. Shown once; kept are a public id to look it up and a digest to prove it."""

    name = models.CharField(max_length=120, help_text="Who or what uses it; shown in reports.")
    project = models.ForeignKey(Project, on_delete=models.PROTECT, related_name="api_keys")
    public_id = models.CharField(max_length=16, unique=True, editable=False)
    digest = models.CharField(max_length=64, editable=False, help_text="HMAC-SHA256 of the whole key.")
    pepper = models.PositiveSmallIntegerField(
        editable=False, help_text="Which numbered pepper the digest used."
    )
    last4 = models.CharField(max_length=4, editable=False)
    routes = models.JSONField(
        default=list, blank=True, help_text="Route names that it may use. Empty: every route."
    )
    expires_at = models.DateTimeField(null=True, blank=True, help_text="Empty: never.")
    revoked_at = models.DateTimeField(null=True, editable=False)
    last_used_at = models.DateTimeField(null=True, editable=False)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    created_by = models.CharField(max_length=150, blank=True, editable=False)

    objects = ApiKeyQuerySet.as_manager()

    class Meta:
        verbose_name = "API key"
        verbose_name_plural = "API keys"
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return f"{self.name} (sk-{self.public_id}-…{self.last4})"

    def usable(self, now: datetime) -> bool:
        """True unless revoked or expired at `now`."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)
