"""Plain builders of facts for tests: `make_worker(state=WorkerState.READY)` is all a test says."""

from __future__ import annotations

from itertools import count
from typing import Any

from registry.actions.api_keys import issue_api_key
from registry.actions.deployments import save_deployment
from registry.keys import digest_secret
from registry.models import ApiKey, Deployment, LanguageModel, Node, Project, Route, RouteTarget, Worker
from registry.querysets import database_now
from registry.states import NodeState, WorkerState

_numbers = count(1)


def make_node(**facts: Any) -> Node:
    number = next(_numbers)
    defaults: dict[str, Any] = {
        "name": f"node-{number}",
        "address": "127.0.0.1",
        "state": NodeState.ONLINE,
        "last_seen_at": database_now(),
        "secret_digest": digest_secret(f"node-secret-{number}"),
    }
    return Node.objects.create(**defaults | facts)


def make_language_model(**facts: Any) -> LanguageModel:
    defaults: dict[str, Any] = {"name": f"model-{next(_numbers)}", "source": "/nowhere"}
    return LanguageModel.objects.create(**defaults | facts)


def make_deployment(*, route: str | None = None, **wish: Any) -> Deployment:
    """A deployment of the simulated engine, with a route of that name when one is given."""
    defaults: dict[str, Any] = {"name": f"deployment-{next(_numbers)}", "engine": "simulated"}
    if "language_model" not in wish:
        wish["language_model"] = make_language_model()
    deployment = save_deployment(deployment=Deployment(**defaults | wish), by="test")
    if route is not None:
        RouteTarget.objects.create(route=Route.objects.get_or_create(name=route)[0], deployment=deployment)
    return deployment


def make_worker(*, deployment: Deployment | None = None, node: Node | None = None, **facts: Any) -> Worker:
    deployment = deployment or make_deployment()
    replica = facts.pop("replica", deployment.workers.live().count())
    now = database_now()
    defaults: dict[str, Any] = {
        "name": f"{deployment.name}-{replica}",
        "epoch": deployment.workers.filter(replica=replica).count() + 1,
        "state": WorkerState.READY,
        "state_changed_at": now,
        "heartbeat_at": now,
        "url": "http://127.0.0.1:9",
    }
    return Worker.objects.create(
        deployment=deployment,
        revision=deployment.revision,
        node=node or make_node(),
        replica=replica,
        **defaults | facts,
    )


def make_project(**facts: Any) -> Project:
    return Project.objects.get_or_create(name=facts.pop("name", "default"), defaults=facts)[0]


def make_api_key(**facts: Any) -> tuple[ApiKey, str]:
    defaults: dict[str, Any] = {
        "name": "test",
        "project": facts.pop("project", None) or make_project(),
        "by": "test",
    }
    return issue_api_key(**defaults | facts)
