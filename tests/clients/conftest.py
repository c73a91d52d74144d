"""A gateway with a chat model and an embedding model, told to a client by its environment alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from registry.actions.events import publish_change
from registry.models import Route, RouteTarget
from tests.api.conftest import ROUTE, Served, served, worker
from tests.api.conftest import facts as facts
from tests.api.test_embeddings import Letters, letters
from tests.factories import make_deployment, make_worker

__all__ = ["facts", "letters", "served", "worker"]

HERE = Path(__file__).parent


@pytest.fixture
def told(served: Served, letters: tuple[Letters, str]) -> dict[str, str]:
    """The environment of a client's process."""
    target = RouteTarget.objects.get(route__name=ROUTE)
    RouteTarget.objects.create(route=Route.objects.create(name="other"), deployment=target.deployment)
    embedding = make_deployment(route="letters")
    make_worker(deployment=embedding, id=7002, url=letters[1], capabilities=["endpoint:embeddings"])
    make_deployment(route="later")
    for route in ("other", "letters", "later"):
        publish_change("route", route)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON"))},
        "OPENAI_BASE_URL": served.base_url,
        "OPENAI_API_KEY": served.api_key,
        "CHAT_MODEL": ROUTE,
        "OTHER_CHAT_MODEL": "other",
        "EMBEDDING_MODEL": "letters",
        "LATER_MODEL": "later",
    }
