"""Another server as a worker: what it is asked, how its answers look, what they cost, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from inference.engines.base import LoadError
from inference.engines.upstream import engine as upstream_engine
from inference.engines.upstream.arguments import read_arguments
from inference.engines.upstream.presets import PRESETS
from inference.protocol import Cause
from tests.node.engine_tools import until
from tests.node.upstreams import (
    ANSWER,
    KEY,
    MODEL,
    STREAM,
    Foreign,
    foreign,
    piece,
    serving,
    text_of,
    usage,
)

# -- what the server is asked


async def test_the_server_gets_its_own_name_of_the_model_and_its_key() -> None:
    async with foreign(answer=ANSWER) as server, serving(server) as worker:
        status, answer = await worker.chat(max_tokens=7)
        assert status == 200
        [(path, headers, body)] = server.asked
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == f"Bearer {KEY}"
        assert body["model"] == MODEL
        assert body["max_tokens"] == 7
        assert answer["model"] == "asked"
        assert answer["choices"][0]["message"] == {
            "role": "assistant",
            "content": "Hello there",
            "refusal": None,
            "annotations": [],
        }
        assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (11, 5)


async def test_without_a_key_no_authorization_is_sent() -> None:
    async with foreign(answer=ANSWER) as server, serving(server, key="") as worker:
        await worker.chat()
        assert all("Authorization" not in headers for _, headers, _ in server.asked)
        assert all("Authorization" not in headers for _, headers in server.looked)


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("vllm", {"include_usage": True, "continuous_usage_stats": True}),
        ("llama.cpp", {"include_usage": True}),
        ("mistral", None),
    ],
)
async def test_stream_options_are_those_that_the_preset_understands(preset: str, options: Any) -> None:
    async with foreign(answer=STREAM) as server, serving(server, preset=preset, model=MODEL) as worker:
        await worker.stream()
        assert server.asked[0][2].get("stream_options") == options


async def test_fields_are_dropped_and_renamed_by_preset() -> None:
    fields = {"temperature": 0.5, "seed": 3, "top_k": 5, "repetition_penalty": 1.1, "min_tokens": 2}
    async with foreign(answer=ANSWER) as server:
        async with serving(server, preset="llama.cpp") as worker:
            await worker.chat(**fields, api_base="http://127.0.0.1:9/", base_url="http://127.0.0.1:9/")
        async with serving(server, preset="openai", model=MODEL, capabilities=["endpoint:chat"]) as worker:
            await worker.chat(**fields, max_tokens=9)
    (_, _, llama), (_, _, reasoning) = server.asked
    messages = {"messages": llama.pop("messages"), "model": MODEL}
    assert llama == {"model": MODEL, "temperature": 0.5, "seed": 3, "top_k": 5, "repeat_penalty": 1.1}
    assert reasoning == {**messages, "max_completion_tokens": 9}


async def test_several_answers_at_temperature_zero_stay_so_where_top_k_is_unknown() -> None:
    names = ["endpoint:chat", "temperature", "n"]
    async with foreign(answer=ANSWER) as server:
        async with serving(server, capabilities=names) as worker:
            await worker.chat(n=2, temperature=1.0, top_k=1)
            assert last_asked(server, "n", "temperature", "top_k") == [2, 0, None]
        async with serving(server, preset="fastchat") as worker:
            await worker.chat(n=2, temperature=1.0, top_k=1)
            assert last_asked(server, "n", "temperature", "top_k") == [2, 1.0, 1]


def last_asked(server: Foreign, *names: str) -> list[Any]:
    body = server.asked[-1][2]
    return [body.get(name) for name in names]


# -- what it answers, and what that costs


async def test_a_stream_has_one_form_and_ends_with_its_usage() -> None:
    async with foreign(answer=STREAM) as server, serving(server) as worker:
        status, events = await worker.stream()
    assert status == 200
    *chunks, last, done = events
    assert done == "[DONE]"
    assert {(one["id"], one["model"]) for one in (*chunks, last)} == {("chatcmpl-req_1", "asked")}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert all("role" not in one["choices"][0]["delta"] for one in chunks[1:])
    assert all(list(one)[-1] == "usage" for one in (*chunks, last))
    assert text_of(events) == "Hello there"
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (11, 5)
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 4


async def test_what_is_not_told_is_estimated_and_never_nothing() -> None:
    silent = [one for one in STREAM if "usage" not in one]
    whole = {name: value for name, value in ANSWER.items() if name != "usage"}
    long = [piece("w" * 400), piece("", reason="stop"), "[DONE]"]
    async with foreign(answer=silent) as server, serving(server) as worker:
        _, events = await worker.stream()
        # A prompt of 18 bytes and its message; two pieces, of 11 bytes together.
        assert (events[-2]["usage"]["prompt_tokens"], events[-2]["usage"]["completion_tokens"]) == (9, 3)
        server.answer = long
        _, events = await worker.stream()
        assert events[-2]["usage"]["completion_tokens"] == 100
        server.answer = whole
        _, answer = await worker.chat()
        assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (9, 3)
        server.answer = whole | {"usage": usage(0, 0)}
        _, answer = await worker.chat()
        assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (9, 3)
        assert (await worker.load())["tokens"] == 3 + 100 + 3 + 3


async def test_usage_so_far_is_told_in_every_chunk() -> None:
    every = [
        piece("Hello", usage=usage(11, 1)),
        piece(" there", usage=usage(11, 4)),
        piece("", reason="stop", usage=usage(11, 5)),
        "[DONE]",
    ]
    async with foreign(answer=every) as server, serving(server, preset="vllm") as worker:
        _, events = await worker.stream()
        assert [one["usage"]["completion_tokens"] for one in events[:-1]] == [1, 4, 5, 5]
        server.answer = STREAM
        _, events = await worker.stream()
        # Until the server tells, what was heard is counted.
        assert [one["usage"]["completion_tokens"] for one in events[:-1]] == [0, 2, 3, 3, 5]


async def test_several_choices_are_counted_together() -> None:
    both = [
        piece("One", usage=usage(11, 1)),
        piece("Two", index=1, usage=usage(11, 1)),
        piece("", reason="stop", usage=usage(11, 2)),
        piece("", index=1, reason="length", usage=usage(11, 2)),
        {"choices": [], "usage": usage(11, 4)},
        "[DONE]",
    ]
    async with foreign(answer=both) as server, serving(server, preset="vllm") as worker:
        _, events = await worker.stream(n=2)
    assert (text_of(events), text_of(events, 1)) == ("One", "Two")
    assert events[1]["usage"]["completion_tokens"] == 2
    assert (events[-2]["usage"]["prompt_tokens"], events[-2]["usage"]["completion_tokens"]) == (11, 4)


async def test_odd_forms_are_put_right() -> None:
    role = {"role": "assistant"}
    call = {"id": "a1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    more = {"id": "a2", "type": "function", "function": {"name": "g", "arguments": '{"y"'}}
    rest = {"function": {"arguments": ":2}"}}
    odd: list[Any] = [
        b": a comment\r\n\r\n",
        {"choices": [], "prompt_filter_results": []},
        {"choices": [{"index": 0, "delta": {**role, "content": None, "reasoning": "Hm"}}], "usage": None},
        {"choices": [{"delta": {**role, "content": [{"type": "text", "text": "Hi"}], "secret": "x"}}]},
        {"choices": [{"index": 0, "delta": {**role, "tool_calls": [call]}}]},
        {"choices": [{"index": 0, "delta": {**role, "tool_calls": [more]}}]},
        {"choices": [{"index": 0, "delta": {**role, "tool_calls": [rest]}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "eos_token"}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [{"index": 7, "delta": {"content": "no such choice"}}]},
    ]  # and no [DONE]
    async with foreign(answer=odd) as server, serving(server) as worker:
        status, events = await worker.stream()
    assert status == 200
    deltas = [one["choices"][0]["delta"] for one in events[:-2]]
    assert deltas[0] == {
        **{"role": "assistant", "content": "", "refusal": None},
        **{"reasoning": "Hm", "reasoning_content": "Hm"},
    }
    assert deltas[1] == {"content": "Hi"}
    calls = [delta["tool_calls"][0] for delta in deltas[2:5]]
    assert [one["index"] for one in calls] == [0, 1, 1]
    assert calls[0]["function"] == {"name": "f", "arguments": '{"x":1}'}
    assert "".join(one["function"]["arguments"] for one in calls[1:]) == '{"y":2}'
    assert [one["choices"][0]["finish_reason"] for one in events[:-2]][-1] == "stop"
    assert len(deltas) == 6


async def test_completions_embeddings_and_rankings_pass() -> None:
    vector = {"object": "list", "model": MODEL, "data": [{"index": 0, "embedding": [0.25, 1e-9]}]}
    texts = {"choices": [{"index": 0, "text": "Hi", "finish_reason": "stop"}]}
    names = ["endpoint:completions", "endpoint:embeddings", "endpoint:rerank", "endpoint:tokenize"]
    async with foreign() as server, serving(server, capabilities=names) as worker:
        server.answer = texts
        _, answer = await worker.post("/v1/completions", model="asked", prompt=["Say it", [1, 2, 3]])
        assert answer["choices"][0]["text"] == "Hi"
        assert answer["usage"]["prompt_tokens"] == 2 + 3
        server.answer = [
            {"choices": [{"index": 0, "text": "Hi", "finish_reason": None}]},
            {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]},
            "[DONE]",
        ]
        _, events = await worker.post("/v1/completions", prompt="Say it", stream=True)
        assert (text_of(events), events[0]["id"]) == ("Hi", "cmpl-req_1")
        server.answer = vector | {"usage": {"prompt_tokens": 4, "total_tokens": 4}}
        _, answer = await worker.post("/v1/embeddings", model="asked", input=["Hello you"])
        assert answer["data"] == vector["data"]
        assert (answer["model"], answer["usage"]) == ("asked", {"prompt_tokens": 4, "total_tokens": 4})
        server.answer = vector
        _, answer = await worker.post("/v1/embeddings", model="asked", input=["Hello you"])
        assert answer["usage"]["prompt_tokens"] == 3
        server.answer = {"results": [{"index": 0, "relevance_score": 0.5}], "usage": {"total_tokens": 6}}
        _, answer = await worker.post("/v1/rerank", model="asked", query="q", documents=["d"])
        assert answer["results"] == server.answer["results"]
        assert answer["usage"]["prompt_tokens"] == 6
        server.answer = {"count": 1, "max_model_len": 5, "tokens": [1]}
        _, answer = await worker.post("/tokenize", prompt="x")
        assert answer == server.answer
        assert server.asked[-1][0] == "/tokenize"


# -- what goes wrong


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (400, {"error": {"message": "max_tokens is too large", "param": "max_tokens"}}, "max_tokens is too"),
        (400, {"object": "error", "message": "too long"}, "too long"),
        (422, {"detail": [{"loc": ["body"], "msg": "field required"}]}, "field required"),
        (422, {"detail": "Unexpected fields"}, "Unexpected fields"),
        (400, {"error": "model is loading"}, "model is loading"),
        (413, "<html>", "refused the request"),
        (400, {"error": {"message": f"your key {KEY} may not"}}, "your key *** may not"),
    ],
)
async def test_what_is_wrong_with_a_request_is_told_as_400(status: int, body: Any, told: str) -> None:
    async with foreign(answer=body, status=status) as server, serving(server) as worker:
        got, answer = await worker.chat()
        assert got == 400
        assert told in answer["error"]["message"]
        assert answer["error"]["type"] == "invalid_request_error"
        assert worker.engine.healthy()


async def test_no_part_of_the_key_is_told_where_a_long_refusal_is_cut() -> None:
    words = {"error": {"message": "w" * 990 + KEY}}
    async with foreign(answer=words, status=400) as server, serving(server) as worker:
        _, answer = await worker.chat()
    assert answer["error"]["message"] == "w" * 990 + "***"


@pytest.mark.parametrize("status", [301, 302, 307, 402, 403, 404, 405, 408, 429, 500, 502, 503])
async def test_what_is_wrong_with_the_server_is_no_fault_of_the_request(status: int) -> None:
    words = {"error": {"message": "canary words", "code": "x"}}
    async with foreign(answer=words, status=status) as server:
        server.headers = {"Location": server.url + "/elsewhere"} if status < 400 else {}
        async with serving(server) as worker:
            got, answer = await worker.stream()
        assert got == 503
        assert answer["error"]["code"] == "server_is_overloaded"
        assert "canary" not in json.dumps(answer)
        assert [path for path, _, _ in server.asked] == ["/v1/chat/completions"]


async def test_a_refused_key_ends_the_worker_and_never_reaches_the_client() -> None:
    words = {"error": {"message": "bad key"}}
    async with foreign(answer=words, status=401) as server, serving(server) as worker:
        got, answer = await worker.chat()
        assert got == 503
        assert "key" not in json.dumps(answer)
        with pytest.raises(LoadError, match=r"refuses the key \(401\)") as ended:
            worker.engine.healthy()
        assert ended.value.cause is Cause.BAD_ARGUMENT
        async with worker.session.get("/health") as reply:
            assert reply.status == 503


async def test_403_is_looked_into() -> None:
    async with foreign(answer={}, status=403) as server, serving(server) as worker:
        assert (await worker.chat())[0] == 503
        assert worker.engine.healthy()
        server.models_status = 403
        await worker.chat()
        await until(lambda: worker.engine._failure is not None, "it is noticed")
        with pytest.raises(LoadError, match=r"refuses the key \(403\)"):
            worker.engine.healthy()


@pytest.mark.parametrize(
    "events",
    [
        [piece("Hello"), "cut"],
        [piece("Hello")],
        [piece("Hello"), {"error": {"message": "canary"}}],
        [piece("Hello"), "no json"],
    ],
)
async def test_a_stream_that_is_cut_does_not_look_finished(events: list[Any]) -> None:
    async with foreign(answer=events) as server, serving(server) as worker:
        status, got = await worker.stream()
    assert status == 200
    assert got[-1]["error"]["code"] == "server_is_overloaded"
    assert "canary" not in json.dumps(got)
    assert text_of(got) == "Hello"


@pytest.mark.parametrize("events", [["cut"], ["[DONE]"], [{"error": {"message": "canary"}}], []])
async def test_a_stream_that_never_began_is_a_plain_refusal(events: list[Any]) -> None:
    async with foreign(answer=events) as server, serving(server) as worker:
        status, answer = await worker.stream()
    assert (status, answer["error"]["code"]) == (503, "server_is_overloaded")


@pytest.mark.parametrize("answer", ["<html>", {}, {"choices": []}, {"error": {"message": "x"}}, [1]])
async def test_no_answer_is_none(answer: Any) -> None:
    async with foreign(answer=answer) as server, serving(server) as worker:
        assert (await worker.chat())[0] == 503


@pytest.mark.parametrize(
    ("path", "answer", "status"),
    [
        ("/v1/embeddings", {"data": [], "error": None}, 200),
        ("/v1/embeddings", {"data": [], "error": {"message": "x"}}, 503),
        ("/v1/embeddings", {"message": "moved"}, 503),
        ("/v1/score", {"results": []}, 503),
        ("/v1/rerank", {"data": []}, 503),
        ("/tokenize", {"error": "x"}, 503),
    ],
)
async def test_vectors_and_rankings_must_be_there_and_an_error_that_is_null_is_none(
    path: str, answer: Any, status: int
) -> None:
    names = ["endpoint:embeddings", "endpoint:rerank", "endpoint:score", "endpoint:tokenize"]
    async with foreign(answer=answer) as server, serving(server, capabilities=names) as worker:
        got, told = await worker.post(path, model="asked", input="x", prompt="x")
    assert got == status
    assert "error" not in told or status != 200


async def test_a_silent_server_is_waited_for_only_so_long() -> None:
    async with foreign(answer=[piece("Hello"), 9.0]) as server, serving(server, timeout=0.2) as worker:
        _, events = await worker.stream()
        assert "error" in events[-1]
        assert worker.engine.running == 0


async def test_an_abort_closes_the_connection_and_tells_what_it_cost() -> None:
    slow = [piece("w" * 8), piece("w" * 8), 9.0, piece("", reason="stop"), "[DONE]"]
    async with foreign(answer=slow) as server, serving(server, slots=2) as worker:
        asked = asyncio.create_task(worker.stream())
        await until(lambda: len(server.asked) == 1 and worker.engine.running == 1, "it runs")
        await until(lambda: bool(worker.app._active["req_1"][0].spent.completion_tokens), "it is counted")
        assert (await worker.load())["running"] == 1
        assert await worker.abort() == {"prompt_tokens": 9, "completion_tokens": 4}
        assert (await asked)[1][-1]["error"]["code"] == "aborted"
        await until(lambda: server.broken == 1, "the server sees it", seconds=1)
        assert (await worker.load())["running"] == 0
        assert await worker.abort() == {"prompt_tokens": 0, "completion_tokens": 0}


async def test_a_client_that_leaves_ends_it() -> None:
    slow = [piece("Hello"), 9.0]
    async with foreign(answer=slow) as server, serving(server) as worker:
        asked = asyncio.create_task(worker.stream())
        await until(lambda: len(server.asked) == 1 and worker.engine.running == 1, "it runs")
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await until(lambda: server.broken == 1, "the server sees it", seconds=1)
        await until(lambda: worker.engine.running == 0, "nothing is left")


async def test_what_was_aborted_leaves_nothing_behind() -> None:
    slow = [piece("Hello"), 9.0]
    async with foreign(answer=slow) as server, serving(server, slots=8) as worker:
        for _ in range(15):
            asked = [asyncio.create_task(worker.stream()) for _ in range(8)]
            await until(lambda: worker.engine.running == 8, "they run")
            await worker.abort()
            assert {status for status, _ in await asyncio.gather(*asked)} <= {200, 499}
        assert worker.engine.running == 0
        assert worker.app._active == {}
        connector = worker.engine.remote._opened().connector
        assert connector is not None
        assert not connector._acquired
        await until(lambda: server.broken == len(server.asked), "the server saw each of them end")
        assert server.broken > 50


# -- finding the server


async def loaded(server: Any, **arguments: Any) -> tuple[str, int]:
    async with serving(server, **arguments) as worker:
        return worker.engine.model, worker.engine.context_length


@pytest.mark.parametrize(
    ("card", "length"),
    [
        ({"max_model_len": 2048}, 2048),
        ({"context_window": 100}, 100),
        ({"meta": {"n_ctx_train": 512}}, 512),
        ({"meta": None, "context_length": "many"}, 0),
    ],
)
async def test_model_and_context_are_discovered(card: dict[str, Any], length: int) -> None:
    async with foreign(models={"data": [{"id": MODEL, **card}]}) as server:
        assert await loaded(server) == (MODEL, length)
        assert await loaded(server, context_length=7) == (MODEL, 7)
        assert await loaded(server, preset="llama.cpp") == (MODEL, 777)


async def test_what_is_not_below_v1_is_asked_beside_it() -> None:
    async with foreign() as server:
        server.url = server.url.removesuffix("/v1") + "/team/v1"
        await loaded(server, preset="llama.cpp")
    assert [path for path, _ in server.looked] == ["/team/v1/models", "/team/health", "/team/props"]


async def refused(server: Any, **arguments: Any) -> LoadError:
    with pytest.raises(LoadError) as error:
        await loaded(server, **arguments)
    return error.value


async def test_what_only_an_operator_can_mend_ends_the_start() -> None:
    async with foreign(models={"data": [{"id": "a"}, {"id": "b"}]}) as server:
        assert "a, b" in (await refused(server)).detail
        assert "a, b" in (await refused(server, preset="vllm", model="c")).detail
        assert (await loaded(server, model="c"))[0] == "c"
        server.models = "no list"
        assert "/v1" in (await refused(server)).detail
        server.models_status = 404
        assert "404" in (await refused(server)).detail
        server.models_status = 401
        assert "refuses the key" in (await refused(server)).detail
        assert "wants a key" in (await refused(server, key="")).detail
        server.models_status, server.headers = 302, {"Location": "http://127.0.0.1:1/"}
        error = await refused(server)
        assert error.cause is Cause.BAD_ARGUMENT
        assert "redirect" in error.detail


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "'url' is missing"),
        ({"url": None}, "'url' is missing"),
        ({"uri": "http://h/"}, "Unknown argument 'uri'"),
        ({"url": 3}, "Argument 'url' is not possible"),
        ({"url": "http://h/", "preset": "none"}, "'preset' must be one of"),
        ({"url": "http://h/", "capabilities": ["temperature", "api_base"]}, "names 'api_base'"),
        ({"url": "http://h/", "capabilities": ["temperature", 3]}, "Argument 'capabilities' is not possible"),
        ({"url": "http://h/", "timeout": 0}, "Argument 'timeout' is not possible"),
        ({"url": "http://h/", "key": "sk-no"}, "Unknown argument 'key'"),
        ({"url": "http://h/", "context_length": True}, "Argument 'context_length' is not possible"),
    ],
)
def test_arguments_are_typed_and_the_wrong_one_is_named(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(LoadError, match=told) as refused:
        read_arguments(arguments)
    assert refused.value.cause is Cause.BAD_ARGUMENT


async def test_a_server_that_goes_away_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_engine, "AWAY_SECONDS", 0.05)
    monkeypatch.setattr(upstream_engine, "_AGAIN_SECONDS", 0.05)
    async with foreign(answer=ANSWER) as server, serving(server) as worker:
        server.models_status = 503
        worker.engine.doubt()
        await until(lambda: worker.engine._failure is not None, "it is noticed")
        with pytest.raises(LoadError, match="answers 503") as away:
            worker.engine.healthy()
        assert away.value.cause is Cause.LOST


async def test_a_server_that_comes_later_is_waited_for() -> None:
    async with foreign(answer=ANSWER, models_status=503) as server:
        waiting = asyncio.create_task(loaded(server))
        await until(lambda: bool(server.looked), "it was asked")
        server.models_status = 200
        assert (await waiting)[0] == MODEL


async def test_a_server_that_lists_no_models_now_is_waited_for_where_one_of_them_is_meant() -> None:
    async with foreign(answer=ANSWER, models_status=429) as server:
        assert await loaded(server, model="named") == ("named", 0)
        waiting = asyncio.create_task(loaded(server))
        looked = len(server.looked)
        await until(lambda: len(server.looked) > looked + 1, "it was asked")
        server.models_status = 200
        assert (await waiting)[0] == MODEL


async def test_a_server_that_has_no_list_is_looked_at_once() -> None:
    async with foreign(answer=ANSWER) as server:
        await loaded(server, preset="transformers-serve", model="named")
    assert [path for path, _ in server.looked] == ["/health"]


def test_every_preset_has_what_operators_need() -> None:
    for name, preset in PRESETS.items():
        assert preset.title
        assert preset.note.endswith("."), name
        assert preset.url.startswith("http")
        assert any(one.startswith("endpoint:") for one in preset.capabilities), name


async def test_a_dropped_idle_connection_is_not_a_failure() -> None:
    async with foreign(answer=ANSWER) as server, serving(server) as worker:
        assert (await worker.chat())[0] == 200
        for connection in list(worker.engine.remote._opened().connector._conns.values()):  # type: ignore[union-attr]
            for protocol, _ in connection:
                protocol.transport.abort()
        assert (await worker.chat())[0] == 200


async def test_nothing_is_accepted_when_fenced() -> None:
    async with foreign(answer=ANSWER) as server, serving(server) as worker:
        worker.app.accepting = False
        assert (await worker.chat())[0] == 503
        assert server.asked == []
