from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('registry', '0002_usage_rollup'),
    ]

    operations = [
        migrations.RemoveConstraint(
            model_name='deployment',
            name='deployment_engine_is_known',
        ),
        migrations.AlterField(
            model_name='deployment',
            name='engine',
            field=models.CharField(choices=[('transformers', 'Transformers'), ('embedding', 'Embedding'), ('simulated', 'Simulated')], default='transformers', max_length=32),
        ),
        migrations.AlterField(
            model_name='deploymentrevision',
            name='engine',
            field=models.CharField(choices=[('transformers', 'Transformers'), ('embedding', 'Embedding'), ('simulated', 'Simulated')], max_length=32),
        ),
        migrations.AddConstraint(
            model_name='deployment',
            constraint=models.CheckConstraint(condition=models.Q(('engine__in', ['transformers', 'embedding', 'simulated'])), name='deployment_engine_is_known'),
        ),
    ]
