from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('registry', '0003_embedding_engine'),
    ]

    operations = [
        migrations.RemoveConstraint(
            model_name='deployment',
            name='deployment_engine_is_known',
        ),
        migrations.AlterField(
            model_name='deployment',
            name='engine',
            field=models.CharField(choices=[('transformers', 'Transformers'), ('vllm', 'vLLM'), ('embedding', 'Embedding'), ('simulated', 'Simulated')], default='transformers', max_length=32),
        ),
        migrations.AlterField(
            model_name='deploymentrevision',
            name='engine',
            field=models.CharField(choices=[('transformers', 'Transformers'), ('vllm', 'vLLM'), ('embedding', 'Embedding'), ('simulated', 'Simulated')], max_length=32),
        ),
        migrations.AddConstraint(
            model_name='deployment',
            constraint=models.CheckConstraint(condition=models.Q(('engine__in', ['transformers', 'vllm', 'embedding', 'simulated'])), name='deployment_engine_is_known'),
        ),
    ]
