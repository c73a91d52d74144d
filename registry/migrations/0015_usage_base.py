"""Usage events tell which route an adapter belongs to: its limits, budgets and price hold for it too."""

from django.db import migrations, models

from registry.ledger_guard import lift_guard


def lift(apps, schema_editor):
    # SQLite drops no column that a trigger names. The guard is set again after every `migrate`.
    lift_guard(schema_editor.connection)


class Migration(migrations.Migration):

    dependencies = [
        ('registry', '0014_upstream'),
    ]

    operations = [
        migrations.AddField(
            model_name='usageevent',
            name='base',
            field=models.CharField(blank=True, db_default='', default='', help_text='Of a route `base:adapter`: the route whose limits, budgets and price hold for it too.', max_length=120),
        ),
        migrations.AlterField(
            model_name='limit',
            name='each_route',
            field=models.BooleanField(default=False, help_text='Each model has an amount of its own, which its adapters share.', verbose_name='each model'),
        ),
        migrations.AlterField(
            model_name='limit',
            name='route',
            field=models.CharField(blank=True, help_text='Concerns this model and its adapters; * stands for any characters. Empty: every model.', max_length=120),
        ),
        migrations.AlterField(
            model_name='price',
            name='route',
            field=models.CharField(blank=True, help_text='The model that clients name; its adapters too, unless they have a price of their own. Empty: every model without a price of its own.', max_length=120),
        ),
        migrations.RunPython(migrations.RunPython.noop, lift),
    ]
