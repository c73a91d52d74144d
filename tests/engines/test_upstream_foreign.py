"""Real servers of other people's as workers behind a real gateway: vLLM's own, and `transformers serve`."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from config.front import make_application
from inference.engines.server import EXIT_UNLOADED
from inference.engines.upstream.presets import PRESETS
from registry.actions.events import publish_change
from registry.models import UsageEvent
from tests.api.conftest import Served, Worker, eventually, serving
from tests.api.upstreams import WORKER_ID, upstream_worker
from tests.engines.foreign_servers import KEY, transformers_serve, vllm_server
from tests.engines.test_transformers_engine import smollm2
from tests.factories import make_api_key, make_deployment, make_worker

__all__ = ["smollm2"]  # a fixture

pytestmark = [pytest.mark.full, pytest.mark.model]

ROUTE = "org/foreign"
JAPAN: Any = [{"role": "user", "content": "What is the capital of Japan?"}]
PROMPT_TOKENS = 37
WEATHER: Any = {
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


@dataclass(frozen=True)
class Theirs:
    preset: str
    url: str
    worker: Worker


@pytest.fixture(scope="module", params=["vllm", "transformers-serve"])
def theirs(
    request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Theirs]:
    preset = request.param
    folder = tmp_path_factory.mktemp(preset)
    # By another name: `transformers serve` takes an @ in the path for a revision.
    model = folder / "smollm2"
    model.symlink_to(smollm2)
    start = vllm_server if preset == "vllm" else transformers_serve
    given = {} if preset == "vllm" else {"model": str(model)}
    with start(model, folder) as url, upstream_worker(url, key=KEY, preset=preset, **given) as worker:
        yield Theirs(preset, url, worker)


@pytest.fixture
def client(transactional_db: None, theirs: Theirs) -> Iterator[openai.OpenAI]:
    deployment = make_deployment(route=ROUTE, engine="upstream", arguments={"url": theirs.url})
    make_worker(
        deployment=deployment,
        id=WORKER_ID,
        url=theirs.worker.url,
        capabilities=sorted(PRESETS[theirs.preset].capabilities),
    )
    publish_change("route", ROUTE)
    with serving(make_application()) as port:
        served = Served(port, make_api_key(name="tests")[1])
        yield openai.OpenAI(base_url=served.base_url, api_key=served.api_key, max_retries=0, timeout=120)


def settled(request_id: str | None = None) -> UsageEvent:
    """The event of this request, or of the only one."""
    events = (
        UsageEvent.objects.all() if request_id is None else UsageEvent.objects.filter(request_id=request_id)
    )
    event: UsageEvent = eventually(lambda: events.all().first(), "the ledger has it")
    return event


def test_a_chat_is_answered_and_counted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=ROUTE, messages=JAPAN, temperature=0, max_tokens=30)
    assert "Tokyo" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == ROUTE
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == PROMPT_TOKENS
    event = settled()
    assert (event.prompt_tokens, event.completion_tokens) == (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
    )


def test_a_stream_says_the_same_and_is_counted(client: openai.OpenAI) -> None:
    asked: Any = {"model": ROUTE, "messages": JAPAN, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert [part.delta.role for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
    assert "".join(part.delta.content or "" for part in parts) == whole.choices[0].message.content
    assert parts[-1].finish_reason == whole.choices[0].finish_reason
    told = chunks[-1].usage
    assert told is not None
    assert whole.usage is not None
    assert (told.prompt_tokens, told.completion_tokens) == (
        PROMPT_TOKENS,
        whole.usage.completion_tokens,
    )
    request_id = chunks[0].id.removeprefix("chatcmpl-")
    event = settled(request_id)
    assert (event.prompt_tokens, event.completion_tokens) == (PROMPT_TOKENS, told.completion_tokens)


def test_completions_stream_too(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=ROUTE, prompt="The capital of Japan is", temperature=0, max_tokens=5, stream=True
    )
    assert "Tokyo" in "".join(chunk.choices[0].text for chunk in stream)
    assert settled().completion_tokens == 5


def test_what_it_does_not_honour_is_refused_by_name(client: openai.OpenAI, theirs: Theirs) -> None:
    field = "logit_bias" if theirs.preset == "transformers-serve" else "use_beam_search"
    asked: Any = {"logit_bias": {"5": 1}, "use_beam_search": True}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=ROUTE, messages=JAPAN, extra_body={field: asked[field]})
    assert refused.value.param == field


def test_a_client_that_leaves_ends_it_and_pays_for_what_was_written(
    client: openai.OpenAI, theirs: Theirs
) -> None:
    story: Any = [{"role": "user", "content": "Write a very long story."}]
    stream = client.chat.completions.create(model=ROUTE, messages=story, max_tokens=1500, stream=True)
    seen = [chunk for _, chunk in zip(range(10), stream, strict=False)]
    stream.close()
    left = time.monotonic()
    event = settled()
    assert event.outcome == "aborted"
    assert event.prompt_tokens > 0
    assert event.completion_tokens >= len(seen) - 2
    assert theirs.worker.load()["running"] == 0
    if theirs.preset == "vllm":
        eventually(lambda: running(theirs) == 0, "the server has stopped too", seconds=5)
        assert time.monotonic() - left < 6


def running(theirs: Theirs) -> int:
    metrics = theirs.url.removesuffix("/v1") + "/metrics"
    with urllib.request.urlopen(metrics, timeout=5) as page:
        lines = page.read().decode().splitlines()
    line = next(one for one in lines if one.startswith("vllm:num_requests_running"))
    return int(float(line.rpartition(" ")[2]))


def test_more_than_the_context_is_refused_with_its_words(client: openai.OpenAI, theirs: Theirs) -> None:
    if theirs.preset != "vllm":
        pytest.skip("It refuses nothing of the kind.")
    long: Any = [{"role": "user", "content": "word " * 3000}]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 2048") as refused:
        client.chat.completions.create(model=ROUTE, messages=long)
    assert refused.value.code == "context_length_exceeded"


def test_all_that_vllm_can_reaches_it(client: openai.OpenAI, theirs: Theirs) -> None:
    if theirs.preset != "vllm":
        pytest.skip("It can do less.")
    forced: Any = {"type": "function", "function": {"name": "get_weather"}}
    called = client.chat.completions.create(
        model=ROUTE, messages=JAPAN, tools=[WEATHER], tool_choice=forced, max_tokens=60, temperature=0
    )
    calls = called.choices[0].message.tool_calls or []
    assert [call.function.name for call in calls if call.type == "function"] == ["get_weather"]
    several = client.chat.completions.create(
        model=ROUTE, messages=JAPAN, n=2, max_tokens=5, logprobs=True, top_logprobs=2, seed=1
    )
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[1].logprobs is not None
    parts = list(
        client.chat.completions.create(
            model=ROUTE,
            messages=JAPAN,
            n=2,
            max_tokens=5,
            temperature=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert parts[-1].usage is not None
    assert parts[-1].usage.completion_tokens == 10


def test_context_and_model_are_found(theirs: Theirs) -> None:
    with theirs.worker._ask("/v1/models") as reply:
        [told] = json.load(reply)["data"]
    assert told["max_model_len"] == (2048 if theirs.preset == "vllm" else 0)


def test_a_wrong_key_is_told_at_the_start(theirs: Theirs) -> None:
    if theirs.preset != "vllm":
        pytest.skip("It asks for no key.")
    with upstream_worker(theirs.url, key="sk-wrong", preset="vllm", worker_id=9, wait=False) as worker:
        assert worker.process.wait(20) == EXIT_UNLOADED
