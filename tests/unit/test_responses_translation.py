"""How /v1/responses becomes a chat completion, and a chat completion a response; without a worker."""

from __future__ import annotations

import json
from typing import Any

import pytest

from inference.errors import WorkerBroke
from openai_api.endpoints import RESPONSES
from openai_api.errors import InvalidRequest
from openai_api.responses.items import item_id, place_of
from openai_api.responses.output import CallDelta, Delta, FunctionDelta, Logprobs, Output
from openai_api.responses.words import in_these_words, renamed


def chat(**fields: Any) -> dict[str, Any]:
    """The body for a worker."""
    call = RESPONSES.parse(json.dumps({"model": "m", **fields}).encode())
    body: dict[str, Any] = json.loads(call.forwarded(call.needs()))
    return body


def test_items_become_messages() -> None:
    body = chat(
        instructions="be brief",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "1"},
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": [{"type": "input_text", "text": "2"}],
            },
        ],
    )
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "tool"]
    calls = body["messages"][2]["tool_calls"]
    assert [(one["id"], one["function"]["name"]) for one in calls] == [("c1", "f"), ("c2", "g")]
    assert [message["tool_call_id"] for message in body["messages"][3:]] == ["c1", "c2"]


def test_flat_tools_and_formats_become_nested_ones() -> None:
    schema = {"type": "object", "properties": {}}
    body = chat(
        input="hi",
        max_output_tokens=20,
        tools=[{"type": "function", "name": "f", "parameters": schema, "strict": True}],
        tool_choice={"type": "function", "name": "f"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        reasoning={"effort": "low", "summary": "auto"},
    )
    function = {"name": "f", "parameters": schema, "strict": True}
    assert body["tools"] == [{"type": "function", "function": function}]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    form = {"name": "n", "schema": schema, "strict": True}
    assert body["response_format"] == {"type": "json_schema", "json_schema": form}
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (20, True, 2)
    assert body["reasoning_effort"] == "low"


def test_empty_lists_and_neutral_values_ask_for_nothing() -> None:
    body = json.dumps({"model": "m", "input": "hi", "include": [], "tools": [], "tool_choice": "auto"})
    assert RESPONSES.parse(body.encode()).needs() == frozenset()


def test_an_error_in_a_message_names_the_item_that_it_came_from() -> None:
    image = {"type": "input_image", "image_url": "https://example.org/a.png"}
    with pytest.raises(InvalidRequest) as refused:
        chat(
            instructions="be brief",
            input=[{"role": "user", "content": "one"}, {"role": "user", "content": [image]}],
        )
    assert (refused.value.param or "").startswith("input[1].content[0]")
    assert "messages" not in str(refused.value)


@pytest.mark.parametrize(
    ("chats", "ours"),
    [
        ("messages", "input"),
        ("messages[3].content", "input"),
        ("max_tokens", "max_output_tokens"),
        ("max_completion_tokens", "max_output_tokens"),
        ("response_format", "text.format"),
        ("response_format.json_schema.schema.properties", "text.format.schema.properties"),
        ("tools[2].function.name", "tools[2].name"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("reasoning_effort", "reasoning.effort"),
        ("temperature", "temperature"),
    ],
)
def test_fields_have_the_names_of_this_endpoint(chats: str, ours: str) -> None:
    assert renamed(chats) == ours
    error = {"message": f"Unsupported value: '{chats}'.", "type": "t", "param": chats, "code": None}
    told = in_these_words({"error": error})["error"]
    assert (told["param"], told["message"]) == (ours, f"Unsupported value: '{ours}'.")


def test_an_items_id_leads_back_to_its_place() -> None:
    assert place_of(item_id("message", "resp_12ab", 3)) == ("resp_12ab", 3)
    for other in ("", "msg", "msg_1", "msg_\x00_1", "msg_1_x", "msg__1", "msg_1_999999"):
        assert place_of(other) is None


def call(index: int, name: str | None = None, arguments: str | None = None) -> Delta:
    return Delta(tool_calls=[CallDelta(index=index, function=FunctionDelta(name=name, arguments=arguments))])


def test_calls_follow_each_other_and_each_has_an_id() -> None:
    output = Output("resp_1", 2)
    events = output.take(Delta(content="well"))
    for delta in (call(0, "f"), call(0, None, "{"), call(0, None, "}"), call(1, "g", "[]")):
        events += output.take(delta)
    events += output.finish("completed")
    assert [event["type"].removeprefix("response.") for event in events] == [
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert [item["id"] for item in output.items] == ["msg_1_2", "fc_1_3", "fc_1_4"]
    assert [item.get("arguments") for item in output.items] == [None, "{}", "[]"]
    assert len({item.get("call_id") for item in output.items}) == 3
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert [item["status"] for item in added] == ["in_progress"] * 3


def test_a_worker_that_goes_back_to_a_call_is_not_believed() -> None:
    output = Output("resp_1", 0)
    output.take(call(0, "f"))
    output.take(call(1, "g"))
    with pytest.raises(WorkerBroke):
        output.take(call(0, None, "{}"))


def test_logprobs_are_told_with_their_text() -> None:
    entry = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    output = Output("resp_1", 0)
    events = output.take(Delta(content="a"), Logprobs(content=[entry]))
    assert events[1]["part"]["logprobs"] == []
    assert events[2]["logprobs"] == [entry]
    output.take(Delta(content="b"), Logprobs(content=[entry]))
    output.finish("completed")
    assert output.items[0]["content"][0]["logprobs"] == [entry, entry]


def test_an_answer_of_nothing_is_an_empty_message() -> None:
    output = Output("resp_1", 1)
    events = output.finish("completed")
    assert "response.output_text.delta" not in [event["type"] for event in events]
    assert output.items[0]["content"][0]["text"] == ""
