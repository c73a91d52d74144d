from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.utils import timezone

from registry.validators import validate_name


class Route(models.Model):
    """A public model name that clients send; points to one or more deployments."""

    name = models.CharField(
        max_length=120, unique=True, validators=[validate_name], help_text='What clients send as "model".'
    )
    enabled = models.BooleanField(default=True)
    continues = models.BooleanField(
        "goes on with another worker",
        default=True,
        help_text="A streamed text whose worker dies goes on with another, from what was sent. "
        "Otherwise it ends with an error.",
    )
    connect_seconds = models.FloatField(
        default=1.0,
        validators=[MinValueValidator(0.05), MaxValueValidator(60)],
        help_text="Longest time until a worker takes the connection; then another is asked.",
    )
    queue_seconds = models.PositiveIntegerField(
        null=True,
        blank=True,
        validators=[MinValueValidator(1), MaxValueValidator(600)],
        help_text="Longest wait for a free worker. Empty: as its deployments say.",
    )
    first_token_seconds = models.PositiveIntegerField(
        default=600,
        validators=[MinValueValidator(1), MaxValueValidator(86400)],
        help_text="Longest silence of a worker before the first token, or before a whole answer; then "
        "another is asked.",
    )
    idle_seconds = models.PositiveIntegerField(
        default=60,
        validators=[MinValueValidator(1), MaxValueValidator(3600)],
        help_text="Longest silence of a worker within a stream; then another goes on.",
    )
    total_seconds = models.PositiveIntegerField(
        null=True,
        blank=True,
        validators=[MinValueValidator(1), MaxValueValidator(86400)],
        help_text="Longest time for a request from its arrival to the end of its answer. Empty: no limit.",
    )
    deployments = models.ManyToManyField(
        "registry.Deployment", through="registry.RouteTarget", related_name="routes"
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name


class RouteTarget(models.Model):
    """A deployment that answers a route, with its share of the traffic."""

    route = models.ForeignKey(Route, on_delete=models.CASCADE, related_name="targets")
    deployment = models.ForeignKey(
        "registry.Deployment", on_delete=models.CASCADE, related_name="route_targets"
    )
    weight = models.PositiveIntegerField(
        default=1,
        validators=[MinValueValidator(1)],
        help_text="Its share of the requests, among the deployments of the same rank.",
    )
    rank = models.PositiveSmallIntegerField(
        default=0,
        help_text="0: asked first. A higher one is a fallback: asked when none of a lower rank is free, "
        "or each of them has failed the request.",
    )

    class Meta:
        ordering = ["route", "rank", "id"]
        constraints = [
            models.UniqueConstraint(
                fields=["route", "deployment"], name="one_target_per_route_and_deployment"
            ),
            models.CheckConstraint(condition=models.Q(weight__gte=1), name="route_target_has_weight"),
        ]

    def __str__(self) -> str:
        return f"{self.route} → {self.deployment}"
