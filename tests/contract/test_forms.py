"""Answers that must have a form: JSON of a schema, and calls of tools, whole and in pieces."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from tests.contract.serving import Served, text_of

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"get_weather": CITY, "ring": NOTHING}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Now.", "parameters": CITY}},
    {"type": "function", "function": {"name": "ring", "description": "A bell.", "parameters": NOTHING}},
]
WEATHER = [{"role": "user", "content": "What is the weather in 'Oslo' for 3 days?"}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}


def check_calls(calls: list[dict[str, Any]]) -> None:
    for call in calls:
        assert set(call) == {"id", "type", "function"}
        assert call["type"] == "function"
        assert call["id"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])
    assert len({call["id"] for call in calls}) == len(calls)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_an_answer_keeps_to_its_schema(served: Served, temperature: float) -> None:
    # Between its parts JSON may have as many spaces as a wild model likes.
    fields = {"response_format": SCHEMA, "temperature": temperature, "max_tokens": 400, "top_k": 20}
    answer = served.chat(**fields)
    assert answer["choices"][0]["finish_reason"] == "stop"
    jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), CITY)
    jsonschema.validate(json.loads(text_of(served.stream(**fields))), CITY)


def test_the_extra_field_says_the_same(served: Served) -> None:
    fields = {"structured_outputs": {"json": CITY}, "temperature": 1.0, "max_tokens": 400, "top_k": 20}
    jsonschema.validate(json.loads(served.chat(**fields)["choices"][0]["message"]["content"]), CITY)
    assert served.chat(structured_outputs={"choice": ["north", "south"]}, max_tokens=20)["choices"][0][
        "message"
    ]["content"] in ("north", "south")


def test_json_without_a_schema_is_an_object(served: Served) -> None:
    answer = served.chat(response_format={"type": "json_object"}, temperature=0, max_tokens=200)
    [choice] = answer["choices"]
    if choice["finish_reason"] == "stop":  # a random model may not come to an end
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    else:
        assert choice["message"]["content"].lstrip().startswith("{")


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_tool_that_must_be_called_is(served: Served, temperature: float) -> None:
    answer = served.chat(
        messages=WEATHER,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=temperature,
        top_k=20,
        max_tokens=400,
    )
    [choice] = answer["choices"]
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"]
    check_calls(choice["message"]["tool_calls"])
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_the_tool_that_is_named_is_called(served: Served, temperature: float) -> None:
    answer = served.chat(
        messages=WEATHER, tools=TOOLS, tool_choice=NAMED, temperature=temperature, top_k=20, max_tokens=400
    )
    [choice] = answer["choices"]
    [call] = choice["message"]["tool_calls"]
    check_calls([call])
    assert call["function"]["name"] == "get_weather"
    assert choice["finish_reason"] == "stop"  # as OpenAI has it: the model had no choice


def test_a_tool_that_may_be_called_is_called_well_or_not_at_all(served: Served) -> None:
    for choice in ("auto", None):
        fields = {} if choice is None else {"tool_choice": choice}
        answer = served.chat(messages=WEATHER, tools=TOOLS, temperature=0, max_tokens=100, **fields)
        [told] = answer["choices"]
        calls = told["message"].get("tool_calls") or []
        check_calls(calls)
        assert bool(calls) == (told["finish_reason"] == "tool_calls")
        if served.simulated:
            assert calls[0]["function"]["name"] == "get_weather"


def test_no_tool_is_called_when_none_may_be(served: Served) -> None:
    answer = served.chat(messages=WEATHER, tools=TOOLS, tool_choice="none", temperature=0, max_tokens=20)
    assert "tool_calls" not in answer["choices"][0]["message"]
    assert answer["choices"][0]["message"]["content"] is not None


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_the_pieces_of_a_call_join_to_the_whole(served: Served, choice: Any) -> None:
    fields = {
        **{"messages": WEATHER, "tools": TOOLS, "tool_choice": choice, "temperature": 0},
        **{"max_tokens": 400, "parallel_tool_calls": False},
    }
    [whole] = served.chat(**fields)["choices"][0]["message"]["tool_calls"]
    chunks = served.stream(**fields)
    pieces = [
        piece
        for chunk in chunks
        for told in chunk["choices"]
        for piece in told["delta"].get("tool_calls") or ()
    ]
    first, *rest = pieces
    assert {piece["index"] for piece in pieces} == {0}
    assert first["id"]
    assert first["type"] == "function"
    assert first["function"]["name"] == whole["function"]["name"]
    assert not any("id" in piece or "name" in piece["function"] for piece in rest)
    joined = "".join(piece["function"].get("arguments") or "" for piece in pieces)
    assert json.loads(joined) == json.loads(whole["function"]["arguments"])
    assert not text_of(chunks)
    ends = [told["finish_reason"] for chunk in chunks for told in chunk["choices"] if told["finish_reason"]]
    assert ends == ["stop" if choice == NAMED else "tool_calls"]
