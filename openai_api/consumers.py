"""HTTP consumers of the public API: each calls one function that does the work, and maps errors."""

from __future__ import annotations

from inference.http import Header, HttpConsumer, Request
from openai_api.errors import UnknownUrl, answer_to
from openai_api.gateway import Gateway
from openai_api.generation import Generation


class ApiConsumer(HttpConsumer):
    """Answers every error from the one table."""

    def error_response(self, error: Exception) -> tuple[int, object, list[Header]]:
        return answer_to(error)


class ChatCompletions(ApiConsumer):
    """POST /v1/chat/completions"""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__()
        self._generation = Generation(gateway, self)

    async def handle(self, request: Request) -> None:
        await self._generation.run(request, self)

    async def on_client_gone(self) -> None:
        await self._generation.client_left()


class UnknownUrls(ApiConsumer):
    """Whatever else is asked for under /v1, with any method."""

    methods = None

    async def handle(self, request: Request) -> None:
        raise UnknownUrl(request.method, request.path)


class Alive(ApiConsumer):
    """GET /healthz: the process answers."""

    methods = frozenset({"GET", "HEAD"})

    async def handle(self, request: Request) -> None:
        await self.send_json(200, {"status": "ok"})


class Ready(ApiConsumer):
    """GET /readyz: it can serve any key; 503 while it cannot."""

    methods = frozenset({"GET", "HEAD"})

    def __init__(self, gateway: Gateway) -> None:
        super().__init__()
        self._gateway = gateway

    async def handle(self, request: Request) -> None:
        if self._gateway.fleet.database_away_seconds > 0:
            await self.send_json(503, {"status": "the database does not answer"})
        else:
            await self.send_json(200, {"status": "ok"})
