"""One gateway and one worker for all tests of an engine: starting one may take a minute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection
from django.test import TransactionTestCase
from django.test.utils import setup_databases, teardown_databases

from registry.threads import close_thread_connections
from tests.contract.engines import ENGINES, MARKS, check_installed, model_of
from tests.contract.serving import Served, served_by
from tests.engines.test_transformers_engine import smollm2

__all__ = ["smollm2"]  # a fixture


@pytest.fixture(scope="session")
def database(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """The test database. pytest-django makes it only when a test says that it asks it itself."""
    with django_db_blocker.unblock():
        if connection.settings_dict["NAME"] == connection.creation._get_test_db_name():
            yield
            return
        made = setup_databases(verbosity=0, interactive=False)
        yield
        teardown_databases(made, verbosity=0)


@pytest.fixture(
    scope="package",
    params=[pytest.param(name, marks=MARKS.get(name, [])) for name in ENGINES],
)
def served(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    database: None,
    django_db_blocker: Any,
) -> Iterator[Served]:
    engine = ENGINES[request.param]
    check_installed(engine)
    folder = tmp_path_factory.mktemp(engine.name)
    model = model_of(engine, folder, request)
    with django_db_blocker.unblock():
        try:
            with served_by(engine, model, folder) as served:
                yield served
        finally:
            close_thread_connections()
            # What other tests find is what there was before.
            TransactionTestCase._fixture_teardown(TransactionTestCase())  # type: ignore[attr-defined]
