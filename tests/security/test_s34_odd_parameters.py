"""S34: no value of a parameter makes work, takes memory, or is answered with a fault of ours."""

from __future__ import annotations

import json
import socket
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from openai_api.document import document
from openai_api.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RERANK, RESPONSES, Endpoint
from openai_api.errors import InvalidRequest
from registry.models import UsageEvent
from tests.api.conftest import ROUTE, Served, Worker, facts, process_serving, say, worker  # noqa: F401

pytestmark = pytest.mark.django_db(transaction=True)

BAD: list[tuple[str, str]] = [
    ("n", "1000000"),
    ("best_of", "1000000"),
    ("temperature", "NaN"),
    ("temperature", "1e308"),
    ("top_p", "-1e-300"),
    ("presence_penalty", "1e999"),
    ("seed", str(2**63)),
    ("max_tokens", str(2**64)),
    ("min_tokens", "-1"),
    ("top_k", str(2**40)),
    ("repetition_penalty", "1e308"),
    ("prompt_logprobs", "100000"),
    ("top_logprobs", "100000"),
    ("logit_bias", json.dumps({str(token): 1 for token in range(50_000)})),
    ("stop", json.dumps(["x"] * 50_000)),
    ("stop_token_ids", json.dumps([1] * 50_000)),
    ("tools", json.dumps([{}] * 50_000)),
    ("messages", json.dumps([{"role": "user", "content": "x"}] * 50_000)),
    ("messages", '[{"role":"user","content":"\\ud800"}]'),
    ("messages", '[{"role":"user","content":"\\u0000"}]'),
    ("stop", '"\\u0000"'),
    ("metadata", "[" * 1000 + "]" * 1000),
    ("tools", '{"a":' * 1000 + "1" + "}" * 1000),
    ("chat_template", '"{{ range(10**9) | list }}"'),
    ("response_format", '{"type":"json_schema"}'),
]


VALUES = [
    *("NaN", "-Infinity", "1e308", "-1e308", "1e999", "-0", "-0.0", "1e-320"),
    *(str(2**63), str(-(2**63) - 1), str(2**64), "9" * 400),
    *(
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\\u0000"',
        '["\\u0000"]',
        '{"\\u0000":1}',
        '"' + "x" * 300_000 + '"',
    ),
    *("[" * 1000 + "]" * 1000, '{"a":' * 1000 + "1" + "}" * 1000, "[" * 100_000),
    *("{}", "[]", "[null]", "[{}]", '""', "true", '{"type":[]}', '[[[["a"]]]]'),
]
"""JSON, or nearly."""
ASKED = (CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES, RERANK)
FIELDS = [(one, field.encode_name) for one in ASKED for field in msgspec.structs.fields(one.request)]
FEW, MANY = 400, 4000
SECONDS = 0.05
GROWTH_BYTES = 10e6


@pytest.fixture
def alone(facts: str, tmp_path: Path) -> Iterator[tuple[Served, psutil.Process]]:  # noqa: F811
    """A gateway in a process of its own: what it holds is its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = ("manage.py", "gateway", f"--port={port}")
    with process_serving(*command, port=port, data=tmp_path) as process:
        yield Served(port, facts), psutil.Process(process.pid)


def test_each_is_refused_quickly_without_the_engine_and_in_flat_memory(
    alone: tuple[Served, psutil.Process],
    worker: Worker,  # noqa: F811
) -> None:
    served, process = alone
    head = json.dumps(say("hi"))[:-1]
    assert served.chat(say("warm")).status == 200
    before, events = worker.load(), UsageEvent.objects.count()
    plain = statistics.median(served.chat(say("hi", n=0)).seconds for _ in range(20))
    memory = 0
    for _ in range(4):
        took = []
        for field, value in BAD:
            answer = served.chat(f'{head},"{field}":{value}}}'.encode())
            assert answer.status == 400, (field, value[:80], answer.body)
            answer.error()
            assert len(answer.body) < 2000
            # Beside other work a plain refusal takes longer too.
            assert answer.seconds < max(0.5, 20 * plain), (field, answer.seconds)
            took.append(answer.seconds)
        assert statistics.median(took) < max(SECONDS, 5 * plain)
        # The first round is what the largest bodies take while they are read; malloc keeps that.
        memory = memory or process.memory_info().rss
    after: dict[str, Any] = worker.load()
    assert after["steps"] == before["steps"]
    assert UsageEvent.objects.count() <= max(events, 1)
    assert process.memory_info().rss - memory < GROWTH_BYTES


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.full)])
def test_no_field_of_any_body_takes_an_odd_value(
    alone: tuple[Served, psutil.Process],
    worker: Worker,  # noqa: F811
    count: int,
) -> None:
    served, process = alone
    assert served.chat(say("warm")).status == 200
    before = worker.load()
    plain = statistics.median(served.chat(say("hi", n=0)).seconds for _ in range(20))
    took: list[float] = []
    memory: list[int] = []

    @settings(max_examples=count, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
    @given(st.sampled_from(FIELDS), st.sampled_from(VALUES))
    def ask(field: tuple[Endpoint, str], value: str) -> None:
        endpoint, name = field
        body = body_with(endpoint, name, value)
        if is_taken(endpoint, body):
            # Odd, and right all the same: -0 is a temperature.
            return
        answer = served.request("POST", endpoint.path, body)
        assert answer.status == 400, (endpoint.path, name, value[:80], answer.body)
        assert "error" in answer.json()
        assert len(answer.body) < 2000
        took.append(answer.seconds)
        if len(took) == count // 4:
            memory.append(process.memory_info().rss)

    ask()
    assert len(took) > count // 2
    assert statistics.median(took) < max(SECONDS, 5 * plain)
    assert worker.load()["steps"] == before["steps"]
    assert process.memory_info().rss - memory[0] < GROWTH_BYTES


def body_with(endpoint: Endpoint, name: str, value: str) -> bytes:
    """The example of the endpoint, with this field's value replaced."""
    operation = document()["paths"][endpoint.path]["post"]
    example = dict(operation["requestBody"]["content"]["application/json"]["example"], model=ROUTE)
    example.pop(name, None)
    head = json.dumps(example)[:-1]
    return f'{head}{"," if example else ""}"{name}":{value}}}'.encode()


def is_taken(endpoint: Endpoint, body: bytes) -> bool:
    try:
        endpoint.parse(body)
    except InvalidRequest:
        return False
    return True
