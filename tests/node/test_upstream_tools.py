"""What a server behind must be told so that it holds calls to their schemas."""

from __future__ import annotations

import json
from typing import Any

import pytest

from inference.engines.upstream.presets import PRESETS
from inference.engines.upstream.requests import prepare


@pytest.mark.parametrize(("preset", "strict"), [("vllm", True), ("sglang", None)])
def test_tools_are_strict_where_the_server_asks_for_the_word(preset: str, strict: bool | None) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "tools": [tool, "odd"]}
    told = prepare(
        "/v1/chat/completions",
        json.dumps(asked).encode(),
        model="m",
        capabilities=["tools"],
        preset=PRESETS[preset],
    )
    tools = json.loads(told.body)["tools"]
    assert tools[0]["function"].get("strict") is strict
    assert tools[1] == "odd"
