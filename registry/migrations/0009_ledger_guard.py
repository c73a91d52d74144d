"""The database itself refuses edits of usage events: triggers, and the one door for retention."""

from django.db import migrations, models
from django.db.models.functions import Now

from registry.ledger_guard import lift_guard, set_guard


def guard(apps, schema_editor):
    set_guard(schema_editor.connection, apps.get_model("registry", "UsageEvent"))


def lift(apps, schema_editor):
    lift_guard(schema_editor.connection)


class Migration(migrations.Migration):
    dependencies = [("registry", "0008_rollup_figures")]

    operations = [
        migrations.CreateModel(
            name="LedgerDoor",
            fields=[
                (
                    "id",
                    models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID"),
                ),
                ("opened_at", models.DateTimeField(db_default=Now())),
                ("why", models.CharField(max_length=64)),
            ],
        ),
        migrations.RunPython(guard, lift),
    ]
