"""Everything an answer can have besides text: several choices, probabilities, calls, forms, thoughts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from itertools import groupby
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio

from tests.node.engine_tools import AUTH, SECRET, engine_process, events_of, question, ready

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ALL_USAGE = {"include_usage": True, "continuous_usage_stats": True}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 3}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with engine_process(slots=4, context_length=1000) as url:
        yield url


@pytest_asyncio.fixture
async def session(engine: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(base_url=engine, headers=AUTH) as session:
        await ready(session, "")
        yield session


@pytest_asyncio.fixture
async def client(engine: str, session: aiohttp.ClientSession) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{engine}/v1", api_key=SECRET, max_retries=0) as client:
        yield client


async def post(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post(path, json=body) as reply:
        answer: dict[str, Any] = await reply.json()
        assert reply.status == 200, answer
    return answer


async def chunks(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with session.post(path, json={**body, "stream": True}) as reply:
        assert reply.status == 200, await reply.text()
        events = [event for _, event in await events_of(reply)]
    assert events.pop() == "[DONE]"
    assert all(event.rfind(',"usage":') > event.rfind("]") for event in events if '"usage"' in event)
    return [json.loads(event) for event in events]


def choices_of(events: list[dict[str, Any]], index: int) -> list[dict[str, Any]]:
    return [choice for event in events for choice in event["choices"] if choice["index"] == index]


# -- several choices


async def test_several_choices_differ_and_the_prompt_is_counted_once(session: aiohttp.ClientSession) -> None:
    one = await post(session, CHAT, question("Say it", max_tokens=5))
    three = await post(session, CHAT, question("Say it", max_tokens=5, n=3))
    texts = [choice["message"]["content"] for choice in three["choices"]]
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == one["choices"][0]["message"]["content"]
    assert three["usage"]["prompt_tokens"] == 2
    assert three["usage"]["completion_tokens"] == 15
    assert three["usage"]["total_tokens"] == 17


async def test_streamed_choices_interleave_and_each_begins_and_ends_once(
    session: aiohttp.ClientSession,
) -> None:
    body = question("!slow 0.02 !tokens 6", n=3, stream_options=ALL_USAGE)
    whole = await post(session, CHAT, {key: body[key] for key in ("messages", "n")})
    events = await chunks(session, CHAT, body)
    assert len(list(groupby(choice["index"] for event in events for choice in event["choices"]))) > 6
    for index in range(3):
        own = choices_of(events, index)
        assert [("role" in choice["delta"]) for choice in own] == [True] + [False] * (len(own) - 1)
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
        text = "".join(choice["delta"].get("content", "") for choice in own)
        assert text == whole["choices"][index]["message"]["content"]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert {event["usage"]["prompt_tokens"] for event in events} == {4}
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 18


async def test_a_text_choices_index_is_its_prompts_times_n_and_its_sample(
    session: aiohttp.ClientSession,
) -> None:
    body = {"prompt": ["one two", "three"], "max_tokens": 4, "n": 2}
    both = await post(session, TEXT, body)
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    second = await post(session, TEXT, {**body, "prompt": "three"})
    assert [c["text"] for c in both["choices"][2:]] == [c["text"] for c in second["choices"]]
    assert both["usage"]["prompt_tokens"] == 3
    assert both["usage"]["completion_tokens"] == 16
    streamed = await chunks(session, TEXT, {**body, "stream_options": ALL_USAGE})
    for choice in both["choices"]:
        assert "".join(c["text"] for c in choices_of(streamed, choice["index"])) == choice["text"]
    assert streamed[-1]["usage"] == both["usage"]


async def test_an_engine_that_fails_one_of_several_choices_fails_all(session: aiohttp.ClientSession) -> None:
    async with session.post(CHAT, json=question("!error 3", n=2)) as reply:
        assert reply.status == 500


# -- probabilities and token ids


async def test_chat_tells_each_tokens_probability(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Say it"}]}
    answer = await client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert "".join(one.token for one in told.content) == answer.choices[0].message.content
    for one in told.content:
        assert bytes(one.bytes or []) == one.token.encode()
        assert [one.top_logprobs[0].token, one.top_logprobs[0].logprob] == [one.token, one.logprob]
        likely = [other.logprob for other in one.top_logprobs]
        assert len(set(other.token for other in one.top_logprobs)) == 3
        assert likely == sorted(likely, reverse=True)
        assert likely[0] < 0
    again = await client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert again.choices[0].logprobs == told


async def test_streamed_probabilities_are_those_of_the_whole_answer(session: aiohttp.ClientSession) -> None:
    body = question("Say it", logprobs=True, top_logprobs=0, stop=["qqq"])
    whole = (await post(session, CHAT, body))["choices"][0]["logprobs"]
    assert {str(one["top_logprobs"]) for one in whole["content"]} == {"[]"}
    assert whole["refusal"] is None
    streamed = [choice["logprobs"] for choice in choices_of(await chunks(session, CHAT, body), 0)]
    assert streamed[0] is None
    assert streamed[-1] is None
    assert [one for said in streamed if said for one in said["content"]] == whole["content"]


async def test_a_token_held_for_a_stop_string_is_told_when_its_text_is(
    session: aiohttp.ClientSession,
) -> None:
    text = (await post(session, CHAT, question("Say it")))["choices"][0]["message"]["content"]
    stop = " ".join(text.split(" ")[3:5])
    answer = (await post(session, CHAT, question("Say it", logprobs=True, stop=[stop])))["choices"][0]
    shown = answer["message"]["content"]
    assert shown == text[: text.index(stop)]
    assert "".join(one["token"] for one in answer["logprobs"]["content"]).strip() == shown.strip()


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_the_stop_string_that_ended_a_choice_is_told_as_vllm_tells_it(
    session: aiohttp.ClientSession, path: str
) -> None:
    asked = question("Say it", n=2) if path == CHAT else {"prompt": "Say it", "n": 2, "max_tokens": 16}
    plain = (await post(session, path, asked))["choices"]
    assert not any("stop_reason" in choice for choice in plain)
    said = plain[1]["message"]["content"] if path == CHAT else plain[1]["text"]
    stop = next(word for word in said.split() if word not in str(plain[0]))
    asked["stop"] = ["qqq", stop]
    whole = (await post(session, path, asked))["choices"]
    assert [choice.get("stop_reason") for choice in whole] == [None, stop]
    assert whole[1]["finish_reason"] == "stop"
    streamed = await chunks(session, path, asked)
    for index, reason in ((0, None), (1, stop)):
        own = choices_of(streamed, index)
        assert [choice.get("stop_reason") for choice in own] == [None] * (len(own) - 1) + [reason]


async def test_an_echoed_prompts_first_token_has_no_probability(session: aiohttp.ClientSession) -> None:
    body = {"prompt": "steam whistle signal", "max_tokens": 0, "echo": True, "logprobs": 1}
    [choice] = (await post(session, TEXT, body))["choices"]
    told = choice["logprobs"]
    assert told["tokens"] == ["steam", " whistle", " signal"]
    assert told["text_offset"] == [0, 5, 13]
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    assert all(one < 0 for one in told["token_logprobs"][1:])
    assert told["top_logprobs"][1] == {" whistle": told["token_logprobs"][1]}
    more = {**body, "max_tokens": 3}
    [choice] = (await post(session, TEXT, more))["choices"]
    assert len(choice["logprobs"]["tokens"]) == 6
    for token, offset in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    streamed = [one["logprobs"] for one in choices_of(await chunks(session, TEXT, more), 0)]
    for name, whole in choice["logprobs"].items():
        assert [one for said in streamed for one in said[name]] == whole


async def test_token_ids_are_those_of_tokenize(session: aiohttp.ClientSession) -> None:
    asked = question("steam whistle", return_token_ids=True, max_tokens=4)
    answer = await post(session, CHAT, asked)
    prompt = await post(session, "/tokenize", {"messages": asked["messages"]})
    assert answer["prompt_token_ids"] == prompt["tokens"]
    [choice] = answer["choices"]
    said = await post(session, "/tokenize", {"prompt": choice["message"]["content"]})
    assert choice["token_ids"] == said["tokens"]
    assert choice["logprobs"] is None
    events = await chunks(session, CHAT, asked)
    assert events[0]["prompt_token_ids"] == prompt["tokens"]
    own = choices_of(events, 0)
    assert [id_ for one in own for id_ in one.get("token_ids", ())] == choice["token_ids"]
    text = {"prompt": "steam whistle", "max_tokens": 4, "return_token_ids": True, "echo": True}
    [choice] = (await post(session, TEXT, text))["choices"]
    assert choice["prompt_token_ids"] == prompt["tokens"]
    assert len(choice["token_ids"]) == 4


# -- tools


async def test_a_required_call_has_arguments_of_its_schema(client: openai.AsyncOpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Anything"}]
    tools: list[Any] = TOOLS
    answer = await client.chat.completions.create(
        model="m", messages=messages, tools=tools, tool_choice="required"
    )
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [call] = choice.message.tool_calls or []
    assert call.id.startswith("call_")
    assert call.type == "function"
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert isinstance(arguments["city"], str)
    assert arguments["days"] >= 3


@pytest.mark.parametrize(
    ("content", "arguments"),
    [
        ("The weather in 'Kyoto 京都' for 5 days", {"city": "Kyoto 京都", "days": 5}),
        ('The weather in "5 Towns", 4.5 days, or rather 6', {"city": "5 Towns", "days": 6}),
        ("The weather 2 days in it's town of 'x", {"city": "steam", "days": 3}),
        ("!tool get_weather 'Oslo' !tokens 9", {"city": "steam", "days": 3}),
    ],
)
async def test_arguments_are_what_the_user_quotes_and_numbers_that_the_schema_allows(
    session: aiohttp.ClientSession, content: str, arguments: dict[str, Any]
) -> None:
    body = question(content, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    [choice] = (await post(session, CHAT, body))["choices"]
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == arguments


async def test_a_named_function_is_called_and_the_answer_just_stops(session: aiohttp.ClientSession) -> None:
    choice_of_tool = {"type": "function", "function": {"name": "clock"}}
    answer = await post(session, CHAT, question("Hi", tools=TOOLS, tool_choice=choice_of_tool))
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "stop"
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "clock", "arguments": "{}"}


@pytest.mark.parametrize(
    ("content", "fields", "called"),
    [
        ("Hello", {}, []),
        ("Please use clock now", {}, ["clock"]),
        ("clock and get_weather", {}, ["get_weather", "clock"]),
        ("clock and get_weather", {"parallel_tool_calls": False}, ["get_weather"]),
        ("clock", {"tool_choice": "none"}, []),
        ("!tool clock", {}, ["clock"]),
        ("What is the weather?", {}, ["get_weather"]),
        (
            "Hello",
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "required",
                        "tools": [{"type": "function", "function": {"name": "clock"}}],
                    },
                }
            },
            ["clock"],
        ),
    ],
)
async def test_the_tools_that_the_user_names_are_called(
    session: aiohttp.ClientSession, content: str, fields: dict[str, Any], called: list[str]
) -> None:
    [choice] = (await post(session, CHAT, question(content, tools=TOOLS, **fields)))["choices"]
    calls = choice["message"].get("tool_calls", [])
    assert [call["function"]["name"] for call in calls] == called
    assert choice["finish_reason"] == ("tool_calls" if called else "stop")
    assert ("tool_calls" in choice["message"]) == bool(called)
    assert (choice["message"]["content"] is None) == bool(called)


async def test_after_a_tools_answer_comes_text(session: aiohttp.ClientSession) -> None:
    first = (await post(session, CHAT, question("clock", tools=TOOLS)))["choices"][0]["message"]
    said = {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "12:00"}
    body = {"messages": [{"role": "user", "content": "clock"}, first, said], "tools": TOOLS}
    [choice] = (await post(session, CHAT, body))["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"]


async def test_a_streamed_call_is_named_once_and_its_pieces_make_the_arguments(
    session: aiohttp.ClientSession,
) -> None:
    body = question("clock and get_weather", tools=TOOLS, stream_options=ALL_USAGE)
    events = await chunks(session, CHAT, body)
    own = choices_of(events, 0)
    assert own[-1]["finish_reason"] == "tool_calls"
    assert own[-1]["delta"] == {}
    assert "".join(one["delta"].get("content", "") for one in own) == ""
    deltas = [delta for one in own for delta in one["delta"].get("tool_calls", ())]
    for index, name in enumerate(["get_weather", "clock"]):
        first, *rest = [delta for delta in deltas if delta["index"] == index]
        assert first["id"].startswith("call_")
        assert first["type"] == "function"
        assert first["function"] == {"name": name, "arguments": ""}
        assert rest
        assert all(delta.keys() == {"index", "function"} for delta in rest)
        assert all(delta["function"].keys() == {"arguments"} for delta in rest)
        assert isinstance(json.loads("".join(delta["function"]["arguments"] for delta in rest)), dict)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] > 0


async def test_a_call_cut_by_its_length_is_no_call(session: aiohttp.ClientSession) -> None:
    body = question("clock", tools=TOOLS, max_tokens=1)
    [choice] = (await post(session, CHAT, body))["choices"]
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]


# -- forms


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_is_an_instance_of_the_schema(session: aiohttp.ClientSession, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"$ref": "#/$defs/name"},
            "kind": {"enum": ["steam", "diesel"]},
            "wheels": {"type": "array", "items": {"type": "integer", "minimum": 4}, "minItems": 2},
        },
        "required": ["name", "kind", "wheels"],
        "$defs": {"name": {"type": "string", "minLength": 12}},
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    body = question("An engine", response_format=wanted)
    if stream:
        own = choices_of(await chunks(session, CHAT, body), 0)
        text = "".join(one["delta"].get("content", "") for one in own)
    else:
        text = (await post(session, CHAT, body))["choices"][0]["message"]["content"]
    made = json.loads(text)
    assert made.keys() == {"name", "kind", "wheels"}
    assert len(made["name"]) >= 12
    assert made["kind"] == "steam"
    assert len(made["wheels"]) == 2
    assert min(made["wheels"]) >= 4


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"response_format": {"type": "json_object"}}, dict),
        ({"structured_outputs": {"json_object": True}}, dict),
        ({"structured_outputs": {"json": {"type": "array", "items": {"const": 7}}}}, list),
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, int),
    ],
)
async def test_json_can_be_asked_for_in_several_ways(
    session: aiohttp.ClientSession, fields: dict[str, Any], kind: type
) -> None:
    [choice] = (await post(session, CHAT, question("x", **fields)))["choices"]
    assert isinstance(json.loads(choice["message"]["content"]), kind)


async def test_any_object_has_the_names_that_the_user_quotes(session: aiohttp.ClientSession) -> None:
    body = question("JSON with 'setup' and \"punchline\"", response_format={"type": "json_object"})
    [choice] = (await post(session, CHAT, body))["choices"]
    assert json.loads(choice["message"]["content"]).keys() == {"setup", "punchline"}


async def test_a_choice_is_one_of_the_choices_for_texts_too(session: aiohttp.ClientSession) -> None:
    asked = {"structured_outputs": {"choice": ["yes indeed", "no"]}}
    chat = await post(session, CHAT, question("x", **asked))
    assert chat["choices"][0]["message"]["content"] == "yes indeed"
    assert (await post(session, TEXT, {"prompt": "x", **asked}))["choices"][0]["text"] == "yes indeed"


@pytest.mark.parametrize(
    "schema",
    [{"$ref": "#/$defs/none"}, {"$ref": "#"}, {"type": "what"}, {"type": "array", "minItems": 10**9}],
)
async def test_a_schema_without_an_instance_is_refused_by_name(
    session: aiohttp.ClientSession, schema: dict[str, Any]
) -> None:
    body = question(
        "x", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )
    async with session.post(CHAT, json=body) as reply:
        assert reply.status == 400
        assert (await reply.json())["error"]["param"] == "response_format.json_schema.schema"


# -- thoughts


async def test_thoughts_come_before_the_answer_under_both_names(session: aiohttp.ClientSession) -> None:
    body = question("!think 5 !tokens 4", stream_options=ALL_USAGE)
    whole = await post(session, CHAT, {"messages": body["messages"]})
    message = whole["choices"][0]["message"]
    assert len(message["reasoning"].split()) == 5
    assert message["reasoning_content"] == message["reasoning"]
    assert len(message["content"].split()) == 4
    assert whole["usage"]["completion_tokens"] == 9
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5
    events = await chunks(session, CHAT, body)
    deltas = [choice["delta"] for choice in choices_of(events, 0)]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == message["reasoning"]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    thinking = ["reasoning" in delta for delta in deltas[1:]]
    assert thinking == sorted(thinking, reverse=True)
    assert events[-1]["usage"] == whole["usage"]


async def test_more_effort_thinks_longer_and_none_not_at_all(session: aiohttp.ClientSession) -> None:
    spent = []
    for effort in ("none", "low", "high"):
        answer = await post(session, CHAT, question("x", reasoning_effort=effort))
        spent.append(answer["usage"]["completion_tokens_details"]["reasoning_tokens"])
        assert ("reasoning" in answer["choices"][0]["message"]) == (effort != "none")
    assert spent[0] == 0 < spent[1] < spent[2]


# -- texts to tokens and back


async def test_tokens_of_a_text_give_the_text_back(session: aiohttp.ClientSession) -> None:
    text = "Steam whistle signal north"
    told = await post(session, "/tokenize", {"model": "m", "prompt": text, "return_token_strs": True})
    assert told["count"] == len(told["tokens"]) == 4
    assert told["max_model_len"] == 1000
    assert told["token_strs"] == text.split()
    assert await post(session, "/detokenize", {"model": "m", "tokens": told["tokens"]}) == {"prompt": text}


async def test_the_count_of_messages_is_what_a_request_with_them_costs(
    session: aiohttp.ClientSession,
) -> None:
    body = question("How many words are these?", max_tokens=1)
    told = await post(session, "/tokenize", {"messages": body["messages"], "tools": TOOLS})
    assert told["token_strs"] is None
    assert told["count"] == (await post(session, CHAT, body))["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [99999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)
async def test_what_is_no_text_and_no_token_is_named(
    session: aiohttp.ClientSession, path: str, body: dict[str, Any], param: str
) -> None:
    async with session.post(path, json=body) as reply:
        assert reply.status == 400
        error = (await reply.json())["error"]
    assert error["param"] == param
