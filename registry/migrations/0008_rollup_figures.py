from django.db import migrations, models

SUMS = [
    ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
    ("project_id", models.BigIntegerField()),
    ("project_name", models.CharField(max_length=120)),
    ("key_public_id", models.CharField(max_length=16)),
    ("key_name", models.CharField(max_length=120)),
    ("route", models.CharField(max_length=120)),
    ("endpoint", models.CharField(max_length=64)),
    (
        "outcome",
        models.CharField(
            choices=[
                ("ok", "Ok"),
                ("aborted", "Aborted"),
                ("interrupted", "Interrupted"),
                ("failed", "Failed"),
            ],
            max_length=16,
        ),
    ),
    ("status", models.PositiveSmallIntegerField()),
    ("requests", models.PositiveBigIntegerField()),
    ("prompt_tokens", models.PositiveBigIntegerField()),
    ("cached_tokens", models.PositiveBigIntegerField()),
    ("completion_tokens", models.PositiveBigIntegerField()),
    (
        "cost_micros",
        models.BigIntegerField(default=0, help_text="Negative where more was corrected than used."),
    ),
    ("duration_ms", models.PositiveBigIntegerField(help_text="Sum over the requests that have one.")),
    ("duration_count", models.PositiveBigIntegerField()),
    ("ttft_ms", models.PositiveBigIntegerField(help_text="Sum over the requests that have one.")),
    ("ttft_count", models.PositiveBigIntegerField()),
    (
        "histograms",
        models.JSONField(
            default=dict, help_text="For each of queue, ttft, e2e and speed: bucket and number of requests."
        ),
    ),
]


def add_up_again(apps, schema_editor):
    """Rollups are derived: those of other columns are thrown away, and control computes them anew."""
    apps.get_model("registry", "UsageRollup").objects.all().delete()
    apps.get_model("registry", "UsageHour").objects.update(stale=True)


class Migration(migrations.Migration):
    dependencies = [("registry", "0007_budgets_and_prices")]

    operations = [
        migrations.RunPython(add_up_again, migrations.RunPython.noop),
        migrations.AddField(
            "usagehour",
            "sealed_at_event",
            models.BigIntegerField(
                null=True,
                help_text="Number of the last event that its rollups have; those up to it may be gone by "
                "retention.",
            ),
        ),
        migrations.RemoveConstraint("usagerollup", "usage_rollup_is_one"),
        migrations.AddField(
            "usagerollup", "status", models.PositiveSmallIntegerField(default=0), preserve_default=False
        ),
        migrations.AddField(
            "usagerollup",
            "cost_micros",
            models.BigIntegerField(default=0, help_text="Negative where more was corrected than used."),
        ),
        migrations.AddField(
            "usagerollup",
            "histograms",
            models.JSONField(
                default=dict,
                help_text="For each of queue, ttft, e2e and speed: bucket and number of requests.",
            ),
        ),
        migrations.AddConstraint(
            "usagerollup",
            models.UniqueConstraint(
                fields=("hour", "project_id", "key_public_id", "route", "endpoint", "outcome", "status"),
                name="usage_rollup_is_one",
            ),
        ),
        migrations.CreateModel(
            name="UsageDay",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("start", models.DateTimeField(unique=True)),
                ("stale", models.BooleanField(default=True)),
            ],
            options={
                "ordering": ["start"],
                "indexes": [
                    models.Index(
                        condition=models.Q(("stale", True)), fields=["start"], name="usage_day_stale_idx"
                    )
                ],
            },
        ),
        migrations.CreateModel(
            name="UsageSummary",
            fields=[
                *SUMS,
                (
                    "grain",
                    models.PositiveSmallIntegerField(
                        choices=[(1, "Project Hour"), (2, "Day"), (3, "Project Day")]
                    ),
                ),
                ("start", models.DateTimeField()),
            ],
            options={
                "ordering": ["grain", "-start"],
                "indexes": [
                    models.Index(fields=["key_public_id", "grain", "start"], name="usage_summary_by_key_idx")
                ],
                "constraints": [
                    models.UniqueConstraint(
                        fields=(
                            "grain",
                            "start",
                            "project_id",
                            "key_public_id",
                            "route",
                            "endpoint",
                            "outcome",
                            "status",
                        ),
                        name="usage_summary_is_one",
                    )
                ],
            },
        ),
        migrations.CreateModel(
            name="UsageAudit",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("checked_at", models.DateTimeField()),
                ("since", models.DateTimeField()),
                ("until", models.DateTimeField()),
                ("hours", models.PositiveIntegerField(help_text="How many were compared.")),
                (
                    "differences",
                    models.JSONField(
                        default=list,
                        help_text="The hours that differed, with what the events and the rollups said.",
                    ),
                ),
            ],
            options={
                "ordering": ["-checked_at"],
                "indexes": [models.Index(fields=["-checked_at"], name="usage_audit_newest_idx")],
            },
        ),
        # Runs first when this is taken back: what the narrower constraint could not hold is gone then.
        migrations.RunPython(migrations.RunPython.noop, add_up_again),
    ]
