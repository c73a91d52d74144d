"""Prices, budgets with their periods and holds, and what an event says of its cost."""

import django.core.validators
import django.db.models.deletion
import django.db.models.functions.datetime
import django.utils.timezone
from django.db import migrations, models

import registry.models.budget


class Migration(migrations.Migration):
    dependencies = [("registry", "0006_limits")]

    operations = [
        migrations.CreateModel(
            name='Budget',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('scope', models.CharField(choices=[('key', 'Key'), ('project', 'Project'), ('user', 'User'), ('route', 'Route')], max_length=16)),
                ('subject', models.CharField(help_text="A key's public id, a project's or user's number, a route's name.", max_length=120)),
                ('subject_name', models.CharField(blank=True, editable=False, max_length=150)),
                ('unit', models.CharField(choices=[('tokens', 'Tokens'), ('money', 'Money')], default='money', max_length=16)),
                ('period', models.CharField(choices=[('day', 'Day'), ('month', 'Month'), ('total', 'Total')], default='month', max_length=16)),
                ('limit', models.BigIntegerField(help_text='Tokens, or millionths of the currency.', validators=[django.core.validators.MinValueValidator(0), django.core.validators.MaxValueValidator(1000000000000000)])),
                ('hard', models.BooleanField(default=True, help_text='Refuse what could go over it. Otherwise it only gives notice.')),
                ('mail_to', models.CharField(blank=True, help_text='Addresses that get its notices, separated by commas.', max_length=500, validators=[registry.models.budget.validate_addresses])),
                ('webhook_url', models.CharField(blank=True, help_text='URL that gets its notices as JSON, by POST.', max_length=500, validators=[django.core.validators.URLValidator(schemes=['http', 'https'])], verbose_name='web hook')),
                ('starts_at', models.DateTimeField(default=django.utils.timezone.now, editable=False)),
                ('created_by', models.CharField(blank=True, editable=False, max_length=150)),
            ],
            options={
                'ordering': ['scope', 'subject_name', 'unit', 'period', 'hard'],
            },
        ),
        migrations.CreateModel(
            name='BudgetNotice',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('percent', models.PositiveSmallIntegerField()),
                ('spent', models.BigIntegerField(help_text='When it was seen.')),
                ('created_at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                ('mail_open', models.BooleanField(default=False, help_text='Mail is still to be sent.')),
                ('webhook_open', models.BooleanField(default=False, help_text='The web hook is still to be called.')),
                ('tries', models.PositiveSmallIntegerField(default=0)),
                ('next_try_at', models.DateTimeField(help_text='Empty: done, or given up.', null=True)),
            ],
            options={
                'ordering': ['-id'],
            },
        ),
        migrations.CreateModel(
            name='BudgetPeriod',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('start', models.DateTimeField()),
                ('end', models.DateTimeField(help_text='Empty: never.', null=True)),
                ('spent', models.BigIntegerField(default=0)),
                ('held', models.BigIntegerField(default=0)),
            ],
            options={
                'ordering': ['budget', '-start'],
            },
        ),
        migrations.CreateModel(
            name='Hold',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('request_id', models.CharField(max_length=64)),
                ('amount', models.BigIntegerField()),
                ('price_id', models.BigIntegerField(help_text='The price when the request was admitted.', null=True)),
                ('gateway', models.CharField(blank=True, max_length=80)),
                ('created_at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
            ],
        ),
        migrations.CreateModel(
            name='Price',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('route', models.CharField(blank=True, help_text='The model that clients name. Empty: every model without a price of its own.', max_length=120)),
                ('starts_at', models.DateTimeField(default=django.utils.timezone.now, help_text='Requests that begin from here on pay it. Of two with one instant the later entry counts.')),
                ('input_micros', models.BigIntegerField(default=0, help_text='Millionths of the currency per million prompt tokens.', validators=[django.core.validators.MinValueValidator(0), django.core.validators.MaxValueValidator(10000000000)])),
                ('cached_micros', models.BigIntegerField(blank=True, help_text='The same for prompt tokens that came from a cache. Empty: as other prompt tokens.', null=True, validators=[django.core.validators.MinValueValidator(0), django.core.validators.MaxValueValidator(10000000000)])),
                ('output_micros', models.BigIntegerField(default=0, help_text='The same for generated tokens.', validators=[django.core.validators.MinValueValidator(0), django.core.validators.MaxValueValidator(10000000000)])),
                ('request_micros', models.BigIntegerField(default=0, help_text='Millionths of the currency for each answered request.', validators=[django.core.validators.MinValueValidator(0), django.core.validators.MaxValueValidator(10000000000)])),
                ('gpu_second_micros', models.BigIntegerField(default=0, help_text='Millionths of the currency for each second between the end of the wait in the queue and the end of the answer.', validators=[django.core.validators.MinValueValidator(0), django.core.validators.MaxValueValidator(10000000000)])),
                ('created_at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), editable=False)),
                ('created_by', models.CharField(blank=True, editable=False, max_length=150)),
            ],
            options={
                'ordering': ['route', '-starts_at', '-id'],
            },
        ),
        migrations.AddField(
            model_name='usageevent',
            name='corrects',
            field=models.CharField(blank=True, db_default='', default='', help_text='Request id of the event whose cost this one corrects; it is no request of its own.', max_length=64),
        ),
        migrations.AddField(
            model_name='usageevent',
            name='cost_micros',
            field=models.BigIntegerField(db_default=0, default=0, help_text='Millionths of the currency. Negative in a correction.'),
        ),
        migrations.AddField(
            model_name='usageevent',
            name='flagged',
            field=models.CharField(blank=True, db_default='', default='', help_text='What is odd about its figures.', max_length=100),
        ),
        migrations.AddField(
            model_name='usageevent',
            name='price_id',
            field=models.BigIntegerField(help_text='The price that it was charged by.', null=True),
        ),
        migrations.AlterField(
            model_name='usageevent',
            name='request_id',
            field=models.CharField(max_length=80, unique=True),
        ),
        migrations.AddIndex(
            model_name='usageevent',
            index=models.Index(condition=models.Q(('corrects', ''), _negated=True), fields=['corrects'], name='usage_corrections_idx'),
        ),
        migrations.AddConstraint(
            model_name='usageevent',
            constraint=models.CheckConstraint(condition=models.Q(('cost_micros__gte', 0), models.Q(('corrects', ''), _negated=True), _connector='OR'), name='usage_cost_is_not_negative'),
        ),
        migrations.AddConstraint(
            model_name='budget',
            constraint=models.UniqueConstraint(fields=('scope', 'subject', 'unit', 'period', 'hard'), name='budget_is_one'),
        ),
        migrations.AddConstraint(
            model_name='budget',
            constraint=models.CheckConstraint(condition=models.Q(('limit__gte', 0), ('limit__lte', 1000000000000000)), name='budget_limit_within_bounds'),
        ),
        migrations.AddConstraint(
            model_name='budget',
            constraint=models.CheckConstraint(condition=models.Q(('scope__in', ['key', 'project', 'user', 'route'])), name='budget_scope_is_known'),
        ),
        migrations.AddConstraint(
            model_name='budget',
            constraint=models.CheckConstraint(condition=models.Q(('unit__in', ['tokens', 'money'])), name='budget_unit_is_known'),
        ),
        migrations.AddConstraint(
            model_name='budget',
            constraint=models.CheckConstraint(condition=models.Q(('period__in', ['day', 'month', 'total'])), name='budget_period_is_known'),
        ),
        migrations.AddField(
            model_name='budgetperiod',
            name='budget',
            field=models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='periods', to='registry.budget'),
        ),
        migrations.AddField(
            model_name='budgetnotice',
            name='budget_period',
            field=models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='notices', to='registry.budgetperiod'),
        ),
        migrations.AddField(
            model_name='hold',
            name='budget_period',
            field=models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='holds', to='registry.budgetperiod'),
        ),
        migrations.AddIndex(
            model_name='price',
            index=models.Index(fields=['route', '-starts_at', '-id'], name='price_in_force_idx'),
        ),
        migrations.AddConstraint(
            model_name='price',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('cached_micros__isnull', True), models.Q(('cached_micros__gte', 0), ('cached_micros__lte', 10000000000)), _connector='OR'), ('input_micros__gte', 0), ('input_micros__lte', 10000000000), ('output_micros__gte', 0), ('output_micros__lte', 10000000000), ('request_micros__gte', 0), ('request_micros__lte', 10000000000), ('gpu_second_micros__gte', 0), ('gpu_second_micros__lte', 10000000000)), name='price_within_bounds'),
        ),
        migrations.AddConstraint(
            model_name='budgetperiod',
            constraint=models.UniqueConstraint(fields=('budget', 'start'), name='budget_period_is_one'),
        ),
        migrations.AddConstraint(
            model_name='budgetperiod',
            constraint=models.CheckConstraint(condition=models.Q(('spent__gte', 0)), name='budget_spent_is_not_negative'),
        ),
        migrations.AddConstraint(
            model_name='budgetperiod',
            constraint=models.CheckConstraint(condition=models.Q(('held__gte', 0)), name='budget_held_is_not_negative'),
        ),
        migrations.AddConstraint(
            model_name='budgetperiod',
            constraint=models.CheckConstraint(condition=models.Q(('end__isnull', True), ('end__gt', models.F('start')), _connector='OR'), name='budget_period_has_a_length'),
        ),
        migrations.AddIndex(
            model_name='budgetnotice',
            index=models.Index(condition=models.Q(('next_try_at__isnull', False)), fields=['next_try_at'], name='budget_notice_open_idx'),
        ),
        migrations.AddConstraint(
            model_name='budgetnotice',
            constraint=models.UniqueConstraint(fields=('budget_period', 'percent'), name='budget_notice_is_one'),
        ),
        migrations.AddIndex(
            model_name='hold',
            index=models.Index(fields=['created_at'], name='hold_by_age_idx'),
        ),
        migrations.AddConstraint(
            model_name='hold',
            constraint=models.UniqueConstraint(fields=('request_id', 'budget_period'), name='hold_is_one'),
        ),
        migrations.AddConstraint(
            model_name='hold',
            constraint=models.CheckConstraint(condition=models.Q(('amount__gte', 0)), name='hold_is_not_negative'),
        ),
    ]
