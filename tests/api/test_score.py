"""POST /v1/score, and FastChat's /v1/engines/{model}/embeddings, through the gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from openai_api import answers, limits
from tests.api.conftest import ROUTE, Answer, Served
from tests.api.scripted import Scripted, in_front_of, scripted

pytestmark = pytest.mark.django_db(transaction=True)

USAGE = {"prompt_tokens": 5, "total_tokens": 5}
SCORES = {
    "id": "score-1",
    "object": "list",
    "created": 1,
    "model": "m",
    "data": [{"index": 0, "object": "score", "score": 0.5}],
    "usage": USAGE,
}


@pytest.fixture(scope="module")
def module_worker() -> Iterator[Scripted]:
    with scripted() as running:
        yield running


@pytest.fixture
def told(module_worker: Scripted) -> Scripted:
    module_worker.asked.clear()
    module_worker.answer = SCORES
    return module_worker


@pytest.fixture
def scoring(told: Scripted, transactional_db: None) -> Iterator[Served]:
    with in_front_of(told, "endpoint:score", "endpoint:embeddings", worker_id=7301) as served:
        yield served


def ask(served: Served, path: str = "/v1/score", **fields: Any) -> Answer:
    return served.request("POST", path, json.dumps({"model": ROUTE, **fields}).encode())


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
@pytest.mark.parametrize(
    ("given", "left", "right"),
    [
        ({"text_1": "a", "text_2": "b"}, ["a"], ["b"]),
        ({"queries": "a", "documents": ["b", "c"]}, ["a"], ["b", "c"]),
        ({"data_1": ["a", "b"], "data_2": ["c", "d"]}, ["a", "b"], ["c", "d"]),
        ({"text_1": ["a"], "items": ["c", "d"]}, ["a"], ["c", "d"]),
    ],
)
def test_pairs_under_all_their_names(
    scoring: Served, told: Scripted, path: str, given: Any, left: Any, right: Any
) -> None:
    answer = ask(scoring, path, **given)
    assert msgspec.json.decode(answer.body, type=answers.Scores).data[0].score == 0.5
    assert told.asked == [("/v1/score", {"model": ROUTE, "text_1": left, "text_2": right})]
    event = scoring.event(answer.headers["x-request-id"])
    assert (event.endpoint, event.prompt_tokens, event.completion_tokens) == (path, 5, 0)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({}, "text_1"),
        ({"queries": "a"}, "text_2"),
        ({"text_1": "a", "queries": "a", "text_2": "b"}, "queries"),
        ({"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        ({"text_1": "", "text_2": "b"}, "text_1"),
        ({"text_1": "a", "items": ["b", ""]}, "items"),
        ({"text_1": "a", "text_2": []}, "text_2"),
        ({"text_1": "a", "text_2": [{"image": 1}]}, "text_2[0]"),
        ({"text_1": "a", "text_2": ["b"] * (limits.RERANK_DOCUMENTS + 1)}, "text_2"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(
    scoring: Served, told: Scripted, given: dict[str, Any], param: str
) -> None:
    answer = ask(scoring, **given)
    assert (answer.status, answer.error()["param"]) == (400, param)
    assert told.asked == []


def test_the_most_texts_are_taken(scoring: Served) -> None:
    assert ask(scoring, text_1="a", text_2=["b"] * limits.RERANK_DOCUMENTS).status == 200


def test_it_needs_a_key_and_a_model_that_scores(told: Scripted, transactional_db: None) -> None:
    with in_front_of(told, "endpoint:chat", worker_id=7302) as served:
        answer = ask(served, text_1="a", text_2="b")
        assert (answer.status, answer.error()["param"]) == (400, "model")
        for path in ("/score", "/v1/score"):
            assert served.request("POST", path, b"{}", key=None).status == 401


# -- an old name of /v1/embeddings


def test_the_url_names_the_model_of_embeddings(scoring: Served, told: Scripted) -> None:
    vector = {"object": "embedding", "index": 0, "embedding": [0.5]}
    told.answer = {"object": "list", "data": [vector], "model": "m", "usage": USAGE}
    for path in (f"/v1/engines/{ROUTE}/embeddings", "/v1/engines/org%2Fsim/embeddings"):
        told.asked.clear()
        body = json.dumps({"input": "a", "model": "another"}).encode()
        answer = scoring.request("POST", path, body)
        assert answer.status == 200, answer.body
        assert answer.json()["data"][0]["embedding"] == [0.5]
        (asked,) = told.asked
        assert (asked[0], asked[1]["model"], asked[1]["input"]) == ("/v1/embeddings", ROUTE, ["a"])
        assert scoring.event(answer.headers["x-request-id"]).endpoint == "/v1/embeddings"
    assert scoring.request("POST", "/v1/engines/nobody/embeddings", body).status == 404
    assert scoring.request("POST", path, body, key=None).status == 401
    assert scoring.request("POST", path, b"{}").error()["param"] == "input"
