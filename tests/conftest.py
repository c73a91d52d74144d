"""Fixtures that need Django. Tests of code that runs without it live in `tests/node/`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _close_database_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """The database threads' connections must not outlive the test database that they point to."""
    yield
    marked = request.node.get_closest_marker("django_db") is not None
    if marked or "db" in request.fixturenames or "transactional_db" in request.fixturenames:
        from registry.threads import close_thread_connections

        close_thread_connections()
