"""What is done with a response that was kept: read, deleted, its input listed."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs

import msgspec
from django.db import Error as DatabaseError

from inference.http import Request
from openai_api.auth import Key
from openai_api.consumers import ApiConsumer
from openai_api.errors import InvalidRequest, ResponseNotFound, StorageAway
from openai_api.gateway import Gateway
from openai_api.models import StoredResponse
from openai_api.responses.store import delete, find
from registry.rights import Scope
from registry.threads import in_database

PAGE = 20
MOST_ON_A_PAGE = 100


class OfResponse(ApiConsumer):
    """A URL under one response's. Only keys of its project find it."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__()
        self._gateway = gateway

    async def handle(self, request: Request) -> None:
        key = await self._gateway.keys.admit(request, Scope.RESPONSES.value)
        response_id: str = request.scope["url_route"]["kwargs"]["response_id"]
        try:
            await self.send_json(200, await self.answer(key, response_id, request))
        except DatabaseError as error:
            raise StorageAway from error

    async def answer(self, key: Key, response_id: str, request: Request) -> object:
        """What this URL tells; each subclass has its own."""
        raise NotImplementedError

    async def found(self, key: Key, response_id: str) -> StoredResponse:
        stored = await in_database(find, key.project_id, response_id)
        if stored is None:
            raise ResponseNotFound(response_id)
        return stored


class OneResponse(OfResponse):
    """GET and DELETE /v1/responses/{id}."""

    methods = frozenset({"GET", "DELETE"})

    async def answer(self, key: Key, response_id: str, request: Request) -> object:
        if request.method == "DELETE":
            if not await in_database(delete, key.project_id, response_id):
                raise ResponseNotFound(response_id)
            return {"id": response_id, "object": "response.deleted", "deleted": True}
        streamed = _words(request).get("stream", "false")
        if streamed not in ("true", "false"):
            raise InvalidRequest("'stream' must be true or false.", param="stream", code="invalid_value")
        if streamed == "true":
            raise InvalidRequest(
                "Unsupported value: 'stream' is not supported for a response that has ended.",
                param="stream",
                code="unsupported_value",
            )
        return (await self.found(key, response_id)).answer.encode()


class CancelResponse(OfResponse):
    """POST /v1/responses/{id}/cancel: none runs in the background, so there is nothing to cancel."""

    async def answer(self, key: Key, response_id: str, request: Request) -> object:
        await self.found(key, response_id)
        raise InvalidRequest("Cannot cancel a synchronous response.")


class InputItems(OfResponse):
    """GET /v1/responses/{id}/input_items, the newest first unless asked otherwise."""

    methods = frozenset({"GET"})

    async def answer(self, key: Key, response_id: str, request: Request) -> object:
        words = _words(request)
        limit = _limit(words.get("limit", ""))
        order = words.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InvalidRequest("'order' must be asc or desc.", param="order", code="invalid_value")
        stored = await self.found(key, response_id)
        items: list[dict[str, Any]] = msgspec.json.decode(stored.items)
        if order == "desc":
            items.reverse()
        if after := words.get("after"):
            ids = [item["id"] for item in items]
            if after not in ids:
                raise InvalidRequest(
                    "'after' must be the id of one of the items.", param="after", code="invalid_value"
                )
            del items[: ids.index(after) + 1]
        page = items[:limit]
        return {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > limit,
        }


def _words(request: Request) -> dict[str, str]:
    """The query string; of a name given twice, the last."""
    words = parse_qs(request.query_string.decode("latin-1"), keep_blank_values=True)
    return {name: values[-1] for name, values in words.items()}


def _limit(text: str) -> int:
    if not text:
        return PAGE
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= MOST_ON_A_PAGE):
        raise InvalidRequest(
            f"'limit' must be from 1 to {MOST_ON_A_PAGE}.", param="limit", code="invalid_value"
        )
    return int(text)
