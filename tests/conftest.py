"""Fixtures that need Django. Tests of code that runs without it live in `tests/node/`."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator

import pytest

KEPT = {"django_migrations", "django_content_type", "auth_permission"}
"""Tables that no test writes to: what is in them is made when the database is."""


@pytest.fixture(scope="session", autouse=True)
def _quick_emptying() -> Iterator[None]:
    """After a test with transactions of its own, the few rows that it made are deleted. Django's flush would
    truncate every table, which takes PostgreSQL ten times as long, and make all permissions anew."""
    from django.db import connection, transaction
    from django.test import TransactionTestCase

    from registry.ledger_guard import DOOR

    @functools.cache
    def statements() -> list[str]:
        tables = sorted(set(connection.introspection.django_table_names(only_existing=True)) - KEPT)
        if connection.vendor == "postgresql":
            # Neither the order of foreign keys nor the ledger's guard matter to what goes as a whole.
            before, after = "SET LOCAL session_replication_role = replica", ""
        else:
            before = f"INSERT INTO {DOOR} (opened_at, why) VALUES (CURRENT_TIMESTAMP, 'tests')"
            tables.remove(DOOR)
            after = f"DELETE FROM {DOOR}"
        return [before, *(f'DELETE FROM "{table}"' for table in tables), *filter(None, [after])]

    def empty(case: TransactionTestCase) -> None:
        with transaction.atomic(), connection.cursor() as cursor:
            for statement in statements():
                cursor.execute(statement)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransactionTestCase, "_fixture_teardown", empty)
        yield


@pytest.fixture(scope="module")
def steady() -> Iterator[None]:
    """For modules that judge milliseconds: the garbage collector does not walk through all that the tests
    before have loaded, which takes half a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _nobody_guessed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong passwords of one test must not lock out the next: all come from one address."""
    from webchat import login

    monkeypatch.setattr(login, "attempts", login.Attempts())


@pytest.fixture(autouse=True)
def _close_database_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """The database threads' connections must not outlive the test database that they point to."""
    yield
    marked = request.node.get_closest_marker("django_db") is not None
    if marked or "db" in request.fixturenames or "transactional_db" in request.fixturenames:
        from registry.threads import close_thread_connections

        close_thread_connections()
