"""POST /v1/embeddings, /v1/rerank and /v2/rerank through the gateway. Behind it is a worker that counts
letters instead of running a model: what the gateway does does not depend on that."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from config.front import make_application
from registry.actions.events import publish_change
from tests.api.conftest import ROUTE, Served, eventually, serving
from tests.factories import make_api_key, make_deployment, make_worker

pytestmark = pytest.mark.django_db(transaction=True)

PATH = "/v1/embeddings"
LETTERS = "aeinrst "


def vector(text: str | list[int]) -> list[float]:
    if isinstance(text, list):
        return [float(token) for token in (text * 8)[:8]]
    return [float(text.count(letter)) for letter in LETTERS]


def size(text: str | list[int]) -> int:
    return len(text) if isinstance(text, list) else len(text.split())


class Letters:
    """An embedding worker; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.asgi = Starlette(
            routes=[
                Route("/v1/embeddings", self.embed, methods=["POST"]),
                Route("/v1/rerank", self.rerank, methods=["POST"]),
            ]
        )

    async def embed(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.asked.append(body)
        tokens = sum(size(one) for one in body["input"])
        found: list[Any] = [vector(one)[: body.get("dimensions")] for one in body["input"]]
        if body["encoding_format"] == "base64":
            found = [base64.b64encode(struct.pack(f"<{len(one)}f", *one)).decode() for one in found]
        data = [{"object": "embedding", "index": at, "embedding": one} for at, one in enumerate(found)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": body["model"], "usage": usage})

    async def rerank(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.asked.append(body)
        scores = [len(set(one) & set(body["query"])) / 26 for one in body["documents"]]
        order = sorted(range(len(scores)), key=lambda at: -scores[at])[: body.get("top_n")]
        results = [{"index": at, "relevance_score": scores[at]} for at in order]
        tokens = sum(map(size, body["documents"]))
        return JSONResponse(
            {"id": "rank-1", "model": body["model"], "results": results, "usage": {"total_tokens": tokens}}
        )


@pytest.fixture(scope="module")
def letters() -> Iterator[tuple[Letters, str]]:
    worker = Letters()
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(worker.asgi, lifespan="off", ws="none", log_config=None))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        eventually(lambda: server.started, "the worker listens")
        yield worker, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def counter(letters: tuple[Letters, str]) -> Letters:
    letters[0].asked.clear()
    return letters[0]


@pytest.fixture(params=[()])
def embedding(
    request: pytest.FixtureRequest, letters: tuple[Letters, str], transactional_db: None
) -> Iterator[Served]:
    deployment = make_deployment(route=ROUTE)
    capabilities = ["endpoint:embeddings", "endpoint:rerank", "max_tokens_per_doc", *request.param]
    make_worker(deployment=deployment, id=7002, url=letters[1], capabilities=capabilities)
    publish_change("route", ROUTE)
    front = make_application()
    with serving(front) as port:
        yield Served(port, make_api_key(name="tests")[1], front)


def ask(served: Served, path: str = PATH, **body: Any) -> Any:
    return served.request("POST", path, json.dumps({"model": ROUTE, **body}).encode())


async def test_floats_and_the_clients_own_base64_are_the_same_vectors(
    embedding: Served, counter: Letters
) -> None:
    texts = ["a train", "rails"]
    async with embedding.client() as client:
        default = await client.embeddings.create(model=ROUTE, input=texts)
        floats = await client.embeddings.create(model=ROUTE, input=texts, encoding_format="float")
        one = await client.embeddings.create(model=ROUTE, input=texts[0])
    assert [asked["encoding_format"] for asked in counter.asked] == ["base64", "float", "base64"]
    assert [found.embedding for found in floats.data] == [vector(text) for text in texts]
    assert [found.embedding for found in default.data] == [vector(text) for text in texts]
    assert [found.index for found in default.data] == [0, 1]
    assert one.data[0].embedding == vector(texts[0])
    assert counter.asked[2]["input"] == ["a train"]
    assert (default.usage.prompt_tokens, default.usage.total_tokens) == (3, 3)


@pytest.mark.parametrize(
    ("given", "forwarded"),
    [
        ("one text", ["one text"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_workers_are_always_asked_for_a_list(
    embedding: Served, counter: Letters, given: Any, forwarded: Any
) -> None:
    answer = ask(embedding, input=given, user="u", whatever=1)
    assert answer.status == 200
    assert counter.asked == [{"model": ROUTE, "input": forwarded, "encoding_format": "float"}]
    assert len(answer.json()["data"]) == len(forwarded)


def test_the_ledger_holds_the_prompts_tokens_and_no_others(embedding: Served) -> None:
    answer = ask(embedding, input=["one two", "three"])
    event = embedding.event(answer.headers["x-request-id"])
    assert (event.prompt_tokens, event.completion_tokens, event.endpoint) == (3, 0, PATH)
    assert (event.status, event.stream) == (200, False)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "input"),
        ({"input": ""}, "invalid_value", "input"),
        ({"input": ["text", ""]}, "invalid_value", "input"),
        ({"input": []}, "empty_array", "input"),
        ({"input": [[]]}, "empty_array", "input[0]"),
        ({"input": ["text", 5]}, "invalid_type", "input"),
        ({"input": {"text": "x"}}, "invalid_type", "input"),
        ({"input": ["x"] * 2049}, "array_above_max_length", "input"),
        ({"input": [[1]] * 2049}, "array_above_max_length", "input"),
        ({"input": "x", "encoding_format": "hex"}, "invalid_value", "encoding_format"),
        ({"input": "x", "dimensions": 0}, "integer_below_min_value", "dimensions"),
        ({"input": "x", "dimensions": 4}, "unsupported_value", "dimensions"),
    ],
)
def test_a_bad_field_is_named_and_no_worker_is_asked(
    embedding: Served, counter: Letters, body: dict[str, Any], code: str, param: str
) -> None:
    refused = ask(embedding, **body)
    error = refused.error()
    assert (refused.status, error["code"], error["param"]) == (400, code, param)
    assert counter.asked == []


def test_as_many_inputs_as_the_limit_are_answered(embedding: Served) -> None:
    answer = ask(embedding, input=["x"] * 2048)
    assert answer.status == 200
    assert len(answer.json()["data"]) == 2048


@pytest.mark.parametrize("embedding", [("dimensions",)], indirect=True)
def test_dimensions_are_passed_on_where_the_worker_has_them(embedding: Served, counter: Letters) -> None:
    answer = ask(embedding, input="a train", dimensions=3).json()
    assert counter.asked[0]["dimensions"] == 3
    assert len(answer["data"][0]["embedding"]) == 3


async def test_an_embedding_model_does_not_chat_and_says_so(embedding: Served) -> None:
    async with embedding.client() as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model=ROUTE, messages=[{"role": "user", "content": "Hi"}])
    assert refused.value.param == "model"
    assert f"The model `{ROUTE}` does not support this endpoint." in refused.value.message


def test_a_chat_model_does_not_embed_and_says_so(served: Served) -> None:
    for path, body in ((PATH, {"input": "x"}), ("/v1/rerank", {"query": "q", "documents": ["d"]})):
        refused = ask(served, path, **body)
        assert refused.status == 400
        assert refused.error()["param"] == "model"


def test_a_ranking_is_passed_on_and_accounted(embedding: Served, counter: Letters) -> None:
    answer = ask(
        embedding, "/v1/rerank", query="steam", documents=["bob", {"text": "steam"}, "tea set"], top_n=2
    )
    assert [found["index"] for found in answer.json()["results"]] == [1, 2]
    assert counter.asked == [
        {"model": ROUTE, "query": "steam", "documents": ["bob", "steam", "tea set"], "top_n": 2}
    ]
    event = embedding.event(answer.headers["x-request-id"])
    assert (event.endpoint, event.prompt_tokens, event.completion_tokens) == ("/v1/rerank", 4, 0)


def test_coheres_ranking_has_coheres_shape(embedding: Served, counter: Letters) -> None:
    answer = ask(embedding, "/v2/rerank", query="steam", documents=["bob", "steam"], max_tokens_per_doc=9)
    assert counter.asked[0]["max_tokens_per_doc"] == 9
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "id": "rank-1",
        "results": [{"index": 1, "relevance_score": 5 / 26}, {"index": 0, "relevance_score": 0.0}],
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
    }
    assert embedding.event(answer.headers["x-request-id"]).prompt_tokens == 2


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"documents": ["d"]}, "missing_required_parameter", "query"),
        ({"query": "", "documents": ["d"]}, "invalid_value", "query"),
        ({"query": "q"}, "missing_required_parameter", "documents"),
        ({"query": "q", "documents": []}, "empty_array", "documents"),
        ({"query": "q", "documents": ["d"] * 2049}, "array_above_max_length", "documents"),
        ({"query": "q", "documents": [{"title": "d"}]}, "missing_required_parameter", "documents[0].text"),
        ({"query": "q", "documents": ["d"], "top_n": 0}, "integer_below_min_value", "top_n"),
    ],
)
def test_a_rankings_bad_field_is_named(
    embedding: Served, body: dict[str, Any], code: str, param: str
) -> None:
    refused = ask(embedding, "/v1/rerank", **body)
    error = refused.error()
    assert (refused.status, error["code"], error["param"]) == (400, code, param)


def test_what_is_not_under_v2_is_told_in_json(embedding: Served) -> None:
    refused = embedding.request("POST", "/v2/embed", b"{}")
    assert refused.status == 404
    assert refused.error()["message"] == "Invalid URL (POST /v2/embed)"
