"""Triggers that keep usage events as they are: the database refuses UPDATE and DELETE of them.

An update that changes nothing passes: that is how a batch brought twice is left as it stands. The one way
past is a row in `LedgerDoor`, within the transaction that deletes (`registry.actions.retention`): no other
transaction ever sees it. PostgreSQL refuses TRUNCATE too; in SQLite emptying a table is a DELETE.

Set by a migration, and again after every `migrate`: SQLite loses a table's triggers when a later migration
rebuilds the table, and they must name the columns that it has then.
"""

from __future__ import annotations

from typing import Any

from django.apps import apps as global_apps
from django.db import connections, models
from django.db.backends.base.base import BaseDatabaseWrapper

EVENTS = "registry_usageevent"
DOOR = "registry_ledgerdoor"
REFUSAL = "usage events are append-only"
TRIGGERS = ("usage_event_keeps_update", "usage_event_keeps_delete", "usage_event_keeps_truncate")


def set_guard(connection: BaseDatabaseWrapper, event_model: type[models.Model]) -> None:
    """Put the triggers in place, instead of those that may be there."""
    lift_guard(connection)
    columns = [str(field.column) for field in event_model._meta.concrete_fields]
    _execute(connection, _statements(connection, columns))


def lift_guard(connection: BaseDatabaseWrapper) -> None:
    """Take the triggers away. For migrations, and for tests that empty the tables."""
    if connection.vendor == "postgresql":
        _execute(
            connection,
            [
                *(f"DROP TRIGGER IF EXISTS {name} ON {EVENTS}" for name in TRIGGERS),
                "DROP FUNCTION IF EXISTS usage_event_keeps()",
            ],
        )
    else:
        _execute(connection, [f"DROP TRIGGER IF EXISTS {name}" for name in TRIGGERS])


def guard_after_migrate(*, using: str, apps: Any = global_apps, **_: Any) -> None:
    """Set the guard as far as the database has been migrated (`post_migrate`; after a flush it does not say
    how far that is)."""
    try:
        apps.get_model("registry", "LedgerDoor")
        event_model = apps.get_model("registry", "UsageEvent")
    except LookupError:
        # It was migrated back to before there was a guard.
        return
    set_guard(connections[using], event_model)


def _statements(connection: BaseDatabaseWrapper, columns: list[str]) -> list[str]:
    update, delete, truncate = TRIGGERS
    if connection.vendor == "postgresql":
        return [
            f"""
            CREATE FUNCTION usage_event_keeps() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF TG_OP = 'DELETE' AND EXISTS (SELECT 1 FROM {DOOR}) THEN
                    RETURN OLD;
                END IF;
                RAISE EXCEPTION '{REFUSAL}' USING ERRCODE = 'integrity_constraint_violation';
            END $$
            """,  # noqa: S608 - made of the constants above
            f"CREATE TRIGGER {update} BEFORE UPDATE ON {EVENTS} FOR EACH ROW "
            "WHEN (OLD.* IS DISTINCT FROM NEW.*) EXECUTE FUNCTION usage_event_keeps()",
            f"CREATE TRIGGER {delete} BEFORE DELETE ON {EVENTS} FOR EACH ROW "
            "EXECUTE FUNCTION usage_event_keeps()",
            f"CREATE TRIGGER {truncate} BEFORE TRUNCATE ON {EVENTS} FOR EACH STATEMENT "
            "EXECUTE FUNCTION usage_event_keeps()",
        ]
    closed = f"NOT EXISTS (SELECT 1 FROM {DOOR})"  # noqa: S608 - made of a constant
    changed = " OR ".join(f'OLD."{column}" IS NOT NEW."{column}"' for column in columns)
    return [
        f"CREATE TRIGGER {update} BEFORE UPDATE ON {EVENTS} WHEN {changed} "
        f"BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END",
        f"CREATE TRIGGER {delete} BEFORE DELETE ON {EVENTS} WHEN {closed} "
        f"BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END",
    ]


def _execute(connection: BaseDatabaseWrapper, statements: list[str]) -> None:
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
