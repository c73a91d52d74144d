"""POST /v1/messages and /v1/messages/count_tokens, through Anthropic's own client where it can be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import msgspec
import pytest

from openai_api import answers
from registry.threads import in_database
from tests.api.conftest import ROUTE, Answer, Served
from tests.api.scripted import Scripted, in_front_of, scripted

pytestmark = pytest.mark.django_db(transaction=True)

PATH = "/v1/messages"
HI: Any = [{"role": "user", "content": "Say hi"}]
TOOL: Any = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
USAGE = {"prompt_tokens": 12, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}


def client_of(served: Served, **options: Any) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(
        **{
            "base_url": f"http://127.0.0.1:{served.port}",
            "api_key": served.api_key,
            "max_retries": 0,
            "timeout": 20,
        }
        | options
    )


def ask(served: Served, path: str = PATH, **fields: Any) -> Answer:
    body = {"model": ROUTE, "max_tokens": 16, "messages": HI, **fields}
    given = {name: value for name, value in body.items() if value is not ...}
    return served.request("POST", path, json.dumps(given).encode())


def events_of(answer: Answer) -> list[tuple[str, dict[str, Any]]]:
    """Names and payloads; each name is its payload's type."""
    found = []
    for event in _body(answer).split("\n\n"):
        if not event.strip():
            continue
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    assert all(name == payload["type"] for name, payload in found)
    return found


def _body(answer: Answer) -> str:
    """The chunks of a chunked body together."""
    rest, whole = answer.body, b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        whole, rest = whole + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return whole.decode()


def refusal(answer: Answer, status: int, kind: str) -> str:
    """The message of an error, after checking that it has Anthropic's shape."""
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    payload = answer.json()
    assert set(payload) == {"type", "error", "request_id"}
    assert (payload["type"], payload["error"]["type"]) == ("error", kind)
    assert payload["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    assert set(payload["error"]) == {"type", "message"}
    message: str = payload["error"]["message"]
    return message


@pytest.fixture(scope="module")
def module_worker() -> Iterator[Scripted]:
    with scripted() as running:
        yield running


@pytest.fixture
def told(module_worker: Scripted) -> Scripted:
    module_worker.asked.clear()
    module_worker.answer, module_worker.status = {}, 200
    return module_worker


@pytest.fixture
def able(told: Scripted, transactional_db: None) -> Iterator[Served]:
    """In front of a worker that can do everything."""
    every = [
        "endpoint:chat",
        "endpoint:tokenize",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "reasoning_effort",
        "response_format",
        "continue_final_message",
        "add_generation_prompt",
        "top_k",
    ]
    with in_front_of(told, *every, worker_id=7101) as served:
        yield served


def completion(message: dict[str, Any], finish_reason: str = "stop", **choice: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": None, **message},
                "finish_reason": finish_reason,
                **choice,
            }
        ],
        "usage": USAGE,
    }


def chunks(*deltas: dict[str, Any], finish_reason: str = "stop", **last: Any) -> list[dict[str, Any]]:
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    found = [{**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    ended = {"index": 0, "delta": {}, "finish_reason": finish_reason, **last}
    return [
        *found,
        {**base, "choices": [ended]},
        {**base, "choices": [], "usage": {"prompt_tokens": 12, "total_tokens": 17, **USAGE}},
    ]


CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}


# -- a real engine


async def test_a_whole_answer_and_its_entry_in_the_ledger(served: Served) -> None:
    async with client_of(served) as client:
        raw = await client.messages.with_raw_response.create(
            model=ROUTE, max_tokens=8, system="Be brief", messages=HI, extra_body={"temperature": 0.5}
        )
    message = await raw.parse()
    msgspec.json.decode(await raw.read(), type=answers.Message)
    assert (message.type, message.role, message.model) == ("message", "assistant", ROUTE)
    assert message.id.startswith("msg_")
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text  # type: ignore[union-attr]
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 8
    assert raw.headers["request-id"] == raw.headers["x-request-id"]
    event = await in_database(served.event, raw.headers["request-id"])
    assert (event.endpoint, event.completion_tokens) == (PATH, 8)
    assert event.prompt_tokens == message.usage.input_tokens > 0


async def test_a_stream_gathers_to_the_same_message(served: Served) -> None:
    async with client_of(served) as client:
        whole = await client.messages.create(model=ROUTE, max_tokens=8, messages=HI)
        async with client.messages.stream(model=ROUTE, max_tokens=8, messages=HI) as stream:
            texts = [text async for text in stream.text_stream]
            gathered = await stream.get_final_message()
    assert len(texts) > 1
    assert gathered.content[0].text == "".join(texts) == whole.content[0].text  # type: ignore[union-attr]
    assert gathered.stop_reason == whole.stop_reason == "max_tokens"
    assert gathered.usage.input_tokens == whole.usage.input_tokens
    assert gathered.usage.output_tokens == whole.usage.output_tokens == 8


def test_the_bytes_of_a_stream(served: Served) -> None:
    answer = ask(served, stream=True, max_tokens=2)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "[DONE]" not in _body(answer)
    events = events_of(answer)
    names = [name for name, _ in events]
    assert names[:2] == ["message_start", "content_block_start"]
    assert set(names[2:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    start = events[0][1]["message"]
    # What our engines tell with their first token.
    assert start["usage"]["input_tokens"] == events[-2][1]["usage"]["input_tokens"] == 2
    assert start["id"] == f"msg_{answer.headers['request-id'].removeprefix('req_')}"
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert events[1][1]["content_block"] == {"type": "text", "text": ""}
    assert all(payload["index"] == 0 for name, payload in events if name.startswith("content_block"))
    assert events[-2][1]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2][1]["usage"]["output_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_sequence_that_ended_an_answer_is_told(served: Served, stream: bool) -> None:
    text = ask(served).json()["content"][0]["text"]
    last = text.split()[-1]
    answer = ask(served, stop_sequences=["qqq", last], stream=stream)
    found = events_of(answer)[-2][1]["delta"] if stream else answer.json()
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", last)


# -- what the engine is asked


def test_a_conversation_with_tools_as_the_engine_reads_it(able: Served, told: Scripted) -> None:
    told.answer = completion({"content": "ok"})
    used = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Ōsaka"}}
    answer = ask(
        able,
        system=[{"type": "text", "text": "A"}, {"type": "text", "text": "B", "cache_control": {}}],
        messages=[
            {"role": "system", "content": "C"},
            {"role": "user", "content": "One"},
            {"role": "user", "content": [{"type": "text", "text": "Two"}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, used]},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain", "is_error": True},
                    {"type": "text", "text": "And?"},
                ],
            },
        ],
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        stop_sequences=["END"],
        top_k=7,
        metadata={"user_id": "u"},
        thinking={"type": "disabled"},
    )
    assert answer.status == 200, answer.body
    path, asked = told.asked[0]
    assert path == "/v1/chat/completions"
    function = {
        "name": "get_weather",
        "arguments": '{"city":"Ōsaka"}',
    }
    assert asked["messages"] == [
        {"role": "system", "content": [{"type": "text", "text": text} for text in "ABC"]},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "toolu_1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "Error: rain", "tool_call_id": "toolu_1"},
        {"role": "user", "content": "And?"},
    ]
    parameters = {"parameters": TOOL["input_schema"]}
    described = {"name": "get_weather", "description": "Weather of a city"}
    assert asked["tools"] == [{"type": "function", "function": described | parameters}]
    assert asked["tool_choice"] == "required"
    assert (asked["stop"], asked["top_k"], asked["max_tokens"]) == (["END"], 7, 16)


@pytest.mark.parametrize(
    ("given", "forwarded"),
    [
        ({"type": "auto"}, None),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "get_weather"}, {"type": "function", "function": {"name": "get_weather"}}),
    ],
)
def test_the_choice_of_a_tool(able: Served, told: Scripted, given: Any, forwarded: Any) -> None:
    told.answer = completion({"content": "ok"})
    assert ask(able, tools=[TOOL], tool_choice=given).status == 200
    assert told.asked[0][1].get("tool_choice") in (forwarded, forwarded or "auto")


def test_the_last_words_of_the_assistant_are_gone_on_from(able: Served, told: Scripted) -> None:
    told.answer = completion({"content": "{1}"})
    assert ask(able, messages=[*HI, {"role": "assistant", "content": "The answer is"}]).status == 200
    asked = told.asked[0][1]
    assert asked["continue_final_message"] is True
    assert asked["add_generation_prompt"] is False
    assert asked["messages"][-1] == {"role": "assistant", "content": "The answer is"}


@pytest.mark.parametrize(("budget", "effort"), [(1024, "low"), (8000, "medium"), (50_000, "high")])
def test_a_budget_for_thinking_is_an_effort(able: Served, told: Scripted, budget: int, effort: str) -> None:
    told.answer = completion({"content": "ok"})
    thinking = {"type": "enabled", "budget_tokens": budget}
    assert ask(able, thinking=thinking, max_tokens=60_000).status == 200
    assert told.asked[0][1]["reasoning_effort"] == effort


def test_a_wanted_format_is_a_schema(able: Served, told: Scripted) -> None:
    told.answer = completion({"content": "{}"})
    config = {"format": {"type": "json_schema", "schema": TOOL["input_schema"]}}
    assert ask(able, output_config=config).status == 200
    assert told.asked[0][1]["response_format"]["json_schema"]["schema"] == TOOL["input_schema"]


# -- what the client is told


async def test_thoughts_text_and_tools_of_a_whole_answer(able: Served, told: Scripted) -> None:
    called = {**CALL, "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'}}
    told.answer = completion(
        {"content": "Let me see.", "reasoning": "hm", "tool_calls": [called]}, "tool_calls"
    )
    async with client_of(able) as client:
        message = await client.messages.create(model=ROUTE, max_tokens=99, messages=HI, tools=[TOOL])
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    used = message.content[2]
    assert isinstance(used, anthropic.types.ToolUseBlock)
    assert (used.id, used.name, used.input) == ("call_1", "get_weather", {"city": "Rome"})
    assert message.stop_reason == "tool_use"
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (8, 4)


async def test_thoughts_text_and_tools_of_a_stream(able: Served, told: Scripted) -> None:
    second = {"id": "call_2", "index": 1, "type": "function"}
    told.answer = chunks(
        {"role": "assistant", "content": ""},
        {"reasoning": "h"},
        {"reasoning": "m"},
        {"content": "Let me "},
        {"content": "see."},
        {"tool_calls": [{**CALL, "index": 0}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Rome"}'}}]},
        {"tool_calls": [{**second, "function": {"name": "get_weather", "arguments": "{}"}}]},
        finish_reason="tool_calls",
    )
    async with (
        client_of(able) as client,
        client.messages.stream(model=ROUTE, max_tokens=99, messages=HI, tools=[TOOL]) as stream,
    ):
        events = [event.type async for event in stream]
        message = await stream.get_final_message()
    assert events.count("content_block_start") == events.count("content_block_stop") == 4
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.content[0].thinking == "hm"  # type: ignore[union-attr]
    assert message.content[1].text == "Let me see."  # type: ignore[union-attr]
    assert message.content[2].input == {"city": "Rome"}  # type: ignore[union-attr]
    assert message.content[3].id == "call_2"  # type: ignore[union-attr]
    assert message.stop_reason == "tool_use"
    assert (message.usage.input_tokens, message.usage.output_tokens) == (8, 5)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("finish_reason", "choice", "told_as"),
    [
        ("stop", {}, ("end_turn", None)),
        ("stop", {"stop_reason": "END"}, ("stop_sequence", "END")),
        ("stop", {"stop_reason": 2}, ("end_turn", None)),
        ("length", {}, ("max_tokens", None)),
        ("content_filter", {}, ("refusal", None)),
    ],
)
def test_why_it_stopped(
    able: Served, told: Scripted, stream: bool, finish_reason: str, choice: Any, told_as: tuple[str, Any]
) -> None:
    told.answer = (
        chunks({"content": "a"}, finish_reason=finish_reason, **choice)
        if stream
        else completion({"content": "a"}, finish_reason, **choice)
    )
    answer = ask(able, stop_sequences=["END"], stream=stream)
    found = events_of(answer)[-2][1]["delta"] if stream else answer.json()
    assert (found["stop_reason"], found["stop_sequence"]) == told_as


def test_arguments_that_are_no_object_are_handed_on(able: Served, told: Scripted) -> None:
    called = {**CALL, "function": {"name": "get_weather", "arguments": '{"city":'}}
    told.answer = completion({"tool_calls": [called]}, "length")
    answer = ask(able, tools=[TOOL]).json()
    assert answer["content"][0]["input"] == {"raw_arguments": '{"city":'}
    assert answer["stop_reason"] == "max_tokens"


# -- errors


def test_a_cut_stream_ends_with_an_error(able: Served, told: Scripted) -> None:
    told.answer = [*chunks({"content": "a"})[:1], {"error": {"message": "secret"}}]
    answer = ask(able, stream=True)
    (*_, before, (name, payload)) = events_of(answer)
    assert before[0] == "content_block_delta"
    assert (name, payload["error"]["type"]) == ("error", "api_error")
    assert "interrupted" in payload["error"]["message"]
    assert "secret" not in _body(answer)


async def test_the_clients_own_errors(served: Served) -> None:
    async with client_of(served) as client:
        with pytest.raises(anthropic.NotFoundError) as unknown:
            await client.messages.create(model="nobody", max_tokens=1, messages=HI)
        with pytest.raises(anthropic.BadRequestError) as refused:
            await client.messages.create(model=ROUTE, max_tokens=1, messages=[])
    assert unknown.value.request_id is not None
    assert unknown.value.request_id.startswith("req_")
    assert "nobody" in unknown.value.message
    assert "'messages'" in refused.value.message
    async with client_of(served, api_key="sk-wrong") as client:
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(model=ROUTE, max_tokens=1, messages=HI)


def test_errors_before_an_answer(served: Served) -> None:
    body = json.dumps({"model": ROUTE, "max_tokens": 1, "messages": HI}).encode()
    refusal(served.request("POST", PATH, body, key=None), 401, "authentication_error")
    refusal(served.request("GET", PATH), 405, "invalid_request_error")
    refusal(served.request("POST", PATH, b"{"), 400, "invalid_request_error")
    refusal(served.request("POST", PATH, b" " * 5_000_000), 413, "request_too_large")
    refusal(ask(served, model="nobody"), 404, "not_found_error")


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
LINKED = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/a.png"}}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model": ...}, "'model'"),
        ({"max_tokens": ...}, "'max_tokens'"),
        ({"max_tokens": 0}, "'max_tokens'"),
        ({"messages": ...}, "'messages'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'messages[0].role'"),
        ({"messages": [{"role": "user", "content": []}]}, "'messages[0].content'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "'messages[0].content[0].type'"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "'messages[0].content[0].type'"),
        ({"messages": [{"role": "user", "content": [LINKED]}]}, "remote_media_disabled"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}
                ]
            },
            "'messages[0].content[0].type'",
        ),
        (
            {
                "messages": [
                    *HI,
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}],
                    },
                ]
            },
            "'tool_result'",
        ),
        ({"temperature": 1.5}, "'temperature'"),
        ({"top_k": -1}, "'top_k'"),
        ({"stop_sequences": [""]}, "'stop_sequences'"),
        ({"stop_sequences": ["a"] * 17}, "'stop_sequences'"),
        ({"tool_choice": {"type": "any"}}, "'tool_choice'"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "'tool_choice.name'"),
        ({"tools": [{"name": "x"}]}, "'tools[0].input_schema'"),
        ({"tools": [{"name": "web_search", "type": "web_search_20250305"}]}, "'tools[0].type'"),
        ({"mcp_servers": [{}]}, "'mcp_servers'"),
        ({"thinking": {"type": "enabled"}}, "'thinking.budget_tokens'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, "'thinking.budget_tokens'"),
        ({"output_config": {"format": {"type": "xml"}}}, "'output_config.format.type'"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(served: Served, fields: dict[str, Any], named: str) -> None:
    assert named in refusal(ask(served, **fields), 400, "invalid_request_error")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [TOOL]}, "'tools'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}, "max_tokens": 4096}, "'thinking'"),
        ({"messages": [*HI, {"role": "assistant", "content": "x"}]}, "cannot continue"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {}}}}, "'output_config.format'"),
    ],
)
def test_what_no_engine_of_the_model_honours_is_named(
    told: Scripted, transactional_db: None, fields: dict[str, Any], named: str
) -> None:
    with in_front_of(told, "endpoint:chat", worker_id=7102) as served:
        assert named in refusal(ask(served, **fields), 400, "invalid_request_error")
    assert told.asked == []


# -- counting


async def test_tokens_are_counted_as_the_engine_would_read_them(able: Served, told: Scripted) -> None:
    told.answer = {"count": 23, "max_model_len": 8192, "tokens": [1]}
    async with client_of(able) as client:
        counted = await client.messages.count_tokens(model=ROUTE, messages=HI, system="S", tools=[TOOL])
    assert counted.input_tokens == 23
    path, asked = told.asked[0]
    assert path == "/tokenize"
    assert asked["messages"] == [{"role": "system", "content": "S"}, {"role": "user", "content": "Say hi"}]
    assert asked["add_generation_prompt"] is True
    assert asked["tools"][0]["function"]["name"] == "get_weather"


def test_counting_costs_no_tokens(able: Served, told: Scripted) -> None:
    told.answer = {"count": 23, "max_model_len": 8192, "tokens": [1]}
    answer = ask(able, "/v1/messages/count_tokens")
    assert answer.json() == {"input_tokens": 23}
    event = able.event(answer.headers["x-request-id"])
    assert (event.endpoint, event.prompt_tokens, event.completion_tokens) == (
        "/v1/messages/count_tokens",
        0,
        0,
    )


def test_a_model_that_counts_no_tokens_says_so(told: Scripted, transactional_db: None) -> None:
    with in_front_of(told, "endpoint:chat", worker_id=7103) as served:
        answer = ask(served, "/v1/messages/count_tokens")
    refusal(answer, 400, "invalid_request_error")
