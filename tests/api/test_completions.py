"""POST /v1/completions through the gateway, with the official client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from registry.actions.events import publish_change
from registry.models import Worker as WorkerRow
from registry.states import Outcome
from tests.api.conftest import FIELDS, ROUTE, Served, eventually, say

pytestmark = pytest.mark.django_db(transaction=True)

PATH = "/v1/completions"


def ask(served: Served, **body: Any) -> Any:
    return served.request("POST", PATH, json.dumps({"model": ROUTE, **body}).encode())


async def test_a_completion_goes_on_for_sixteen_tokens_unless_told(served: Served) -> None:
    async with served.client() as client:
        answer = await client.completions.create(model=ROUTE, prompt="!tokens 40 Once upon")
        longer = await client.completions.create(model=ROUTE, prompt="!tokens 40 Once upon", max_tokens=20)
    assert answer.object == "text_completion"
    assert answer.model == ROUTE
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 16)
    assert answer.choices[0].finish_reason == "length"
    assert longer.choices[0].text.startswith(answer.choices[0].text)
    assert len(longer.choices[0].text.split()) == 20


async def test_streamed_and_not_the_text_is_the_same(served: Served) -> None:
    async with served.client() as client:
        whole = await client.completions.create(model=ROUTE, prompt="!garbage", max_tokens=50)
        stream = await client.completions.create(model=ROUTE, prompt="!garbage", max_tokens=50, stream=True)
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert all(chunk.usage is None for chunk in chunks)


async def test_usage_comes_once_and_last_when_asked_for(served: Served) -> None:
    async with served.client() as client:
        stream = await client.completions.create(
            model=ROUTE,
            prompt=["one two", "three"],
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 8)


def test_several_prompts_have_their_choices_in_order_and_one_entry_in_the_ledger(served: Served) -> None:
    answer = ask(served, prompt=["first one", "second", "and a third"], max_tokens=3, echo=True)
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert choices[2]["text"].startswith("and a third")
    event = served.event(answer.headers["x-request-id"])
    assert (event.prompt_tokens, event.completion_tokens) == (6, 9)
    assert (event.endpoint, event.outcome, event.stream) == (PATH, Outcome.OK, False)


async def test_token_ids_are_one_prompt_or_several(served: Served) -> None:
    async with served.client() as client:
        one = await client.completions.create(model=ROUTE, prompt=[3, 4, 5], max_tokens=2)
        several = await client.completions.create(model=ROUTE, prompt=[[3, 4, 5], [6]], max_tokens=2)
    assert len(one.choices) == 1
    assert [choice.text for choice in several.choices][:1] == [one.choices[0].text]
    assert several.usage is not None
    assert several.usage.prompt_tokens == 4


async def test_stop_ends_the_text_before_it(served: Served) -> None:
    async with served.client() as client:
        whole = await client.completions.create(model=ROUTE, prompt="go", max_tokens=8)
        word = whole.choices[0].text.split()[3]
        cut = await client.completions.create(model=ROUTE, prompt="go", max_tokens=8, stop=word)
    assert cut.choices[0].text == whole.choices[0].text[: whole.choices[0].text.index(word)]
    assert cut.choices[0].finish_reason == "stop"


def test_nothing_generated_and_echo_gives_the_prompt(served: Served) -> None:
    answer = ask(served, prompt="Once upon", max_tokens=0, echo=True).json()
    assert answer["choices"][0]["text"] == "Once upon"
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "prompt"),
        ({"prompt": None}, "missing_required_parameter", "prompt"),
        ({"prompt": []}, "empty_array", "prompt"),
        ({"prompt": [[]]}, "empty_array", "prompt[0]"),
        ({"prompt": 5}, "invalid_type", "prompt"),
        ({"prompt": ["text", 5]}, "invalid_type", "prompt"),
        ({"prompt": [[1], "text"]}, "invalid_type", "prompt"),
        ({"prompt": [-1]}, "integer_below_min_value", "prompt[0]"),
        ({"prompt": [99999]}, "invalid_value", "prompt"),
        ({"prompt": ["x"] * 129}, "array_above_max_length", "prompt"),
        ({"prompt": "x", "max_tokens": -1}, "integer_below_min_value", "max_tokens"),
        ({"prompt": "x", "best_of": 2}, "unsupported_value", "best_of"),
        ({"prompt": "x", "suffix": "end"}, "unsupported_value", "suffix"),
        ({"prompt": "x", "stream_options": {}}, "invalid_value", "stream_options"),
        ({"prompt": "x", "stop": ["a"] * 17}, "array_above_max_length", "stop"),
        ({"prompt": "word " * 9000}, "context_length_exceeded", "prompt"),
    ],
)
def test_a_bad_field_is_named(served: Served, body: dict[str, Any], code: str, param: str) -> None:
    refused = ask(served, **body)
    error = refused.error()
    assert (refused.status, error["code"], error["param"]) == (400, code, param)


def test_as_many_prompts_as_the_limit_are_answered(served: Served) -> None:
    answer = ask(served, prompt=["x"] * 128, max_tokens=1)
    assert answer.status == 200
    assert len(answer.json()["choices"]) == 128


def test_optional_fields_may_be_null_and_unknown_ones_are_ignored(served: Served) -> None:
    given = dict.fromkeys(["suffix", "logprobs", "best_of", "n", "echo", "stop", "seed", "stream"])
    assert ask(served, prompt="x", user="u", whatever=1, **given).status == 200


def test_a_worker_that_announces_no_endpoint_answers_chat_and_nothing_else(served: Served) -> None:
    WorkerRow.objects.update(capabilities=FIELDS)
    publish_change("worker", ROUTE)

    def refused() -> Any:
        answer = ask(served, prompt="x", max_tokens=1)
        return answer if answer.status == 400 else None

    error = eventually(refused, "the gateway looked at the fleet again").error()
    assert (error["param"], error["code"]) == ("model", "unsupported_value")
    assert error["message"] == f"The model `{ROUTE}` does not support this endpoint."
    assert served.chat(say("still")).status == 200


def test_a_wrong_key_learns_nothing(served: Served) -> None:
    refused = served.request("POST", PATH, b'{"model": "none"}', key="rh-wrong")
    assert refused.status == 401
    assert refused.error()["code"] == "invalid_api_key"


def test_get_is_told_that_post_is_meant(served: Served) -> None:
    refused = served.request("GET", PATH)
    assert (refused.status, refused.headers["allow"]) == (405, "POST")
    assert refused.error()["code"] == "method_not_supported"
