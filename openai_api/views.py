"""The parts of /v1 that are no generation: DRF views, authenticated like everything else."""

from __future__ import annotations

from typing import Any

from django.db import Error as DatabaseError
from django.db.models import Min, QuerySet
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from openai_api.auth import Key
from openai_api.errors import MissingKey, StorageAway, UnknownModel
from registry.adapters import adapters_of
from registry.models import Route, RouteTarget
from registry.rights import Scope
from registry.states import EngineName

READ = ["get", "head"]
"""Not OPTIONS: what DRF would tell there is in the OpenAPI document."""


def allowed_routes(key: Key) -> QuerySet[Route]:
    """Routes that this key may use and that lead somewhere, with the tokens that each of them takes."""
    routes = Route.objects.filter(enabled=True, targets__isnull=False)
    if key.held_to_routes:
        names = Route.objects.filter(enabled=True).values_list("name", flat=True)
        routes = routes.filter(name__in=[name for name in names if key.may_use(name)])
    return routes.annotate(
        # Of several deployments the smallest: what is longer is not answered by all of them.
        context_length=Min("targets__deployment__language_model__context_length")
    ).order_by("name")


def _key(request: Request) -> Key:
    key: Any = request.user
    if not isinstance(key, Key):
        raise MissingKey
    return key


def adapted_routes(key: Key) -> dict[str, AdaptedRoute]:
    """Every `route:adapter` that this key may use, with its route, but for names that routes have."""
    rows = RouteTarget.objects.filter(route__enabled=True, deployment__engine=EngineName.VLLM)
    found: dict[str, AdaptedRoute] = {}
    for target in rows.select_related("route", "deployment__language_model").order_by("route__name"):
        route = target.route
        for adapter in sorted(adapters_of(target.deployment.engine, target.deployment.arguments)):
            name = f"{route.name}:{adapter}"
            if key.may_use(name) or key.may_use(route.name):
                context = target.deployment.language_model.context_length
                known = found.setdefault(name, AdaptedRoute(name, route, context))
                known.context_length = min(filter(None, (known.context_length, context)), default=None)
    if found:
        for name in Route.objects.filter(enabled=True, name__in=found).values_list("name", flat=True):
            del found[name]
    return found


class AdaptedRoute:
    """A route with an adapter, as a model object is made of it."""

    def __init__(self, name: str, route: Route, context_length: int | None) -> None:
        self.name = name
        self.parent = route.name
        self.created_at = route.created_at
        self.context_length = context_length


def model_object(route: Any) -> dict[str, Any]:
    """OpenAI's model object; `max_model_len` is what chat pages and editors read beside it, `parent` what
    vLLM tells of an adapter."""
    told = {
        "id": route.name,
        "object": "model",
        "created": int(route.created_at.timestamp()),
        "owned_by": "roundhouse",
        "max_model_len": route.context_length,
    }
    return told | {"parent": route.parent} if isinstance(route, AdaptedRoute) else told


class Models(APIView):
    """GET /v1/models: what this key may use. Asks no worker."""

    scope = Scope.MODELS.value
    http_method_names = READ

    def get(self, request: Request) -> Response:
        try:
            key = _key(request)
            data = [model_object(route) for route in (*allowed_routes(key), *adapted_routes(key).values())]
        except DatabaseError as error:
            raise StorageAway from error
        return Response({"object": "list", "data": data})


class ModelDetail(APIView):
    """GET /v1/models/{id}; an id may hold slashes."""

    scope = Scope.MODELS.value
    http_method_names = READ

    def get(self, request: Request, model: str) -> Response:
        if "\0" in model:
            # No name has one, and PostgreSQL takes none in a question.
            raise UnknownModel(model, param="model")
        try:
            key = _key(request)
            route: Any = allowed_routes(key).filter(name=model).first()
            if route is None and ":" in model:
                route = adapted_routes(key).get(model)
        except DatabaseError as error:
            raise StorageAway from error
        if route is None:
            raise UnknownModel(model, param="model")
        return Response(model_object(route))
