from django.db import models
from django.db.models import Q
from django.utils import timezone

from registry.querysets import NodeQuerySet
from registry.states import NodeState
from registry.validators import validate_host_label, validate_object


class Node(models.Model):
    """A machine that can run workers."""

    name = models.CharField(max_length=63, unique=True, validators=[validate_host_label])
    address = models.GenericIPAddressField(help_text="Where gateways reach this node's workers.")
    labels = models.JSONField(
        default=dict,
        blank=True,
        validators=[validate_object],
        help_text='What deployments may ask for, such as {"gpu": "h100"}.',
    )
    secret_digest = models.CharField(max_length=64, editable=False)
    state = models.CharField(max_length=16, choices=NodeState, default=NodeState.JOINING, editable=False)
    state_changed_at = models.DateTimeField(default=timezone.now, editable=False)
    state_reason = models.CharField(max_length=500, blank=True, editable=False)
    cordoned = models.BooleanField(default=False, help_text="Gets no new worker; what runs there goes on.")
    last_seen_at = models.DateTimeField(null=True, editable=False)
    agent_pid = models.PositiveIntegerField(null=True, editable=False)
    version = models.CharField(max_length=40, blank=True, editable=False)
    cores = models.PositiveIntegerField(default=0, editable=False)
    memory_bytes = models.PositiveBigIntegerField(default=0, editable=False)
    memory_free_bytes = models.PositiveBigIntegerField(default=0, editable=False)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = NodeQuerySet.as_manager()

    class Meta:
        ordering = ["name"]
        constraints = [
            models.CheckConstraint(condition=Q(state__in=NodeState.values), name="node_state_is_known"),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def queue(self) -> str:
        """The Celery queue that this node's agent listens to."""
        return f"node.{self.name}"


class JoinToken(models.Model):
    """Lets new nodes join. Only its digest is kept; it is shown once."""

    digest = models.CharField(max_length=64, unique=True, editable=False)
    expires_at = models.DateTimeField()
    uses_left = models.PositiveIntegerField(default=1)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    created_by = models.CharField(max_length=150, blank=True, editable=False)

    class Meta:
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return f"join token of {self.created_at:%Y-%m-%d %H:%M}"
