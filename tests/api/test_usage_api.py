"""GET /v1/organization/usage/{completions,embeddings} and /costs, as OpenAI's scripts ask them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import pytest

from registry.actions.rollups import HOUR, roll_up
from registry.actions.usage import record_usage
from registry.models import ApiKey, Price, UsageEvent
from tests.api.conftest import Served, eventually, say
from tests.usage import make_event, make_traffic, sums

pytestmark = pytest.mark.django_db(transaction=True)

START = datetime(2026, 3, 1, tzinfo=UTC)
PATH = "/v1/organization/usage/completions"


def seconds(instant: datetime) -> int:
    return int(instant.timestamp())


def ask(served: Served, path: str = PATH, **words: Any) -> Any:
    answer = served.request("GET", f"{path}?{urlencode(words, doseq=True)}")
    assert answer.status == 200, answer.body
    return answer.json()


def results(page: Any) -> list[dict[str, Any]]:
    return [result for bucket in page["data"] for result in bucket["results"]]


def of_project(served: Served) -> dict[str, Any]:
    """Facts of the project whose key asks."""
    project = ApiKey.objects.get(public_id=served.api_key.split("-")[1]).project
    return {"project_id": project.pk, "project_name": project.name}


def test_the_api_says_what_the_ledger_says_page_by_page(served: Served) -> None:
    keys = [("aaa", "alpha"), ("user-7", "paula")]
    project = of_project(served)
    make_traffic(
        start=START,
        end=START + timedelta(days=3),
        events=200,
        keys=keys,
        projects=[(project["project_id"], project["project_name"])],
    )
    foreign = make_event(started_at=START, project_id=project["project_id"] + 1, prompt_tokens=10**6)
    record_usage([foreign])
    roll_up(until=START + timedelta(days=1, hours=12))
    mine = UsageEvent.objects.filter(project_id=project["project_id"]).exclude(endpoint="/v1/embeddings")
    expected = sums(mine)

    words = {
        "start_time": seconds(START),
        "end_time": seconds(START + timedelta(days=3)),
        "bucket_width": "1h",
        "limit": 10,
        "group_by[]": ["project_id", "user_id", "api_key_id", "model"],
    }
    found: list[dict[str, Any]] = []
    ends = []
    page = ask(served, **words)
    while True:
        assert page["object"] == "page"
        assert len(page["data"]) <= 10
        found += results(page)
        ends += [(bucket["start_time"], bucket["end_time"]) for bucket in page["data"]]
        if not page["has_more"]:
            assert page["next_page"] is None
            break
        page = ask(served, **words, page=page["next_page"])
    assert ends == [
        (seconds(START + number * HOUR), seconds(START + (number + 1) * HOUR)) for number in range(72)
    ]
    assert sum(result["num_model_requests"] for result in found) == expected["requests"]
    assert sum(result["input_tokens"] for result in found) == expected["input_tokens"]
    assert sum(result["input_cached_tokens"] for result in found) == expected["cached_tokens"]
    assert sum(result["output_tokens"] for result in found) == expected["output_tokens"]
    assert {result["project_id"] for result in found} == {str(project["project_id"])}
    assert {(result["api_key_id"], result["user_id"]) for result in found} == {
        ("aaa", None),
        ("user-7", "user-7"),
    }
    one = ask(served, **words | {"api_key_ids": "aaa", "models": "small", "limit": 72, "group_by": "batch"})
    assert sum(result["num_model_requests"] for result in results(one)) == (
        mine.filter(key_public_id="aaa", route="small").count()
    )


def test_a_days_result_has_openais_shape(served: Served) -> None:
    record_usage(
        [
            make_event(**of_project(served), started_at=START, prompt_tokens=7, cached_tokens=3),
            make_event(**of_project(served), started_at=START, endpoint="/v1/embeddings", prompt_tokens=99),
        ]
    )
    page = ask(served, start_time=seconds(START), end_time=seconds(START + timedelta(days=2)))
    assert page == {
        "object": "page",
        "data": [
            {
                "object": "bucket",
                "start_time": seconds(START),
                "end_time": seconds(START + timedelta(days=1)),
                "results": [
                    {
                        "object": "organization.usage.completions.result",
                        "input_tokens": 7,
                        "output_tokens": 0,
                        "input_cached_tokens": 3,
                        "input_audio_tokens": 0,
                        "output_audio_tokens": 0,
                        "num_model_requests": 1,
                        "project_id": None,
                        "user_id": None,
                        "api_key_id": None,
                        "model": None,
                        "batch": None,
                    }
                ],
            },
            {
                "object": "bucket",
                "start_time": seconds(START + timedelta(days=1)),
                "end_time": seconds(START + timedelta(days=2)),
                "results": [],
            },
        ],
        "has_more": False,
        "next_page": None,
    }


def test_embeddings_are_told_by_themselves_in_openais_shape(served: Served) -> None:
    facts = of_project(served)
    record_usage(
        [
            make_event(**facts, started_at=START, endpoint="/v1/embeddings", prompt_tokens=99, route="e5"),
            make_event(**facts, started_at=START, prompt_tokens=7),
        ]
    )
    words = {"start_time": seconds(START), "end_time": seconds(START + timedelta(days=1))}
    page = ask(served, "/v1/organization/usage/embeddings", **words, group_by="model")
    assert results(page) == [
        {
            "object": "organization.usage.embeddings.result",
            "input_tokens": 99,
            "num_model_requests": 1,
            "project_id": None,
            "user_id": None,
            "api_key_id": None,
            "model": "e5",
        }
    ]


def test_costs_are_told_by_the_day_page_by_page(served: Served) -> None:
    Price.objects.create(starts_at=START - timedelta(days=1), input_micros=2_000_000)
    facts = of_project(served)
    events = [
        make_event(
            **facts,
            started_at=START + timedelta(days=day),
            prompt_tokens=10**5,
            route=route,
            endpoint=endpoint,
        )
        for day in range(3)
        for route, endpoint in (("small", "/v1/chat/completions"), ("e5", "/v1/embeddings"))
    ]
    foreign = make_event(started_at=START, project_id=facts["project_id"] + 1, prompt_tokens=10**6)
    record_usage([*events, foreign])
    path = "/v1/organization/costs"
    words = {"start_time": seconds(START), "end_time": seconds(START + timedelta(days=3))}
    page = ask(served, path, **words, limit=2)
    assert page["has_more"]
    last = ask(served, path, **words, limit=2, page=page["next_page"])
    assert not last["has_more"]
    told = {
        "object": "organization.costs.result",
        "amount": {"value": 0.4, "currency": "usd"},
        "line_item": None,
        "project_id": None,
        "api_key_id": None,
    }
    assert results(page) + results(last) == [told] * 3
    split = results(ask(served, path, **words, group_by="line_item"))
    assert [(result["line_item"], result["amount"]["value"]) for result in split] == (
        [("e5", 0.2), ("small", 0.2)] * 3
    )
    # A correction has no tokens, only a cost.
    record_usage(
        [
            make_event(
                **facts,
                started_at=START,
                request_id=f"{events[0].request_id}#r1",
                corrects=events[0].request_id,
                cost_micros=-100_000,
            )
        ]
    )
    roll_up(until=START + timedelta(days=2))
    amounts = [result["amount"]["value"] for result in results(ask(served, path, **words))]
    assert amounts == [0.3, 0.4, 0.4]


@pytest.mark.parametrize(
    ("path", "words", "param"),
    [
        ("/v1/organization/costs", {"bucket_width": "1h"}, "bucket_width"),
        ("/v1/organization/costs", {"group_by": "model"}, "group_by"),
        ("/v1/organization/costs", {"limit": 181}, "limit"),
        ("/v1/organization/usage/embeddings", {"group_by": "batch"}, "group_by"),
        (PATH, {"group_by": "line_item"}, "group_by"),
    ],
)
def test_each_of_them_has_its_own_words(served: Served, path: str, words: dict[str, Any], param: str) -> None:
    answer = served.request("GET", f"{path}?{urlencode({'start_time': 100} | words)}")
    assert answer.status == 400
    assert answer.error()["param"] == param


def test_what_was_just_asked_is_counted_as_the_client_was_told(served: Served) -> None:
    began = int(datetime.now(UTC).timestamp()) - 1
    answer = served.chat(say("one two three", max_tokens=5))
    assert answer.status == 200
    usage = answer.json()["usage"]

    def counted() -> list[dict[str, Any]]:
        return results(ask(served, start_time=began, bucket_width="1m", **{"group_by": "api_key_id"}))

    (result,) = eventually(counted, "the ledger has it")
    assert result["input_tokens"] == usage["prompt_tokens"]
    assert result["output_tokens"] == usage["completion_tokens"]
    assert result["api_key_id"] == served.api_key.split("-")[1]


@pytest.mark.parametrize(
    ("words", "param"),
    [
        ({}, "start_time"),
        ({"start_time": "soon"}, "start_time"),
        ({"start_time": "9" * 30}, "start_time"),
        ({"start_time": 100, "end_time": 100}, "end_time"),
        ({"start_time": 100, "bucket_width": "1w"}, "bucket_width"),
        ({"start_time": 100, "group_by": "mood"}, "group_by"),
        ({"start_time": 100, "limit": 32}, "limit"),
        ({"start_time": 100, "limit": "-1"}, "limit"),
        ({"start_time": 100, "page": "page_x"}, "page"),
        ({"start_time": 100, "page": "page_50"}, "page"),
    ],
)
def test_a_word_that_cannot_be_used_is_named(served: Served, words: dict[str, Any], param: str) -> None:
    answer = served.request("GET", f"{PATH}?{urlencode(words)}")
    assert answer.status == 400
    assert answer.error()["param"] == param


def test_usage_needs_a_key_and_another_projects_id_finds_nothing(served: Served) -> None:
    assert served.request("GET", PATH, key=None).status == 401
    record_usage([make_event(started_at=START, project_id=987, prompt_tokens=1)])
    for project_ids in ("987", "none", "²"):
        page = ask(served, start_time=seconds(START), limit=1, project_ids=project_ids)
        assert results(page) == []


def test_an_export_is_streamed_by_the_gateway(served: Served) -> None:
    from django.contrib.auth import get_user_model
    from django.test import Client

    client = Client(headers={"host": f"127.0.0.1:{served.port}"})
    client.force_login(get_user_model().objects.create_superuser("olga", password="x"))
    record_usage([make_event(started_at=START, key_name=f"key {number}") for number in range(50)])
    cookie = f"Cookie: sessionid={client.cookies['sessionid'].value}"
    words = urlencode({"from": "2026-03-01", "to": "2026-03-01", "format": "csv"})
    answer = served.request("GET", f"/admin/usage/?{words}", None, cookie, key=None)
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["transfer-encoding"] == "chunked"
    assert "no-store" in answer.headers["cache-control"]
    assert b"2026-03-01,abc," in answer.body
