"""Four more dispatch policies, one of them the new default."""

from django.db import migrations, models

POLICIES = [
    ("prefix_affinity", "Prefix affinity: where the prompt's beginning is in the cache"),
    ("least_tokens", "Least tokens: the fewest tokens to do per unit of speed"),
    ("shortest_queue", "Shortest queue: the fewest requests per unit of speed"),
    ("power_of_two", "Power of two: the less loaded of two at random"),
    ("round_robin", "Round robin: each in its turn"),
    ("lottery", "Lottery: at random, weighted by measured speed"),
]


def only_known_before(apps, schema_editor):
    deployments = apps.get_model("registry", "Deployment").objects
    deployments.exclude(policy__in=["shortest_queue", "lottery"]).update(policy="shortest_queue")


class Migration(migrations.Migration):
    dependencies = [("registry", "0009_ledger_guard")]

    operations = [
        migrations.RemoveConstraint(model_name="deployment", name="deployment_policy_is_known"),
        migrations.RunPython(migrations.RunPython.noop, only_known_before),
        migrations.AlterField(
            model_name="deployment",
            name="policy",
            field=models.CharField(choices=POLICIES, default="prefix_affinity", max_length=32),
        ),
        migrations.AddConstraint(
            model_name="deployment",
            constraint=models.CheckConstraint(
                condition=models.Q(("policy__in", [name for name, _ in POLICIES])),
                name="deployment_policy_is_known",
            ),
        ),
    ]
