"""`route:adapter`: who may use it, which worker gets it and under what name, and where it is listed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from config.front import make_application
from registry.actions.events import publish_change
from registry.models import BudgetPeriod
from tests.api.conftest import ROUTE, Served, eventually, serving
from tests.api.scripted import Scripted, scripted
from tests.factories import make_api_key, make_budget, make_deployment, make_limit, make_price, make_worker

SQL = f"{ROUTE}:sql"
CAN = ("endpoint:chat", "endpoint:completions", "temperature", "continue_final_message")


def answer(model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": "hello"}
    return {
        **{"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": model},
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    }


@pytest.fixture
def plain() -> Iterator[Scripted]:
    with scripted() as worker:
        worker.answer = answer("plain")
        yield worker


@pytest.fixture
def carrying() -> Iterator[Scripted]:
    with scripted() as worker:
        worker.answer = answer("lora:sql")
        yield worker


@pytest.fixture
def served(transactional_db: None, plain: Scripted, carrying: Scripted) -> Iterator[Served]:
    """Two workers of one deployment with the adapter `sql`; the second alone has loaded it."""
    deployment = make_deployment(route=ROUTE, engine="vllm", arguments={"lora_adapters": {"sql": "/x"}})
    make_worker(deployment=deployment, id=7301, url=plain.url, capabilities=list(CAN))
    make_worker(deployment=deployment, id=7302, url=carrying.url, capabilities=[*CAN, "lora:sql"])
    publish_change("route", ROUTE)
    front = make_application()
    with serving(front) as port:
        yield Served(port, make_api_key(name="tests")[1], front)


def ask(served: Served, model: str, *, key: str = "", path: str = "/v1/chat/completions") -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    return served.request("POST", path, json.dumps(body).encode(), key=key)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_only_a_worker_that_carries_the_adapter_is_asked_and_by_its_name(
    served: Served, plain: Scripted, carrying: Scripted, path: str
) -> None:
    for _ in range(6):
        told = ask(served, SQL, path=path)
        assert told.status == 200, told.body
        assert told.json()["model"] == SQL
    assert not plain.asked
    assert [body["model"] for _, body in carrying.asked] == ["lora:sql"] * 6


def test_a_stream_goes_on_with_a_worker_that_carries_it_or_not_at_all(
    served: Served, plain: Scripted, carrying: Scripted
) -> None:
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "lora:sql"}
    carrying.answer = [
        chunk | {"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}
        for word in ("SELECT", " 1")
    ]
    body = {"model": SQL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    told = served.request("POST", "/v1/chat/completions", json.dumps(body).encode())
    assert b"SELECT" in told.body
    assert b"stream_interrupted" in told.body
    assert len(carrying.asked) == 1
    assert plain.asked == []


def test_its_usage_is_accounted_under_its_full_name(served: Served, carrying: Scripted) -> None:
    told = ask(served, SQL)
    assert served.event(told.headers["x-request-id"]).route == SQL


def test_a_limit_of_the_base_holds_for_it_and_one_of_its_own_too(served: Served) -> None:
    make_limit(3, route=ROUTE)
    make_limit(2, route=SQL)
    assert [ask(served, model).status for model in (SQL, SQL, SQL, ROUTE, ROUTE)] == [200, 200, 429, 200, 429]


def test_where_each_model_has_an_amount_an_adapter_shares_its_bases(served: Served) -> None:
    make_limit(2, route=f"{ROUTE}*", each_route=True)
    assert [ask(served, model).status for model in (SQL, ROUTE, SQL, ROUTE)] == [200, 200, 429, 429]


def test_a_budget_and_a_price_of_the_base_hold_for_it(served: Served) -> None:
    make_price(ROUTE, request_micros=400)
    budget = make_budget(limit=1000, scope="route", subject=ROUTE, unit="money")
    told = []
    for model in (ROUTE, SQL, SQL):
        told.append(ask(served, model))
        served.event(told[-1].headers["x-request-id"])  # it is settled
    assert [answer.status for answer in told] == [200, 200, 429]
    assert told[2].json()["error"]["code"] == "insufficient_quota"
    event = served.event(told[1].headers["x-request-id"])
    assert (event.route, event.base, event.cost_micros) == (SQL, ROUTE, 400)
    assert BudgetPeriod.objects.get(budget=budget).spent == 800


def test_the_base_is_asked_as_ever(served: Served, plain: Scripted, carrying: Scripted) -> None:
    for _ in range(4):
        assert ask(served, ROUTE).json()["model"] == ROUTE
    assert {body["model"] for _, body in plain.asked + carrying.asked} == {ROUTE}


def test_a_key_for_the_base_may_use_it_and_a_key_for_it_may_not_use_the_base(served: Served) -> None:
    base, only = (make_api_key(name=name, routes=[name])[1] for name in (ROUTE, SQL))
    other = make_api_key(name="other", routes=["else"])[1]
    statuses = {
        (model, key): ask(served, model, key=key).status
        for key in (base, only, other)
        for model in (ROUTE, SQL)
    }
    assert statuses == {
        **{(ROUTE, base): 200, (SQL, base): 200},
        **{(ROUTE, only): 403, (SQL, only): 200},
        **{(ROUTE, other): 403, (SQL, other): 403},
    }

    def listed(key: str) -> dict[str, Any]:
        data = served.request("GET", "/v1/models", key=key).json()["data"]
        return {model["id"]: model.get("parent") for model in data}

    assert listed(base) == {ROUTE: None, SQL: ROUTE}
    assert listed(only) == {SQL: ROUTE}
    assert listed(other) == {}
    assert served.request("GET", f"/v1/models/{SQL}", key=only).json()["id"] == SQL
    assert served.request("GET", f"/v1/models/{SQL}", key=other).status == 404


@pytest.mark.parametrize("model", [f"{ROUTE}:law", f"{ROUTE}:", ":sql", f"{ROUTE}:sql:sql", "lora:sql"])
def test_an_adapter_that_is_none_is_an_unknown_model(served: Served, model: str) -> None:
    assert ask(served, model).status == 404


def test_a_route_that_has_the_name_goes_before(served: Served, plain: Scripted, carrying: Scripted) -> None:
    deployment = make_deployment(route=SQL, engine="vllm")
    make_worker(deployment=deployment, id=7303, url=plain.url, capabilities=list(CAN))
    publish_change("route", SQL)
    eventually(lambda: ask(served, SQL) and plain.asked, "the new route is known")
    assert plain.asked[-1][1]["model"] == SQL
    [known] = [m for m in served.request("GET", "/v1/models").json()["data"] if m["id"] == SQL]
    assert "parent" not in known
