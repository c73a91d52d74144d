import django.core.validators
import django.db.models.deletion
import django.utils.timezone
from django.conf import settings
from django.db import migrations, models
from django.db.models.functions import Coalesce


class Migration(migrations.Migration):
    dependencies = [
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
        ("registry", "0005_keys"),
    ]

    operations = [
        migrations.CreateModel(
            name='Limit',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('route', models.CharField(blank=True, help_text='Concerns this model; * stands for any characters. Empty: every model.', max_length=120)),
                ('each', models.CharField(blank=True, choices=[('key', 'Key'), ('project', 'Project'), ('user', 'User')], help_text='Who has the amount for themselves. Empty: all concerned share it.', max_length=16)),
                ('each_route', models.BooleanField(default=False, help_text='Each model has an amount of its own.', verbose_name='each model')),
                ('metric', models.CharField(choices=[('requests', 'requests'), ('input_tokens', 'input tokens'), ('output_tokens', 'output tokens'), ('tokens', 'tokens'), ('parallel', 'parallel requests')], default='requests', max_length=16)),
                ('amount', models.PositiveBigIntegerField(validators=[django.core.validators.MinValueValidator(1), django.core.validators.MaxValueValidator(1000000000)])),
                ('per', models.CharField(blank=True, choices=[('second', 'Second'), ('minute', 'Minute'), ('hour', 'Hour'), ('day', 'Day')], help_text='Parallel requests have none; all others need one.', max_length=8)),
                ('burst', models.PositiveBigIntegerField(blank=True, help_text='How much may be used at once by who has used nothing for long. Empty: the whole amount.', null=True, validators=[django.core.validators.MinValueValidator(1), django.core.validators.MaxValueValidator(1000000000)])),
                ('when_redis_is_away', models.CharField(choices=[('local', 'local: each gateway counts its share'), ('open', 'open: not limited'), ('closed', 'closed: every request is refused')], default='local', max_length=8, verbose_name='when Redis is away')),
                ('created_at', models.DateTimeField(default=django.utils.timezone.now, editable=False)),
                ('api_key', models.ForeignKey(blank=True, help_text='Concerns this key. Empty: any key.', null=True, on_delete=django.db.models.deletion.CASCADE, related_name='limits', to='registry.apikey', verbose_name='key')),
                ('project', models.ForeignKey(blank=True, help_text='Concerns the keys of this project. Empty: of any project.', null=True, on_delete=django.db.models.deletion.CASCADE, related_name='limits', to='registry.project')),
                ('user', models.ForeignKey(blank=True, help_text='Concerns the keys and chats of this person. Empty: of anybody.', null=True, on_delete=django.db.models.deletion.CASCADE, related_name='limits', to=settings.AUTH_USER_MODEL)),
            ],
            options={
                'ordering': ['id'],
                'constraints': [models.CheckConstraint(condition=models.Q(('metric__in', ['requests', 'input_tokens', 'output_tokens', 'tokens', 'parallel'])), name='limit_metric_is_known'), models.CheckConstraint(condition=models.Q(('per__in', ['', 'second', 'minute', 'hour', 'day'])), name='limit_per_is_known'), models.CheckConstraint(condition=models.Q(('each__in', ['', 'key', 'project', 'user'])), name='limit_each_is_known'), models.CheckConstraint(condition=models.Q(('when_redis_is_away__in', ['local', 'open', 'closed'])), name='limit_when_away_is_known'), models.CheckConstraint(condition=models.Q(models.Q(('metric', 'parallel'), ('per', '')), models.Q(models.Q(('metric', 'parallel'), _negated=True), models.Q(('per', ''), _negated=True)), _connector='OR'), name='limit_has_a_time_unless_parallel'), models.CheckConstraint(condition=models.Q(('amount__gte', 1), ('amount__lte', 1000000000), models.Q(('burst', None), models.Q(('burst__gte', 1), ('burst__lte', 1000000000)), _connector='OR')), name='limit_amounts_are_natural'), models.CheckConstraint(condition=models.Q(models.Q(('api_key', None), ('project', None)), models.Q(('api_key', None), ('user', None)), models.Q(('project', None), ('user', None)), _connector='OR'), name='limit_names_one_subject'), models.UniqueConstraint(Coalesce('api_key', 0, output_field=models.BigIntegerField()), Coalesce('project', 0, output_field=models.BigIntegerField()), Coalesce('user', 0, output_field=models.BigIntegerField()), models.F('route'), models.F('each'), models.F('each_route'), models.F('metric'), models.F('per'), name='one_limit_per_subject_and_metric', violation_error_message='There is a limit of this kind already: change that one.')],
            },
        ),
    ]
