"""Streams go on with another worker; a route may say otherwise."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("registry", "0010_policies")]

    operations = [
        migrations.AddField(
            model_name="route",
            name="continues",
            field=models.BooleanField(
                default=True,
                help_text="A streamed text whose worker dies goes on with another, from what was sent. "
                "Otherwise it ends with an error.",
                verbose_name="goes on with another worker",
            ),
        ),
    ]
