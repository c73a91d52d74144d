from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import Q
from django.db.models.functions import Coalesce
from django.utils import timezone

from registry.querysets import LimitQuerySet
from registry.rights import validate_routes

AMOUNT_MAX = 1_000_000_000
"""So that what is counted, in the smallest steps of any period, stays exact in a double of Redis' Lua."""


class Metric(models.TextChoices):
    """What a limit counts."""

    REQUESTS = "requests", "requests"
    INPUT_TOKENS = "input_tokens", "input tokens"
    OUTPUT_TOKENS = "output_tokens", "output tokens"
    TOKENS = "tokens", "tokens"
    """Input and output together."""
    PARALLEL = "parallel", "parallel requests"


class Per(models.TextChoices):
    """The time in which the amount may be used. Parallel requests have none."""

    SECOND = "second"
    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"


class Each(models.TextChoices):
    """Who has an amount of their own. Blank: all whom the limit concerns share one."""

    KEY = "key"
    PROJECT = "project"
    USER = "user"


class WhenAway(models.TextChoices):
    """What becomes of a limit while Redis, which counts for all gateways, does not answer."""

    LOCAL = "local", "local: each gateway counts its share"
    OPEN = "open", "open: not limited"
    CLOSED = "closed", "closed: every request is refused"


def _is_natural(field: str) -> Q:
    return Q(**{f"{field}__gte": 1, f"{field}__lte": AMOUNT_MAX})


def _or_nobody(field: str) -> Coalesce:
    # Two rows without one are alike here, which NULL would not be.
    return Coalesce(field, 0, output_field=models.BigIntegerField())


class Limit(models.Model):
    """How much may be used in a time, or at once. All limits that concern a request must have room for it."""

    api_key = models.ForeignKey(
        "registry.ApiKey",
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="limits",
        verbose_name="key",
        help_text="Concerns this key. Empty: any key.",
    )
    project = models.ForeignKey(
        "registry.Project",
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="limits",
        help_text="Concerns the keys of this project. Empty: of any project.",
    )
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="limits",
        help_text="Concerns the keys and chats of this person. Empty: of anybody.",
    )
    route = models.CharField(
        max_length=120,
        blank=True,
        help_text="Concerns this model and its adapters; * stands for any characters. Empty: every model.",
    )
    each = models.CharField(
        max_length=16,
        choices=Each,
        blank=True,
        help_text="Who has the amount for themselves. Empty: all concerned share it.",
    )
    each_route = models.BooleanField(
        "each model",
        default=False,
        help_text="Each model has an amount of its own, which its adapters share.",
    )
    metric = models.CharField(max_length=16, choices=Metric, default=Metric.REQUESTS)
    amount = models.PositiveBigIntegerField(validators=[MinValueValidator(1), MaxValueValidator(AMOUNT_MAX)])
    per = models.CharField(
        max_length=8, choices=Per, blank=True, help_text="Parallel requests have none; all others need one."
    )
    burst = models.PositiveBigIntegerField(
        null=True,
        blank=True,
        validators=[MinValueValidator(1), MaxValueValidator(AMOUNT_MAX)],
        help_text="How much may be used at once by who has used nothing for long. Empty: the whole amount.",
    )
    when_redis_is_away = models.CharField(
        max_length=8, choices=WhenAway, default=WhenAway.LOCAL, verbose_name="when Redis is away"
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = LimitQuerySet.as_manager()

    class Meta:
        ordering = ["id"]
        constraints = [
            models.CheckConstraint(condition=Q(metric__in=Metric.values), name="limit_metric_is_known"),
            models.CheckConstraint(condition=Q(per__in=["", *Per.values]), name="limit_per_is_known"),
            models.CheckConstraint(condition=Q(each__in=["", *Each.values]), name="limit_each_is_known"),
            models.CheckConstraint(
                condition=Q(when_redis_is_away__in=WhenAway.values), name="limit_when_away_is_known"
            ),
            models.CheckConstraint(
                condition=Q(metric=Metric.PARALLEL, per="") | (~Q(metric=Metric.PARALLEL) & ~Q(per="")),
                name="limit_has_a_time_unless_parallel",
            ),
            models.CheckConstraint(
                condition=_is_natural("amount") & (Q(burst=None) | _is_natural("burst")),
                name="limit_amounts_are_natural",
            ),
            models.CheckConstraint(
                condition=Q(api_key=None, project=None)
                | Q(api_key=None, user=None)
                | Q(project=None, user=None),
                name="limit_names_one_subject",
            ),
            models.UniqueConstraint(
                _or_nobody("api_key"),
                _or_nobody("project"),
                _or_nobody("user"),
                "route",
                "each",
                "each_route",
                "metric",
                "per",
                name="one_limit_per_subject_and_metric",
                violation_error_message="There is a limit of this kind already: change that one.",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.concerns}: {self.allows}"[:200]

    def clean(self) -> None:
        """What the constraints say, told per field."""
        errors: dict[str, str] = {}
        if self.metric == Metric.PARALLEL:
            if self.per:
                errors["per"] = "Parallel requests are counted while they run: leave this empty."
            if self.burst is not None:
                errors["burst"] = "Parallel requests have no burst: leave this empty."
        elif not self.per:
            errors["per"] = "Say in which time the amount may be used."
        subjects = [
            name for name in ("api_key", "project", "user") if getattr(self, f"{name}_id") is not None
        ]
        if len(subjects) > 1:
            errors[subjects[1]] = "Name a key, a project or a person, not several of them."
        if self.api_key_id is not None and self.each:
            errors["each"] = "One key shares with nobody: leave this empty."
        elif self.project_id is not None and self.each == Each.PROJECT:
            errors["each"] = "One project shares with no other: leave this empty, or choose key or user."
        elif self.user_id is not None and self.each == Each.USER:
            errors["each"] = "One person shares with nobody: leave this empty, or choose key or project."
        if self.route:
            try:
                validate_routes([self.route])
            except ValidationError as error:
                errors["route"] = " ".join(error.messages)
            else:
                if self.each_route and "*" not in self.route:
                    errors["each_route"] = "One model shares with no other: leave this empty."
        if errors:
            raise ValidationError(errors)

    @property
    def at_once(self) -> int:
        """How much may be used at once by who has used nothing for long."""
        return self.amount if self.burst is None else self.burst

    @property
    def subject(self) -> str:
        """Whose requests are counted together, for messages: `key search`, `each key of project web`."""
        if self.api_key is not None:
            subject = f"key {self.api_key.name}"
        elif self.project is not None:
            subject = f"project {self.project.name}"
        elif self.user is not None:
            subject = f"person {self.user.get_username()}"
        else:
            return f"each {_EACH[self.each]}" if self.each else "everybody together"
        return f"each {_EACH[self.each]} of {subject}" if self.each else subject

    @property
    def concerns(self) -> str:
        """Whose requests, and to what: `each key, on model smollm`."""
        if self.each_route:
            return f"{self.subject}, on each model" + (f" like {self.route}" if self.route else "")
        return f"{self.subject}, on model {self.route}" if self.route else self.subject

    @property
    def allows(self) -> str:
        """`60 requests per minute, 10 at once`."""
        counted = f"{self.amount:,} {Metric(self.metric).label}"
        if self.metric == Metric.PARALLEL:
            return counted
        at_once = f", {self.at_once:,} at once" if self.at_once != self.amount else ""
        return f"{counted} per {self.per}{at_once}"

    @property
    def effect(self) -> str:
        """What it does, as a sentence."""
        away = {
            WhenAway.LOCAL: "While Redis is away each gateway counts its share.",
            WhenAway.OPEN: "While Redis is away it does not hold.",
            WhenAway.CLOSED: "While Redis is away every request that it concerns is refused.",
        }[WhenAway(self.when_redis_is_away)]
        concerns = self.concerns[0].upper() + self.concerns[1:]
        beyond = "What is beyond gets 429 and is told when to try again."
        return f"{concerns}: at most {self.allows}. {beyond} {away}"


_EACH = {"key": "key", "project": "project", "user": "person"}
