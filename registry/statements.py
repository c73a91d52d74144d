"""Plain SQL for the few questions that come with every request: both databases answer them sooner than the
ORM has written them.

The text is the same for both. `%s` stands for a value; where a tuple is given, for a list of its values in
parentheses. Instants go in aware of their zone, and come out through `aware`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from itertools import chain
from types import NoneType
from typing import Any

from django.db import connection, models

FEW = 8
"""So many rows are written into one statement."""
_PLAIN = frozenset({str, int, bool, NoneType})


def select(statement: str, *values: Any) -> list[tuple[Any, ...]]:
    """The rows that it finds."""
    with connection.cursor() as cursor:
        cursor.execute(*_told(statement, values))
        rows: list[tuple[Any, ...]] = cursor.fetchall()
    return rows


def change(statement: str, *values: Any) -> int:
    """How many rows it changed."""
    with connection.cursor() as cursor:
        cursor.execute(*_told(statement, values))
        return int(cursor.rowcount)


def insert(model: type[models.Model], columns: tuple[str, ...], rows: Sequence[Sequence[Any]]) -> None:
    """Append rows, at least one. `bulk_create` would ask each field about each value; here they go as they
    are."""
    names = ", ".join(f'"{column}"' for column in columns)
    into = f"INSERT INTO {model._meta.db_table} ({names})"
    told = [[*map(_value, row)] for row in rows]
    places = f"({', '.join(['%s'] * len(columns))})"
    with connection.cursor() as cursor:
        if len(told) <= FEW:
            cursor.execute(f"{into} VALUES {', '.join([places] * len(told))}", [*chain(*told)])
        elif connection.vendor == "postgresql":
            cursor.execute(
                f"{into} {_of_arrays(model, columns)}", [[*each] for each in zip(*told, strict=True)]
            )
        else:
            cursor.executemany(f"{into} VALUES {places}", told)


@cache
def _of_arrays(model: type[models.Model], columns: tuple[str, ...]) -> str:
    """Rows from an array for each column: a short statement to read, however many they are."""
    types = [str(model._meta.get_field(column).db_type(connection)) for column in columns]
    # Without the length of texts: the cast would cut them to it, where the table refuses what is too long.
    arrays = ", ".join(f"%s::{kind.partition('(')[0]}[]" for kind in types)
    return f"SELECT * FROM unnest({arrays})"  # noqa: S608 - names of our own


def aware(instant: datetime) -> datetime:
    """As the database's driver gave it: SQLite's knows no zones, and what we store is UTC."""
    return instant if instant.tzinfo is not None else instant.replace(tzinfo=UTC)


def _told(statement: str, values: Sequence[Any]) -> tuple[str, list[Any]]:
    places: list[str] = []
    told: list[Any] = []
    for value in values:
        if isinstance(value, tuple):
            places.append(f"({', '.join(['%s'] * len(value))})")
            told.extend(map(_value, value))
        else:
            places.append("%s")
            told.append(_value(value))
    return statement % tuple(places), told


def _value(value: Any) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Enum):
        return value.value
    return connection.ops.adapt_datetimefield_value(value) if isinstance(value, datetime) else value
