"""HTTP consumers of the public API: each calls one function that does the work, and maps errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import msgspec

from inference.errors import WorkerUnreachable
from inference.http import Header, HttpConsumer, Request
from openai_api import limits
from openai_api.auth import Key
from openai_api.endpoints import TOKENIZE, Endpoint
from openai_api.errors import NotServed, UnknownUrl, answer_to
from openai_api.gateway import Gateway
from openai_api.generation import Generation
from openai_api.parsing import decode
from openai_api.protocol.tokenize import TokenCheck, TokenChecks


class ApiConsumer(HttpConsumer):
    """Answers every error from the one table."""

    def error_response(self, error: Exception) -> tuple[int, object, list[Header]]:
        return answer_to(error)


class Answers(ApiConsumer):
    """POST to an endpoint that a worker answers."""

    def __init__(self, gateway: Gateway, endpoint: Endpoint) -> None:
        super().__init__()
        self._gateway = gateway
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


class OfEngine(Answers):
    """POST /v1/engines/{model}/embeddings, an old name of /v1/embeddings: the URL names the model."""

    async def handle(self, request: Request) -> None:
        model: str = request.scope["url_route"]["kwargs"]["model"]
        self._endpoint = replace(self._endpoint, model=model)
        self._generation = Generation(self._gateway, self, self._endpoint)
        await self._generation.run(request, self)


class TokenCheckUp(ApiConsumer):
    """POST /api/v1/token_check: do prompts fit their models? As FastChat answers it; each prompt is a request
    of its own for the ledger."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__()
        self._gateway = gateway

    async def handle(self, request: Request) -> None:
        key = await self._gateway.keys.admit(request, TOKENIZE.scope)
        checks = decode(await self.read_body(limits.BODY_BYTES), _decode_checks)
        told = [await self._check(key, check, at, request) for at, check in enumerate(checks.prompts)]
        await self.send_json(200, {"prompts": told})

    async def _check(self, key: Key, check: TokenCheck, at: int, request: Request) -> dict[str, Any]:
        kept = _Kept(self)
        body = msgspec.json.encode({"model": check.model, "prompt": check.prompt})
        generation = Generation(self._gateway, kept, TOKENIZE)
        await generation.run_as(key, body, request_id=f"{request.request_id}-{at}")
        count, length = kept.tokens.count, kept.tokens.max_model_len
        return {
            "fits": count + check.max_tokens <= length,
            "tokenCount": count,
            "contextLength": length,
        }


class _Tokens(msgspec.Struct):
    count: int
    max_model_len: int


NO_STREAM = "A tokenization is asked for whole."


class _Kept:
    """Where an answer goes that the client does not see: see `Answered`."""

    def __init__(self, consumer: HttpConsumer) -> None:
        self._consumer = consumer
        self.tokens = _Tokens(0, 0)

    @property
    def client_gone(self) -> bool:
        return self._consumer.client_gone

    async def send_json(self, status: int, payload: object) -> None:
        try:
            self.tokens = msgspec.json.decode(cast(bytes, payload), type=_Tokens)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise WorkerUnreachable("A worker's answer is no tokenization.") from error

    async def stream_start(self, prompt_tokens: int = 0) -> None:
        raise AssertionError(NO_STREAM)

    async def stream_events(self, events: Sequence[bytes]) -> None:
        raise AssertionError(NO_STREAM)

    async def stream_end(self, chunk: bytes = b"") -> None:
        raise AssertionError(NO_STREAM)


_decode_checks = msgspec.json.Decoder(TokenChecks).decode


NOT_SERVED = {
    "assistants": "assistants",
    "audio": "speech and transcriptions",
    "batches": "batches",
    "containers": "containers",
    "conversations": "conversations",
    "decisions": "decisions",
    "evals": "evals",
    "files": "files",
    "fine_tuning": "fine-tuning",
    "images": "images",
    "moderations": "moderations",
    "realtime": "realtime sessions",
    "skills": "skills",
    "threads": "threads",
    "uploads": "uploads",
    "vector_stores": "vector stores",
    "videos": "videos",
}
"""What OpenAI has under /v1 and we do not, by its first word."""


class UnknownUrls(ApiConsumer):
    """Whatever else is asked for under /v1, with any method."""

    methods = None

    async def handle(self, request: Request) -> None:
        first = request.path.removeprefix("/v1/").partition("/")[0]
        if request.path.startswith("/v1/") and first in NOT_SERVED:
            raise NotServed(request.method, request.path, NOT_SERVED[first])
        raise UnknownUrl(request.method, request.path)
