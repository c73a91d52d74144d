"""A stand-in for a worker that embeds: answers of the right shape for what it is asked, without a model."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.api.conftest import eventually

CAPABILITIES = [
    "endpoint:embeddings",
    "endpoint:rerank",
    "endpoint:score",
    "endpoint:tokenize",
    "dimensions",
]
VECTOR = (0.6, -0.8)


async def _embed(request: Request) -> Response:
    asked = await request.json()
    vector: Any = list(VECTOR)
    if asked["encoding_format"] == "base64":
        vector = base64.b64encode(struct.pack("<2f", *VECTOR)).decode()
    data = [{"object": "embedding", "index": at, "embedding": vector} for at, _ in enumerate(asked["input"])]
    return _told({"object": "list", "data": data, "model": asked["model"]})


async def _rerank(request: Request) -> Response:
    asked = await request.json()
    results = [
        {"index": at, "relevance_score": 1 / (at + 1)}
        | ({"document": {"text": text}} if asked.get("return_documents") else {})
        for at, text in enumerate(asked["documents"])
    ]
    return _told({"id": "rerank-1", "model": asked["model"], "results": results[: asked.get("top_n")]})


async def _score(request: Request) -> Response:
    asked = await request.json()
    data = [{"index": at, "object": "score", "score": 0.5} for at, _ in enumerate(asked["text_2"])]
    return _told({"id": "score-1", "object": "list", "created": 1, "model": asked["model"], "data": data})


async def _tokenize(request: Request) -> Response:
    words = str((await request.json()).get("prompt", "")).split()
    return JSONResponse({"count": len(words), "max_model_len": 512, "tokens": list(range(len(words)))})


async def _detokenize(request: Request) -> Response:
    return JSONResponse({"prompt": " ".join(map(str, (await request.json())["tokens"]))})


def _told(answer: dict[str, Any]) -> Response:
    return JSONResponse(answer | {"usage": {"prompt_tokens": 3, "total_tokens": 3}})


@contextlib.contextmanager
def embedder() -> Iterator[str]:
    """Running; yields its URL."""
    answers = {
        "/v1/embeddings": _embed,
        "/v1/rerank": _rerank,
        "/v1/score": _score,
        "/tokenize": _tokenize,
        "/detokenize": _detokenize,
    }
    routes = [Route(path, answer, methods=["POST"]) for path, answer in answers.items()]
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(Starlette(routes=routes), lifespan="off", ws="none", log_config=None)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        eventually(lambda: server.started, "the worker listens")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
