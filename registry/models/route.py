from django.core.validators import MinValueValidator
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
    weight = models.PositiveIntegerField(default=1, validators=[MinValueValidator(1)])

    class Meta:
        ordering = ["route", "id"]
        constraints = [
            models.UniqueConstraint(
                fields=["route", "deployment"], name="one_target_per_route_and_deployment"
            ),
            models.CheckConstraint(condition=models.Q(weight__gte=1), name="route_target_has_weight"),
        ]

    def __str__(self) -> str:
        return f"{self.route} → {self.deployment}"
