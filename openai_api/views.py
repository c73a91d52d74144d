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
from registry.models import Route
from registry.rights import Scope

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


def model_object(route: Any) -> dict[str, Any]:
    """OpenAI's model object; `max_model_len` is what chat pages and editors read beside it."""
    return {
        "id": route.name,
        "object": "model",
        "created": int(route.created_at.timestamp()),
        "owned_by": "roundhouse",
        "max_model_len": route.context_length,
    }


class Models(APIView):
    """GET /v1/models: what this key may use. Asks no worker."""

    scope = Scope.MODELS.value
    http_method_names = READ

    def get(self, request: Request) -> Response:
        try:
            data = [model_object(route) for route in allowed_routes(_key(request))]
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
            route = allowed_routes(_key(request)).filter(name=model).first()
        except DatabaseError as error:
            raise StorageAway from error
        if route is None:
            raise UnknownModel(model, param="model")
        return Response(model_object(route))
