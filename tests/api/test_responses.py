"""/v1/responses as clients meet it: the official client for what works, sockets for the rest."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from django.conf import settings
from django.utils import timezone
from openai import APIError, BadRequestError, NotFoundError
from pydantic import BaseModel

from openai_api.models import StoredResponse
from openai_api.tasks import forget_responses
from registry.states import Outcome
from tests.api.conftest import ROUTE, Answer, Served
from tests.factories import make_api_key, make_project

pytestmark = pytest.mark.django_db(transaction=True)


def ask(served: Served, key: str = "", **fields: Any) -> Answer:
    body = json.dumps({"model": ROUTE, **fields}).encode()
    return served.request("POST", "/v1/responses", body, key=key)


def events_of(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Each event of a chunked stream: its name and its data."""
    events = []
    lines = [line for line in body.decode().split("\r\n") if "event: " in line]
    for block in "\n\n".join(lines).split("\n\n"):
        if block.startswith("event: "):
            name, data = block.split("\n", 1)
            events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


async def test_a_whole_answer_is_a_response(served: Served) -> None:
    async with served.client() as client:
        response = await client.responses.create(model=ROUTE, input="!tokens 5", metadata={"a": "b"})
    assert response.id.startswith("resp_")
    assert (response.status, response.model, response.object) == ("completed", ROUTE, "response")
    assert len(response.output_text.split()) == 5
    (message,) = response.output
    assert (message.type, message.status, message.role) == ("message", "completed", "assistant")
    assert response.usage is not None
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (2, 5, 7)
    assert response.metadata == {"a": "b"}
    assert response.error is None
    assert response.incomplete_details is None


def test_the_ledger_has_the_usage_that_was_told(served: Served) -> None:
    for stream in (False, True):
        answer = ask(served, input="one two !tokens 6", stream=stream)
        assert answer.status == 200
        told = events_of(answer.body)[-1][1]["response"] if stream else answer.json()
        event = served.event(answer.headers["x-request-id"])
        assert (event.endpoint, event.outcome, event.stream) == ("/v1/responses", Outcome.OK, stream)
        assert event.prompt_tokens == told["usage"]["input_tokens"]
        assert event.completion_tokens == told["usage"]["output_tokens"]


def test_a_stream_has_its_events_in_order_and_no_done(served: Served) -> None:
    answer = ask(served, input="!tokens 3", stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert b"[DONE]" not in answer.body
    events = events_of(answer.body)
    assert [name for name, _ in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    data = [event for _, event in events]
    assert [event["type"] for event in data] == [name for name, _ in events]
    assert [event["sequence_number"] for event in data] == list(range(len(events)))
    created, ended = data[0]["response"], data[-1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert ended["id"] == created["id"] == f"resp_{answer.headers['x-request-id'].removeprefix('req_')}"
    text = "".join(event["delta"] for event in data if event["type"] == "response.output_text.delta")
    (message,) = ended["output"]
    assert message["content"] == [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    assert data[2]["item"] == message | {"status": "in_progress", "content": []}
    assert data[-2]["item"] == message
    assert {event["item_id"] for event in data if "item_id" in event} == {message["id"]}
    assert ended["usage"]["output_tokens"] == 3


async def test_the_clients_own_stream_helper_reads_it(served: Served) -> None:
    async with served.client() as client:
        async with client.responses.stream(model=ROUTE, input="!tokens 4") as stream:
            text = "".join(
                [event.delta async for event in stream if event.type == "response.output_text.delta"]
            )
            final = await stream.get_final_response()
        assert final.output_text == text
        assert (await client.responses.retrieve(final.id)).output_text == text


async def test_too_few_tokens_make_it_incomplete(served: Served) -> None:
    async with served.client() as client:
        whole = await client.responses.create(model=ROUTE, input="!tokens 9", max_output_tokens=2)
        stream = await client.responses.create(
            model=ROUTE, input="!tokens 9", max_output_tokens=2, stream=True
        )
        last = [event async for event in stream][-1]
    assert last.type == "response.incomplete"
    for response in (whole, last.response):
        assert response.status == "incomplete"
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.output[0].status == "incomplete"  # type: ignore[union-attr]
        assert len(response.output_text.split()) == 2


async def test_a_conversation_goes_on_from_a_response(served: Served) -> None:
    async with served.client() as client:
        first = await client.responses.create(model=ROUTE, input="one two three", instructions="be brief")
        second = await client.responses.create(model=ROUTE, input="four", previous_response_id=first.id)
        third = await client.responses.create(model=ROUTE, input="five", previous_response_id=second.id)
    assert third.previous_response_id == second.id
    assert first.usage is not None
    assert second.usage is not None
    assert third.usage is not None
    # The instructions of a response are not those of the next.
    assert first.usage.input_tokens == 5
    assert second.usage.input_tokens == 3 + 16 + 1
    assert third.usage.input_tokens == 3 + 16 + 1 + 16 + 1


async def test_an_item_is_referred_to_by_its_id(served: Served) -> None:
    async with served.client() as client:
        first = await client.responses.create(model=ROUTE, input="one two !tokens 4")
        items: list[Any] = [
            {"type": "item_reference", "id": first.output[0].id},
            {"role": "user", "content": "three"},
        ]
        second = await client.responses.create(model=ROUTE, input=items)
        listed = await client.responses.input_items.list(second.id, order="asc")
        assert second.usage is not None
        assert second.usage.input_tokens == 16 + 1
        assert [item.type for item in listed.data] == ["message", "message"]
        assert listed.data[0].id == first.output[0].id
        items[0]["id"] = "msg_nothing_0"
        with pytest.raises(BadRequestError) as refused:
            await client.responses.create(model=ROUTE, input=items)
    assert refused.value.param == "input[0].id"


async def test_a_response_is_read_listed_and_deleted(served: Served) -> None:
    said: list[Any] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
        {"role": "user", "content": "three"},
    ]
    async with served.client() as client:
        made = await client.responses.create(model=ROUTE, input=said)
        assert (await client.responses.retrieve(made.id)).to_dict() == made.to_dict()
        newest = await client.responses.input_items.list(made.id, limit=3)
        assert newest.has_more
        texts = [item.content[0].text async for item in newest]  # type: ignore[union-attr]
        assert texts == ["three", "two", "one", "be brief"]
        oldest = (await client.responses.input_items.list(made.id, order="asc")).to_dict()
        ids = [item["id"] for item in oldest["data"]]  # type: ignore[attr-defined, index]
        assert (oldest["first_id"], oldest["last_id"], oldest["has_more"]) == (ids[0], ids[-1], False)
        await client.responses.delete(made.id)
        with pytest.raises(NotFoundError):
            await client.responses.retrieve(made.id)
        with pytest.raises(BadRequestError) as refused:
            await client.responses.create(model=ROUTE, input="more", previous_response_id=made.id)
    assert (refused.value.code, refused.value.param) == (
        "previous_response_not_found",
        "previous_response_id",
    )


def test_deleting_says_so(served: Served) -> None:
    made = ask(served, input="hi").json()["id"]
    gone = served.request("DELETE", f"/v1/responses/{made}")
    assert gone.json() == {"id": made, "object": "response.deleted", "deleted": True}
    again = served.request("DELETE", f"/v1/responses/{made}")
    assert again.status == 404
    assert again.error()["param"] == "response_id"


def test_another_projects_response_is_not_there(served: Served) -> None:
    made = ask(served, input="hi").json()
    stranger = make_api_key(project=make_project(name="strangers"))[1]
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        refused = served.request(method, f"/v1/responses/{made['id']}{path}", key=stranger)
        assert refused.status == 404, (method, path)
        assert refused.error()["type"] == "invalid_request_error"
        assert served.request(method, f"/v1/responses/{made['id']}{path}", key=None).status == 401
    on = ask(served, key=stranger, input="hi", previous_response_id=made["id"])
    assert (on.status, on.error()["code"]) == (400, "previous_response_not_found")
    reference = [{"type": "item_reference", "id": made["output"][0]["id"]}]
    assert ask(served, key=stranger, input=reference).status == 400
    assert served.request("GET", f"/v1/responses/{made['id']}").status == 200


def test_what_is_not_to_be_stored_is_not(served: Served) -> None:
    made = ask(served, input="hi", store=False).json()
    assert made["store"] is False
    assert served.request("GET", f"/v1/responses/{made['id']}").status == 404
    assert not StoredResponse.objects.exists()


def test_only_a_response_in_the_background_can_be_cancelled(served: Served) -> None:
    made = ask(served, input="hi").json()["id"]
    refused = served.request("POST", f"/v1/responses/{made}/cancel", b"")
    assert (refused.status, refused.error()["message"]) == (400, "Cannot cancel a synchronous response.")


def test_urls_beside_it_are_told_as_json(served: Served) -> None:
    assert served.request("POST", "/v1/responses/compact", b"{}").error()["message"].startswith("Invalid URL")
    assert served.request("POST", "/v1/responses/input_tokens", b"{}").status == 404
    assert served.request("GET", "/v1/responses/resp_%00").error()["message"].startswith("Invalid URL")
    assert served.request("GET", "/v1/responses/resp_nothing").error()["message"].endswith("not found.")
    made = ask(served, input="hi").json()["id"]
    wrong = served.request("PUT", f"/v1/responses/{made}", b"{}")
    assert (wrong.status, wrong.headers["allow"]) == (405, "DELETE, GET")
    for words, param in (("limit=0", "limit"), ("order=up", "order"), ("after=x", "after")):
        refused = served.request("GET", f"/v1/responses/{made}/input_items?{words}")
        assert (refused.status, refused.error()["param"]) == (400, param)


def test_an_answer_cut_in_the_middle_is_an_error_and_a_failed_response(served: Served) -> None:
    answer = ask(served, input="!tokens 9 !error 2", stream=True)
    events = events_of(answer.body)
    assert [name for name, _ in events[-3:]] == ["response.output_text.delta", "error", "response.failed"]
    error, failed = events[-2][1], events[-1][1]["response"]
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    assert failed["output"][0]["status"] == "incomplete"
    assert len(failed["output"][0]["content"][0]["text"].split()) == 2
    assert served.event(answer.headers["x-request-id"]).outcome == Outcome.INTERRUPTED


async def test_the_client_raises_what_the_error_event_tells(served: Served) -> None:
    async with served.client() as client:
        stream = await client.responses.create(model=ROUTE, input="!tokens 9 !error 2", stream=True)
        with pytest.raises(APIError):
            [event async for event in stream]


def test_text_that_breaks_careless_relays_comes_whole_and_can_be_gone_on_from(served: Served) -> None:
    answer = ask(served, input="!garbage", stream=True)
    events = [event for _, event in events_of(answer.body)]
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    final = events[-1]["response"]
    assert final["output"][0]["content"][0]["text"] == text
    assert "data: [DONE]" in text
    kept = served.request("GET", f"/v1/responses/{final['id']}").json()
    assert kept == final
    assert ask(served, input="hi", previous_response_id=final["id"]).status == 200


WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


async def test_a_function_is_called_and_its_output_answered(served: Served) -> None:
    async with served.client() as client:
        first = await client.responses.create(
            model=ROUTE, input="What is the weather?", tools=[WEATHER], parallel_tool_calls=False
        )
        (call,) = first.output
        assert call.type == "function_call"
        assert (call.name, call.status) == ("weather", "completed")
        assert set(json.loads(call.arguments)) == {"city"}
        done: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
        second = await client.responses.create(
            model=ROUTE, input=done, tools=[WEATHER], previous_response_id=first.id
        )
        # The same, by a client that keeps the conversation itself.
        said: Any = [{"role": "user", "content": "What is the weather?"}, call.to_dict(), *done]
        third = await client.responses.create(model=ROUTE, input=said, tools=[WEATHER], store=False)
    assert second.output[0].type == "message"
    assert second.output_text
    assert second.output_text == third.output_text
    assert first.to_dict()["tools"] == [WEATHER]


async def test_a_call_is_streamed(served: Served) -> None:
    async with (
        served.client() as client,
        client.responses.stream(
            model=ROUTE,
            input="hi",
            tools=[WEATHER],
            tool_choice={"type": "function", "name": "weather"},
        ) as stream,
    ):
        events = [event async for event in stream]
        final = await stream.get_final_response()
    (call,) = final.output
    assert call.type == "function_call"
    names = [event.type for event in events]
    deltas = names.count("response.function_call_arguments.delta")
    assert names == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        *["response.function_call_arguments.delta"] * deltas,
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    told = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert told == call.arguments
    added = next(event for event in events if event.type == "response.output_item.added")
    assert added.item.arguments == ""  # type: ignore[union-attr]
    assert added.item.id == call.id


async def test_of_the_tools_only_those_allowed_are_offered(served: Served) -> None:
    other = WEATHER | {"name": "clock"}
    choice: Any = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "clock"}],
    }
    async with served.client() as client:
        response = await client.responses.create(
            model=ROUTE, input="hi", tools=[WEATHER, other], tool_choice=choice
        )
        choice["tools"][0]["name"] = "none"
        with pytest.raises(BadRequestError) as refused:
            await client.responses.create(model=ROUTE, input="hi", tools=[WEATHER, other], tool_choice=choice)
    assert {item.name for item in response.output if item.type == "function_call"} == {"clock"}
    assert refused.value.param == "tool_choice"


class City(BaseModel):
    name: str
    people: int


async def test_an_answer_has_the_form_that_was_asked_for(served: Served) -> None:
    async with served.client() as client:
        parsed = await client.responses.parse(model=ROUTE, input="Which city?", text_format=City)
        assert isinstance(parsed.output_parsed, City)
        async with client.responses.stream(model=ROUTE, input="Which city?", text_format=City) as stream:
            final = await stream.get_final_response()
    assert final.output_parsed == parsed.output_parsed


async def test_thoughts_are_an_item_of_their_own(served: Served) -> None:
    async with served.client() as client:
        whole = await client.responses.create(model=ROUTE, input="!think 3 !tokens 4")
        async with client.responses.stream(model=ROUTE, input="!think 3 !tokens 4") as stream:
            names = [event.type async for event in stream]
            final = await stream.get_final_response()
        again = await client.responses.create(model=ROUTE, input="hi", previous_response_id=whole.id)
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert [item.type for item in final.output] == ["reasoning", "message"]
    assert final.output_text == whole.output_text
    assert names.count("response.reasoning_text.delta") == 3
    assert names.count("response.output_text.delta") == 4
    assert names.index("response.reasoning_text.done") < names.index("response.output_text.delta")
    assert whole.usage is not None
    assert whole.usage.output_tokens_details.reasoning_tokens == 3
    # Thoughts are not told again.
    assert again.usage is not None
    assert again.usage.input_tokens == 4 + 4 + 1


@pytest.mark.parametrize(
    ("fields", "instead"),
    [
        ({"background": True}, "'stream'"),
        ({"conversation": "conv_1"}, "'previous_response_id'"),
        ({"prompt": {"id": "pmpt_1"}}, "'instructions'"),
    ],
)
def test_what_is_refused_says_what_to_do_instead(
    served: Served, fields: dict[str, Any], instead: str
) -> None:
    answer = served.request(
        "POST", "/v1/responses", json.dumps({"model": ROUTE, "input": "hi", **fields}).encode()
    )
    assert (answer.status, answer.error()["code"]) == (400, "unsupported_value")
    assert instead in answer.error()["message"]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({}, "missing_required_parameter", "input"),
        ({"input": ""}, "invalid_value", "input"),
        ({"input": []}, "empty_array", "input"),
        ({"input": 7}, "invalid_type", "input"),
        ({"input": "hi", "background": True}, "unsupported_value", "background"),
        ({"input": "hi", "conversation": "conv_1"}, "unsupported_value", "conversation"),
        ({"input": "hi", "max_output_tokens": 0}, "integer_below_min_value", "max_output_tokens"),
        ({"input": "hi", "temperature": 3}, "decimal_above_max_value", "temperature"),
        ({"input": "hi", "tools": [{"type": "web_search"}]}, "unsupported_value", "tools[0].type"),
        ({"input": "hi", "tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].name"),
        ({"input": "hi", "tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"input": "hi", "reasoning": {"effort": "huge"}}, "invalid_value", "reasoning.effort"),
        ({"input": "hi", "text": {"verbosity": "high"}}, "unsupported_value", "text.verbosity"),
        (
            {"input": "hi", "text": {"format": {"type": "json_schema", "name": "a"}}},
            "missing_required_parameter",
            "text.format.schema",
        ),
        ({"input": [{"type": "web_search_call"}]}, "unsupported_value", "input[0].type"),
        ({"input": [{"role": "user"}]}, "missing_required_parameter", "input[0].content"),
        ({"input": [{"role": "wizard", "content": "hi"}]}, "invalid_value", "input[0].role"),
        (
            {"input": [{"type": "function_call_output", "output": "1"}]},
            "missing_required_parameter",
            "input[0].call_id",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
            "unsupported_value",
            "input[0].content[0].type",
        ),
        (
            {"input": "hi", "previous_response_id": "resp_1"},
            "previous_response_not_found",
            "previous_response_id",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_own_name(
    served: Served, fields: dict[str, Any], code: str, param: str
) -> None:
    answer = ask(served, **fields)
    assert answer.status == 400
    error = answer.error()
    assert (error["code"], error["param"]) == (code, param)
    assert "messages" not in error["message"]


def test_the_model_is_required_and_must_exist(served: Served) -> None:
    absent = served.request("POST", "/v1/responses", b'{"input": "hi"}')
    assert (absent.status, absent.error()["param"]) == (400, "model")
    unknown = ask(served, model="nothing", input="hi")
    assert (unknown.status, unknown.error()["code"]) == (404, "model_not_found")
    assert ask(served, input="hi", key="sk-wrong").status == 401


def test_what_asks_for_nothing_passes(served: Served) -> None:
    answer = ask(
        served,
        input=[{"role": "user", "content": "hi"}],
        include=[],
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=False,
        text={"format": {"type": "text"}},
        reasoning=None,
        truncation="disabled",
        stream=None,
        unknown_field=1,
    )
    assert answer.status == 200, answer.body


def test_expired_responses_are_not_there_and_go(served: Served) -> None:
    old, kept = (ask(served, input="hi").json()["id"] for _ in range(2))
    StoredResponse.objects.filter(id=old).update(expires_at=timezone.now() - timedelta(seconds=1))
    assert served.request("GET", f"/v1/responses/{old}").status == 404
    assert settings.CELERY_BEAT_SCHEDULE["forget_responses"]["task"] == forget_responses.name
    forget_responses()
    assert [row.id for row in StoredResponse.objects.all()] == [kept]


def test_what_is_built_on_is_kept_as_long(served: Served) -> None:
    first = ask(served, input="hi").json()["id"]
    soon = timezone.now() + timedelta(minutes=1)
    StoredResponse.objects.filter(id=first).update(expires_at=soon)
    second = ask(served, input="more", previous_response_id=first).json()["id"]
    rows = {row.id: row.expires_at for row in StoredResponse.objects.all()}
    assert rows[first] == rows[second] > soon
