"""HTTP consumers of the public API: each calls one function that does the work, and maps errors."""

from __future__ import annotations

from inference.http import Header, HttpConsumer, Request
from openai_api.endpoints import Endpoint
from openai_api.errors import UnknownUrl, answer_to
from openai_api.gateway import Gateway
from openai_api.generation import Generation


class ApiConsumer(HttpConsumer):
    """Answers every error from the one table."""

    def error_response(self, error: Exception) -> tuple[int, object, list[Header]]:
        return answer_to(error)


class Answers(ApiConsumer):
    """POST to an endpoint that a worker answers."""

    def __init__(self, gateway: Gateway, endpoint: Endpoint) -> None:
        super().__init__()
        self._endpoint = endpoint
        self._generation = Generation(gateway, self, endpoint)

    async def handle(self, request: Request) -> None:
        await self._generation.run(request, self)

    async def on_client_gone(self) -> None:
        await self._generation.client_left()

    def error_response(self, error: Exception) -> tuple[int, object, list[Header]]:
        return self._endpoint.errors(error)


class OpenApiDocument(ApiConsumer):
    """GET /v1/openapi.json. Needs no key: it tells what the public API looks like, not what is in it."""

    methods = frozenset({"GET", "HEAD"})

    async def handle(self, request: Request) -> None:
        from openai_api.document import document_json  # which imports the views, and these Django's apps

        await self.send_json(200, document_json())


class UnknownUrls(ApiConsumer):
    """Whatever else is asked for under /v1, with any method."""

    methods = None

    async def handle(self, request: Request) -> None:
        raise UnknownUrl(request.method, request.path)
