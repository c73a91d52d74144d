"""Routes have fallbacks and times of their own; queues are bounded in tokens too."""

import django.core.validators
from django.db import migrations, models


def _between(least: float, most: float) -> list[object]:
    return [django.core.validators.MinValueValidator(least), django.core.validators.MaxValueValidator(most)]


class Migration(migrations.Migration):
    dependencies = [("registry", "0011_route_continues")]

    operations = [
        migrations.AddField(
            model_name="route",
            name="connect_seconds",
            field=models.FloatField(
                default=1.0,
                help_text="Longest time until a worker takes the connection; then another is asked.",
                validators=_between(0.05, 60),
            ),
        ),
        migrations.AddField(
            model_name="route",
            name="queue_seconds",
            field=models.PositiveIntegerField(
                blank=True,
                help_text="Longest wait for a free worker. Empty: as its deployments say.",
                null=True,
                validators=_between(1, 600),
            ),
        ),
        migrations.AddField(
            model_name="route",
            name="first_token_seconds",
            field=models.PositiveIntegerField(
                default=600,
                help_text="Longest silence of a worker before the first token, or before a whole answer; "
                "then another is asked.",
                validators=_between(1, 86400),
            ),
        ),
        migrations.AddField(
            model_name="route",
            name="idle_seconds",
            field=models.PositiveIntegerField(
                default=60,
                help_text="Longest silence of a worker within a stream; then another goes on.",
                validators=_between(1, 3600),
            ),
        ),
        migrations.AddField(
            model_name="route",
            name="total_seconds",
            field=models.PositiveIntegerField(
                blank=True,
                help_text="Longest time for a request from its arrival to the end of its answer. "
                "Empty: no limit.",
                null=True,
                validators=_between(1, 86400),
            ),
        ),
        migrations.AddField(
            model_name="routetarget",
            name="rank",
            field=models.PositiveSmallIntegerField(
                default=0,
                help_text="0: asked first. A higher one is a fallback: asked when none of a lower rank is "
                "free, or each of them has failed the request.",
            ),
        ),
        migrations.AlterField(
            model_name="routetarget",
            name="weight",
            field=models.PositiveIntegerField(
                default=1,
                help_text="Its share of the requests, among the deployments of the same rank.",
                validators=[django.core.validators.MinValueValidator(1)],
            ),
        ),
        migrations.AlterModelOptions(name="routetarget", options={"ordering": ["route", "rank", "id"]}),
        migrations.AddField(
            model_name="deployment",
            name="queue_tokens",
            field=models.PositiveIntegerField(
                blank=True,
                help_text="Tokens, of prompts and answers together, that wait at most; one request always "
                "may. Empty: any number.",
                null=True,
                validators=[django.core.validators.MinValueValidator(1)],
            ),
        ),
    ]
