from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import Q
from django.utils import timezone

from registry.states import EngineName, Policy
from registry.validators import (
    UPSTREAM_SOURCE,
    validate_environment,
    validate_host_label,
    validate_object,
    validate_upstream_url,
)


class Deployment(models.Model):
    """The wish: this model, this engine, these arguments, this many replicas."""

    name = models.CharField(max_length=63, unique=True, validators=[validate_host_label])
    language_model = models.ForeignKey(
        "registry.LanguageModel", on_delete=models.PROTECT, related_name="deployments"
    )
    engine = models.CharField(max_length=32, choices=EngineName, default=EngineName.TRANSFORMERS)
    arguments = models.JSONField(
        default=dict,
        blank=True,
        validators=[validate_object],
        help_text='Engine arguments, such as {"dtype": "bfloat16"}.',
    )
    upstream_key = models.TextField(
        blank=True,
        editable=False,
        help_text="Of the server behind an upstream deployment, sealed: see registry.upstreams.",
    )
    environment = models.JSONField(
        default=dict,
        blank=True,
        validators=[validate_environment],
        help_text='Environment variables of the workers, such as {"OMP_NUM_THREADS": "8"}.',
    )
    replicas = models.PositiveIntegerField(default=1, validators=[MaxValueValidator(256)])
    slots = models.PositiveIntegerField(
        default=32,
        validators=[MinValueValidator(1), MaxValueValidator(4096)],
        help_text="Requests that one worker takes at once.",
    )
    node_labels = models.JSONField(
        default=dict,
        blank=True,
        validators=[validate_object],
        help_text="Only nodes that carry all of these labels run its workers.",
    )
    policy = models.CharField(max_length=32, choices=Policy, default=Policy.PREFIX_AFFINITY)
    queue_limit = models.PositiveIntegerField(
        default=128, help_text="Requests that wait when all workers are saturated; one more gets 503."
    )
    queue_tokens = models.PositiveIntegerField(
        null=True,
        blank=True,
        validators=[MinValueValidator(1)],
        help_text="Tokens, of prompts and answers together, that wait at most; one request always may. "
        "Empty: any number.",
    )
    queue_seconds = models.PositiveIntegerField(
        default=30, validators=[MaxValueValidator(600)], help_text="Longest wait in the queue."
    )
    drain_seconds = models.PositiveIntegerField(
        default=60,
        validators=[MaxValueValidator(3600)],
        help_text="Longest time a stopping worker finishes requests.",
    )
    revision = models.ForeignKey(
        "registry.DeploymentRevision", on_delete=models.PROTECT, null=True, related_name="+", editable=False
    )
    wish_changed_at = models.DateTimeField(
        default=timezone.now,
        editable=False,
        help_text="Failures before this do not count: a changed wish, or a restart, gets a fresh try.",
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["name"]
        constraints = [
            models.CheckConstraint(
                condition=Q(engine__in=EngineName.values), name="deployment_engine_is_known"
            ),
            models.CheckConstraint(condition=Q(policy__in=Policy.values), name="deployment_policy_is_known"),
            models.CheckConstraint(condition=Q(slots__gte=1), name="deployment_has_slots"),
        ]

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        if self.engine == EngineName.UPSTREAM:
            if isinstance(self.arguments, dict):
                validate_upstream_url(self.arguments.get("url"))
        elif self.language_model_id and self.language_model.source == UPSTREAM_SOURCE:
            raise ValidationError(
                {"engine": f"{self.language_model} is on another server: only the upstream engine serves it."}
            )


class DeploymentRevision(models.Model):
    """What its workers are started from: immutable and numbered. A new one replaces workers one by one."""

    deployment = models.ForeignKey(Deployment, on_delete=models.CASCADE, related_name="revisions")
    number = models.PositiveIntegerField()
    language_model = models.ForeignKey("registry.LanguageModel", on_delete=models.PROTECT, related_name="+")
    source = models.CharField(max_length=1000)
    chat_template = models.TextField(blank=True)
    engine = models.CharField(max_length=32, choices=EngineName)
    arguments = models.JSONField(default=dict)
    environment = models.JSONField(default=dict)
    slots = models.PositiveIntegerField()
    created_at = models.DateTimeField(default=timezone.now)
    created_by = models.CharField(max_length=150, blank=True)

    class Meta:
        ordering = ["deployment", "-number"]
        constraints = [
            models.UniqueConstraint(fields=["deployment", "number"], name="revision_number_is_unique"),
        ]

    def __str__(self) -> str:
        return f"{self.deployment} r{self.number}"
