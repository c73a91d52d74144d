"""Plain builders of facts for tests: `make_worker(state=WorkerState.READY)` is all a test says."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import count
from typing import Any

from registry.actions.api_keys import issue_api_key
from registry.actions.budgets import save_budget
from registry.actions.deployments import save_deployment
from registry.actions.limits import save_limit
from registry.keys import digest_secret
from registry.models import (
    ApiKey,
    Budget,
    Deployment,
    LanguageModel,
    Limit,
    Node,
    Price,
    Project,
    Route,
    RouteTarget,
    Worker,
)
from registry.querysets import database_now
from registry.states import NodeState, WorkerState

_numbers = count(1)
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


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


def make_budget(*, limit: int, **facts: Any) -> Budget:
    """A hard monthly budget in tokens of the key `abc`, unless it is told otherwise."""
    defaults: dict[str, Any] = {"scope": "key", "subject": "abc", "unit": "tokens", "starts_at": LONG_AGO}
    budget = Budget(limit=limit, **defaults | facts)
    starts_at = budget.starts_at
    save_budget(budget=budget, by="test")
    # It counts what tests put into the past, too.
    Budget.objects.filter(pk=budget.pk).update(starts_at=starts_at)
    budget.refresh_from_db()
    return budget


def make_price(route: str = "", **facts: Any) -> Price:
    """In force since long ago, unless it is told otherwise."""
    return Price.objects.create(route=route, **{"starts_at": LONG_AGO} | facts)


def make_limit(amount: int = 10, metric: str = "requests", per: str = "hour", **facts: Any) -> Limit:
    """Of requests per hour, shared by everybody, unless it is told otherwise."""
    per = "" if metric == "parallel" else per
    return save_limit(limit=Limit(amount=amount, metric=metric, per=per, **facts), by="test")
