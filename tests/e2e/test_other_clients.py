"""The clients of tests/clients that the examples of the pages do not show, on the real models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.programs import node_program, python_program
from tests.e2e.conftest import Roundhouse
from tests.e2e.documented import run

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.full, pytest.mark.timeout(600)]

PROGRAMS = {
    "anthropic": lambda folder: python_program("anthropic_program.py"),
    "pydantic-ai": lambda folder: python_program("pydantic_ai_program.py", environment="pydantic-ai"),
    "llama-index": lambda folder: python_program("llama_index_program.py", environment="llama-index"),
    "openai-node": lambda folder: [*node_program("openai_program.mjs", folder), "openai"],
    "ai-sdk": lambda folder: [*node_program("ai_sdk_program.mjs", folder), "openai"],
    "ai-sdk-compatible": lambda folder: [*node_program("ai_sdk_program.mjs", folder), "openai-compatible"],
}


@pytest.mark.parametrize("client", PROGRAMS)
def test_a_client_is_answered_by_the_real_models(roundhouse: Roundhouse, tmp_path: Path, client: str) -> None:
    credentials = roundhouse.credentials
    told = roundhouse.environment | {
        "OPENAI_BASE_URL": credentials["base_url"],
        "OPENAI_API_KEY": credentials["api_key"],
        "ANTHROPIC_BASE_URL": credentials["base_url"].removesuffix("/v1"),
        "ANTHROPIC_API_KEY": credentials["api_key"],
        "CHAT_MODEL": "smollm2-135m-instruct",
        "EMBEDDING_MODEL": "all-minilm-l6-v2",
    }
    said = run(" ".join([*PROGRAMS[client](tmp_path), "real"]), tmp_path, told).stdout
    # Whole and streamed.
    assert said.count("Tokyo") >= 2, said
    assert "384" in said or client == "anthropic"
