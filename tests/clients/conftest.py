"""A gateway with a chat model and an embedding model, told to a client by its environment alone."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from registry.actions.events import publish_change
from registry.models import Route, RouteTarget
from tests.api.conftest import ROUTE, Served, served, worker
from tests.api.conftest import facts as facts
from tests.api.test_embeddings import Letters, letters
from tests.clients.environments import node_with_clients, python_with
from tests.factories import make_deployment, make_limit, make_worker

__all__ = ["facts", "letters", "served", "worker"]

HERE = Path(__file__).parent


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin with the environments that the tests of this folder name: on a new machine these are made while
    other tests run. A test that comes to its environment before waits for it."""
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    if session.config.option.collectonly:
        return
    for name in {name for module in modules for name in getattr(module, "ENVIRONMENTS", ())}:
        make = node_with_clients if name == "node" else partial(python_with, name)
        threading.Thread(target=_make, args=[make], name=f"environment of {name}").start()


def _make(environment: Callable[[], object]) -> None:
    # The test that needs it tries again, and fails where it can be seen.
    with contextlib.suppress(RuntimeError, OSError):
        environment()


@pytest.fixture
def told(served: Served, letters: tuple[Letters, str]) -> dict[str, str]:
    """The environment of a client's process."""
    target = RouteTarget.objects.get(route__name=ROUTE)
    RouteTarget.objects.create(route=Route.objects.create(name="other"), deployment=target.deployment)
    embedding = make_deployment(route="letters")
    make_worker(deployment=embedding, id=7002, url=letters[1], capabilities=["endpoint:embeddings"])
    # None is wished for: nobody waits for a worker of it.
    make_deployment(route="later", replicas=0)
    # One every four seconds: who comes back earlier, as a 503 says, is told 429.
    make_limit(15, "requests", "minute", burst=1, route="later")
    for route in ("other", "letters", "later"):
        publish_change("route", route)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON"))},
        "OPENAI_BASE_URL": served.base_url,
        "OPENAI_API_KEY": served.api_key,
        "ANTHROPIC_BASE_URL": served.base_url.removesuffix("/v1"),
        "ANTHROPIC_API_KEY": served.api_key,
        "CHAT_MODEL": ROUTE,
        "OTHER_CHAT_MODEL": "other",
        "EMBEDDING_MODEL": "letters",
        "LATER_MODEL": "later",
    }
