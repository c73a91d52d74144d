"""How fast a model's files come: what a step had when it began, and how many files it has."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("registry", "0012_route_times")]

    operations = [
        migrations.AddField(
            model_name="modelcopy", name="files_done", field=models.PositiveBigIntegerField(default=0)
        ),
        migrations.AddField(
            model_name="modelcopy",
            name="files_total",
            field=models.PositiveBigIntegerField(
                default=0, help_text="0 for a step that counts no files."
            ),
        ),
        migrations.AddField(
            model_name="modelcopy", name="step_began_at", field=models.DateTimeField(null=True)
        ),
        migrations.AddField(
            model_name="modelcopy",
            name="step_began_done",
            field=models.PositiveBigIntegerField(
                default=0,
                help_text="What was done when the step began: a fetch may go on from an earlier one.",
            ),
        ),
    ]
