"""Optional fields through a real gateway: honoured where the engine has them, refused by name elsewhere."""

from __future__ import annotations

import json
from typing import Any

import pytest

from registry.actions.events import publish_change
from registry.models import UsageEvent
from tests.api.conftest import FIELDS, ROUTE, Served, say
from tests.factories import make_deployment, make_worker

pytestmark = pytest.mark.django_db(transaction=True)

PLAIN = "org/plain"
TOOL = {"type": "function", "function": {"name": "depart", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"stop": {"type": "string"}}, "required": ["stop"]}


@pytest.fixture
def plain(facts: str) -> None:
    """Beside the usual route one whose only worker honours hardly anything."""
    deployment = make_deployment(route=PLAIN)
    capabilities = [*FIELDS, "endpoint:chat", "endpoint:completions"]
    make_worker(deployment=deployment, id=7009, url="http://127.0.0.1:9", capabilities=capabilities)
    publish_change("route", PLAIN)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [TOOL]}, "tools"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"guided_json": {}}, "guided_json"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"include_reasoning": False}, "include_reasoning"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
    ],
)
def test_what_no_engine_of_the_model_honours_is_refused_by_name(
    plain: None, served: Served, fields: dict[str, Any], param: str
) -> None:
    answer = served.chat(say("hi") | {"model": PLAIN, **fields})
    error = answer.error()
    assert (answer.status, error["code"], error["param"]) == (400, "unsupported_value", param)
    assert not UsageEvent.objects.exists()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "root ::= 'a'"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"guided_grammar": "root ::= 'a'"}, "guided_grammar"),
    ],
)
def test_a_kind_of_form_that_the_engine_lacks_is_refused_before_it_is_asked(
    served: Served, fields: dict[str, Any], param: str
) -> None:
    for path, body in (
        ("/v1/chat/completions", say("hi", **fields)),
        ("/v1/completions", {"model": ROUTE, "prompt": "hi", **fields}),
    ):
        answer = served.request("POST", path, json.dumps(body).encode())
        error = answer.error()
        assert (answer.status, error["code"], error["param"]) == (400, "unsupported_value", param)
        assert f"'{param}'" in error["message"]
    assert not UsageEvent.objects.exists()


def test_several_greedy_answers_are_alike(served: Served) -> None:
    choices = served.chat(say("!tokens 5", n=3, temperature=0)).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]


async def test_tools_and_forms_are_honoured_where_the_engine_has_them(served: Served) -> None:
    called = served.chat(say("hi", tools=[TOOL], tool_choice="required")).json()["choices"][0]
    assert called["message"]["tool_calls"][0]["function"]["name"] == "depart"
    for fields in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
        {"guided_json": SCHEMA},
        {"structured_outputs": {"json": SCHEMA}},
    ):
        answer = served.chat(say("hi") | fields)
        assert answer.status == 200, answer.body
        assert set(json.loads(answer.json()["choices"][0]["message"]["content"])) == {"stop"}
    chosen = served.chat(say("hi", guided_choice=["left", "right"])).json()
    assert chosen["choices"][0]["message"]["content"] in ("left", "right")


def test_what_a_usual_client_sends_beside_passes(served: Served) -> None:
    answer = served.chat(
        say(
            "hi",
            tools=[],
            tool_choice=None,
            parallel_tool_calls=False,
            best_of=1,
            stream=True,
            stream_options={"include_usage": True, "include_obfuscation": False},
            priority=5,
            request_id="mine",
            cache_salt="x",
            service_tier="auto",
        )
    )
    assert answer.status == 200, answer.body
    assert b"mine" not in answer.body
