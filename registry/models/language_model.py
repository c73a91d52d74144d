from typing import Any

from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import Q
from django.utils import timezone

from registry.chat_templates import problem_of
from registry.states import COPY_UNDER_WAY, CopyState, EngineName
from registry.validators import UPSTREAM_SOURCE, validate_name, validate_source


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

    def clean(self) -> None:
        if self.chat_template and (problem := problem_of(self.chat_template)):
            raise ValidationError({"chat_template": f"This is no chat template: {problem}"})
        if self.pk and self.source == UPSTREAM_SOURCE:
            others = self.deployments.exclude(engine=EngineName.UPSTREAM)
            if named := ", ".join(others.values_list("name", flat=True)[:10]):
                raise ValidationError({"source": f"Its files are needed here, by the deployment(s) {named}."})


class UnwantedCopy(models.Model):
    """Files of a model that was removed with them, on a node that has not said yet that they are gone."""

    node = models.ForeignKey("registry.Node", on_delete=models.CASCADE, related_name="unwanted_copies")
    model_name = models.CharField(max_length=120)
    source = models.CharField(max_length=1000)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        verbose_name_plural = "unwanted copies"
        ordering = ["node", "model_name"]
        constraints = [
            models.UniqueConstraint(fields=["node", "model_name", "source"], name="unwanted_copy_is_one"),
        ]

    def __str__(self) -> str:
        return f"{self.model_name} on {self.node}"


class ModelCopy(models.Model):
    """A language model's files on one node."""

    language_model = models.ForeignKey(LanguageModel, on_delete=models.CASCADE, related_name="copies")
    node = models.ForeignKey("registry.Node", on_delete=models.CASCADE, related_name="copies")
    state = models.CharField(max_length=16, choices=CopyState)
    step = models.CharField(max_length=100, blank=True)
    done = models.PositiveBigIntegerField(default=0)
    total = models.PositiveBigIntegerField(default=0, help_text="0 while unknown.")
    unit = models.CharField(max_length=16, default="bytes")
    files_done = models.PositiveBigIntegerField(default=0)
    files_total = models.PositiveBigIntegerField(default=0, help_text="0 for a step that counts no files.")
    step_began_at = models.DateTimeField(null=True)
    step_began_done = models.PositiveBigIntegerField(
        default=0, help_text="What was done when the step began: a fetch may go on from an earlier one."
    )
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

    @property
    def seconds_left(self) -> float | None:
        """Until the present step is done at the pace it had so far; None while that cannot be told."""
        if self.state not in COPY_UNDER_WAY or self.step_began_at is None:
            return None
        seconds = (self.updated_at - self.step_began_at).total_seconds()
        got = self.done - self.step_began_done
        if seconds <= 0 or got <= 0 or self.done > self.total:
            return None
        return (self.total - self.done) * seconds / got

    def progress(self) -> dict[str, Any]:
        """How far the present step is, by the names of `inference.words.progress_in_words`."""
        return {
            "step": self.step,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "files_done": self.files_done,
            "files_total": self.files_total,
            "seconds_left": self.seconds_left,
        }
