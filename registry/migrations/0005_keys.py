import django.core.validators
import django.db.models.deletion
import django.utils.timezone
from django.conf import settings
from django.db import migrations, models

import registry.rights

PRIORITIES = [
    ("interactive", "interactive: before the others"),
    ("default", "default"),
    ("batch", "batch: after the others"),
]


def _check_now(schema_editor):
    # PostgreSQL changes no table on which checks are still to come at the end of the transaction.
    if schema_editor.connection.vendor == "postgresql":
        schema_editor.execute("SET CONSTRAINTS ALL IMMEDIATE")
        schema_editor.execute("SET CONSTRAINTS ALL DEFERRED")


def copy_to_secrets(apps, schema_editor):
    ApiKey, KeySecret = apps.get_model("registry", "ApiKey"), apps.get_model("registry", "KeySecret")
    names = ("pk", "digest", "pepper", "last4", "created_at", "last_used_at")
    secrets = (
        KeySecret(
            api_key_id=pk,
            digest=digest,
            pepper=pepper,
            last4=last4,
            created_at=created_at,
            last_used_at=last_used_at,
        )
        for pk, digest, pepper, last4, created_at, last_used_at in ApiKey.objects.order_by("pk")
        .values_list(*names)
        .iterator(chunk_size=2000)
    )
    KeySecret.objects.bulk_create(secrets, batch_size=2000)
    _check_now(schema_editor)


def copy_to_keys(apps, schema_editor):
    """A key has room for one secret: the newest stays."""
    KeySecret = apps.get_model("registry", "KeySecret")
    ApiKey = apps.get_model("registry", "ApiKey")
    for secret in KeySecret.objects.order_by("pk").iterator(chunk_size=2000):
        ApiKey.objects.filter(pk=secret.api_key_id).update(
            digest=secret.digest, pepper=secret.pepper, last4=secret.last4
        )
    _check_now(schema_editor)


def index_names(apps, schema_editor):
    """The list's search asks for beginnings, in any case."""
    if schema_editor.connection.vendor == "postgresql":
        schema_editor.execute(
            "CREATE INDEX api_key_name_idx ON registry_apikey (upper(name) text_pattern_ops)"
        )
        schema_editor.execute("CREATE INDEX api_key_last4_idx ON registry_apikey (last4)")


def unindex_names(apps, schema_editor):
    if schema_editor.connection.vendor == "postgresql":
        schema_editor.execute("DROP INDEX api_key_name_idx")
        schema_editor.execute("DROP INDEX api_key_last4_idx")


class Migration(migrations.Migration):
    dependencies = [
        ("registry", "0004_vllm_engine"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.AddField(
            model_name="project",
            name="time_zone",
            field=models.CharField(
                default="UTC",
                help_text="In which budgets begin their days and months, such as Europe/Vienna.",
                max_length=64,
                validators=[registry.rights.validate_zone],
            ),
        ),
        migrations.AddField(
            model_name="project",
            name="routes",
            field=models.JSONField(
                blank=True,
                default=list,
                help_text="Route names that its keys may use at most; * stands for any characters. "
                "Empty: every route.",
                validators=[registry.rights.validate_routes],
            ),
        ),
        migrations.AddField(
            model_name="project",
            name="scopes",
            field=models.JSONField(
                blank=True,
                default=list,
                help_text="Endpoints that its keys may use at most. Empty: all.",
                validators=[registry.rights.validate_scopes],
            ),
        ),
        migrations.AddField(
            model_name="project",
            name="priority",
            field=models.CharField(
                choices=PRIORITIES,
                default="default",
                help_text="The highest that its members may give to a key.",
                max_length=16,
            ),
        ),
        migrations.AddField(
            model_name="project",
            name="key_days",
            field=models.PositiveIntegerField(
                blank=True,
                help_text="Keys that members issue end after this many days at most. "
                "Empty: they need not end.",
                null=True,
                validators=[
                    django.core.validators.MinValueValidator(1),
                    django.core.validators.MaxValueValidator(3650),
                ],
            ),
        ),
        migrations.AddField(
            model_name="project",
            name="max_keys",
            field=models.PositiveIntegerField(
                blank=True,
                help_text="How many of its keys may be usable at once. Empty: any number.",
                null=True,
            ),
        ),
        migrations.AddConstraint(
            model_name="project",
            constraint=models.CheckConstraint(
                condition=models.Q(("priority__in", ["interactive", "default", "batch"])),
                name="project_priority_is_known",
            ),
        ),
        migrations.CreateModel(
            name="Membership",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "role",
                    models.CharField(
                        choices=[
                            ("owner", "owner: any key of the project"),
                            ("member", "member: keys of their own"),
                            ("viewer", "viewer: sees keys"),
                        ],
                        default="member",
                        max_length=16,
                    ),
                ),
                ("created_at", models.DateTimeField(default=django.utils.timezone.now, editable=False)),
                (
                    "project",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="memberships",
                        to="registry.project",
                    ),
                ),
                (
                    "user",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="project_memberships",
                        to=settings.AUTH_USER_MODEL,
                    ),
                ),
            ],
            options={"ordering": ["project", "user"]},
        ),
        migrations.AddConstraint(
            model_name="membership",
            constraint=models.UniqueConstraint(
                fields=("project", "user"), name="one_role_per_project_and_person"
            ),
        ),
        migrations.AddConstraint(
            model_name="membership",
            constraint=models.CheckConstraint(
                condition=models.Q(("role__in", ["owner", "member", "viewer"])),
                name="membership_role_is_known",
            ),
        ),
        migrations.AddField(
            model_name="project",
            name="members",
            field=models.ManyToManyField(
                related_name="projects", through="registry.Membership", to=settings.AUTH_USER_MODEL
            ),
        ),
        migrations.AddField(
            model_name="apikey",
            name="owner",
            field=models.ForeignKey(
                blank=True,
                help_text="A person whom it ends with: refused while they are disabled. "
                "Empty: a program's.",
                null=True,
                on_delete=django.db.models.deletion.SET_NULL,
                related_name="api_keys",
                to=settings.AUTH_USER_MODEL,
            ),
        ),
        migrations.AddField(
            model_name="apikey",
            name="scopes",
            field=models.JSONField(
                blank=True,
                default=list,
                help_text="Endpoints that it may use. Empty: all.",
                validators=[registry.rights.validate_scopes],
            ),
        ),
        migrations.AddField(
            model_name="apikey",
            name="cidrs",
            field=models.JSONField(
                blank=True,
                default=list,
                help_text="Networks from which it may be used, such as 10.0.0.0/8. Empty: from everywhere.",
                validators=[registry.rights.validate_cidrs],
                verbose_name="addresses",
            ),
        ),
        migrations.AddField(
            model_name="apikey",
            name="priority",
            field=models.CharField(
                choices=PRIORITIES, default="default", help_text="When all workers are busy.", max_length=16
            ),
        ),
        migrations.AddField(
            model_name="apikey",
            name="metadata",
            field=models.JSONField(
                blank=True,
                default=dict,
                help_text='Notes for programs, such as {"team": "search"}.',
                validators=[registry.rights.validate_metadata],
            ),
        ),
        migrations.AlterField(
            model_name="apikey",
            name="routes",
            field=models.JSONField(
                blank=True,
                default=list,
                help_text="Route names that it may use; * stands for any characters. Empty: every route.",
                validators=[registry.rights.validate_routes],
            ),
        ),
        migrations.AddConstraint(
            model_name="apikey",
            constraint=models.CheckConstraint(
                condition=models.Q(("priority__in", ["interactive", "default", "batch"])),
                name="api_key_priority_is_known",
            ),
        ),
        # From here on: the secret moves to a table of its own.
        migrations.CreateModel(
            name="KeySecret",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "digest",
                    models.CharField(
                        editable=False, help_text="HMAC-SHA256 of the whole key.", max_length=64
                    ),
                ),
                (
                    "pepper",
                    models.PositiveSmallIntegerField(
                        editable=False, help_text="Which numbered pepper the digest used."
                    ),
                ),
                ("last4", models.CharField(editable=False, max_length=4)),
                ("created_at", models.DateTimeField(default=django.utils.timezone.now, editable=False)),
                (
                    "expires_at",
                    models.DateTimeField(
                        editable=False,
                        help_text="Set by a rotation. Empty: as long as the key.",
                        null=True,
                    ),
                ),
                ("last_used_at", models.DateTimeField(editable=False, null=True)),
                (
                    "api_key",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="secrets",
                        to="registry.apikey",
                    ),
                ),
            ],
            options={"ordering": ["-id"]},
        ),
        # On the way back the columns come without their contents; what follows here then fills them.
        migrations.AlterField(
            model_name="apikey",
            name="digest",
            field=models.CharField(default="", editable=False, max_length=64),
        ),
        migrations.AlterField(
            model_name="apikey",
            name="pepper",
            field=models.PositiveSmallIntegerField(default=0, editable=False),
        ),
        migrations.RunPython(copy_to_secrets, copy_to_keys),
        migrations.RemoveField(model_name="apikey", name="digest"),
        migrations.RemoveField(model_name="apikey", name="pepper"),
        migrations.AlterField(
            model_name="apikey",
            name="last4",
            field=models.CharField(editable=False, help_text="Of the newest secret.", max_length=4),
        ),
        # The lists.
        migrations.AddIndex(
            model_name="apikey",
            index=models.Index(fields=["-created_at", "-id"], name="api_key_newest_idx"),
        ),
        migrations.AddIndex(
            model_name="apikey",
            index=models.Index(fields=["project", "-created_at", "-id"], name="api_key_by_project_idx"),
        ),
        migrations.AlterField(
            model_name="apikey",
            name="project",
            field=models.ForeignKey(
                db_index=False,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="api_keys",
                to="registry.project",
            ),
        ),
        migrations.RunPython(index_names, unindex_names),
    ]
