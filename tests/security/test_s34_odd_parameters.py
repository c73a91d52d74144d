"""S34: no value of a parameter makes work, takes memory, or is answered with a fault of ours."""

from __future__ import annotations

import json
from typing import Any

import psutil
import pytest

from registry.models import UsageEvent
from tests.api.conftest import Served, Worker, facts, say, served, worker  # noqa: F401

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


def test_each_is_refused_quickly_without_the_engine_and_in_flat_memory(
    served: Served,  # noqa: F811
    worker: Worker,  # noqa: F811
) -> None:
    head = json.dumps(say("hi"))[:-1]
    assert served.chat(say("warm")).status == 200
    before, memory = worker.load(), psutil.Process().memory_info().rss
    events = UsageEvent.objects.count()
    for _ in range(3):
        for field, value in BAD:
            answer = served.chat(f'{head},"{field}":{value}}}'.encode())
            assert answer.status == 400, (field, value[:80], answer.body)
            answer.error()
            assert len(answer.body) < 2000
            assert answer.seconds < 0.5, (field, answer.seconds)
    after: dict[str, Any] = worker.load()
    assert after["steps"] == before["steps"]
    assert UsageEvent.objects.count() <= max(events, 1)
    assert psutil.Process().memory_info().rss - memory < 30e6
