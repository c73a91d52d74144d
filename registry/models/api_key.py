from datetime import datetime

from django.conf import settings
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import Q
from django.utils import timezone

from registry.querysets import ApiKeyQuerySet
from registry.rights import (
    Priority,
    Role,
    validate_cidrs,
    validate_metadata,
    validate_routes,
    validate_scopes,
    validate_zone,
)


class Project(models.Model):
    """Owns keys; usage is added up per project. What it does not allow, none of its keys may do."""

    name = models.CharField(max_length=120, unique=True)
    time_zone = models.CharField(
        max_length=64,
        default="UTC",
        validators=[validate_zone],
        help_text="In which budgets begin their days and months, such as Europe/Vienna.",
    )
    routes = models.JSONField(
        default=list,
        blank=True,
        validators=[validate_routes],
        help_text="Route names that its keys may use at most; * stands for any characters. "
        "Empty: every route.",
    )
    scopes = models.JSONField(
        default=list,
        blank=True,
        validators=[validate_scopes],
        help_text="Endpoints that its keys may use at most. Empty: all.",
    )
    priority = models.CharField(
        max_length=16,
        choices=Priority,
        default=Priority.DEFAULT,
        help_text="The highest that its members may give to a key.",
    )
    key_days = models.PositiveIntegerField(
        null=True,
        blank=True,
        validators=[MinValueValidator(1), MaxValueValidator(3650)],
        help_text="Keys that members issue end after this many days at most. Empty: they need not end.",
    )
    max_keys = models.PositiveIntegerField(
        null=True, blank=True, help_text="How many of its keys may be usable at once. Empty: any number."
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    members = models.ManyToManyField(
        settings.AUTH_USER_MODEL, through="registry.Membership", related_name="projects"
    )

    class Meta:
        ordering = ["name"]
        constraints = [
            models.CheckConstraint(
                condition=Q(priority__in=Priority.values), name="project_priority_is_known"
            ),
        ]

    def __str__(self) -> str:
        return self.name


class Membership(models.Model):
    """A person's role in a project. Given and taken by administrators only."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="memberships")
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="project_memberships"
    )
    role = models.CharField(max_length=16, choices=Role, default=Role.MEMBER)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["project", "user"]
        constraints = [
            models.UniqueConstraint(fields=["project", "user"], name="one_role_per_project_and_person"),
            models.CheckConstraint(condition=Q(role__in=Role.values), name="membership_role_is_known"),
        ]

    def __str__(self) -> str:
        return f"{self.user} in {self.project}: {self.role}"


class ApiKey(models.Model):
    """Lets a program in. Its public id stays over rotations; what proves it is in its secrets."""

    name = models.CharField(max_length=120, help_text="Who or what uses it; shown in reports.")
    project = models.ForeignKey(Project, on_delete=models.PROTECT, related_name="api_keys", db_index=False)
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="api_keys",
        help_text="A person whom it ends with: refused while they are disabled. Empty: a program's.",
    )
    public_id = models.CharField(max_length=16, unique=True, editable=False)
    last4 = models.CharField(max_length=4, editable=False, help_text="Of the newest secret.")
    routes = models.JSONField(
        default=list,
        blank=True,
        validators=[validate_routes],
        help_text="Route names that it may use; * stands for any characters. Empty: every route.",
    )
    scopes = models.JSONField(
        default=list,
        blank=True,
        validators=[validate_scopes],
        help_text="Endpoints that it may use. Empty: all.",
    )
    cidrs = models.JSONField(
        "addresses",
        default=list,
        blank=True,
        validators=[validate_cidrs],
        help_text="Networks from which it may be used, such as 10.0.0.0/8. Empty: from everywhere.",
    )
    priority = models.CharField(
        max_length=16, choices=Priority, default=Priority.DEFAULT, help_text="When all workers are busy."
    )
    metadata = models.JSONField(
        default=dict,
        blank=True,
        validators=[validate_metadata],
        help_text='Notes for programs, such as {"team": "search"}.',
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
        constraints = [
            models.CheckConstraint(
                condition=Q(priority__in=Priority.values), name="api_key_priority_is_known"
            ),
        ]
        indexes = [
            # The list's order, over all and per project; the primary key decides between equals.
            models.Index(fields=["-created_at", "-id"], name="api_key_newest_idx"),
            models.Index(fields=["project", "-created_at", "-id"], name="api_key_by_project_idx"),
        ]

    def __str__(self) -> str:
        return f"{self.name} (sk-{self.public_id}-…{self.last4})"

    def usable(self, now: datetime) -> bool:
        """True unless revoked or expired at `now`."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class KeySecret(models.Model):
    """What proves a key: the digest of its text, which is kept nowhere. Rotating adds one."""

    api_key = models.ForeignKey(ApiKey, on_delete=models.CASCADE, related_name="secrets")
    digest = models.CharField(max_length=64, editable=False, help_text="HMAC-SHA256 of the whole key.")
    pepper = models.PositiveSmallIntegerField(
        editable=False, help_text="Which numbered pepper the digest used."
    )
    last4 = models.CharField(max_length=4, editable=False)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    expires_at = models.DateTimeField(
        null=True, editable=False, help_text="Set by a rotation. Empty: as long as the key."
    )
    last_used_at = models.DateTimeField(null=True, editable=False)

    class Meta:
        ordering = ["-id"]

    def __str__(self) -> str:
        return f"…{self.last4}"

    def usable(self, now: datetime) -> bool:
        """True unless a rotation ended it by `now`; the key itself may have ended all the same."""
        return self.expires_at is None or now < self.expires_at
