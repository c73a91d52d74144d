"""Other clients: Anthropic's, openai-node in two major versions, the AI SDK with two providers, Pydantic AI
and LlamaIndex. Whole answers, streams, many at once, tools, structured output, vectors, errors, retries."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.programs import node_program, python_program, run_program

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.timeout(600), pytest.mark.full]

ENVIRONMENTS = ["node", "pydantic-ai", "llama-index"]


def test_a_program_on_anthropics_client_runs(told: dict[str, str]) -> None:
    run_program(python_program("anthropic_program.py"), told, version="2.")


def test_a_program_on_pydantic_ai_runs(told: dict[str, str]) -> None:
    run_program(python_program("pydantic_ai_program.py", environment="pydantic-ai"), told, version="2.")


def test_a_program_on_llama_index_runs(told: dict[str, str]) -> None:
    run_program(python_program("llama_index_program.py", environment="llama-index"), told, version="0.")


@pytest.mark.parametrize(("package", "major"), [("openai", "7"), ("openai-6", "6")])
def test_a_program_on_openai_node_runs(
    package: str, major: str, told: dict[str, str], tmp_path: Path
) -> None:
    run_program([*node_program("openai_program.mjs", tmp_path), package], told, version=f"{major}.")


@pytest.mark.parametrize("provider", ["openai", "openai-compatible"])
def test_a_program_on_the_ai_sdk_runs(provider: str, told: dict[str, str], tmp_path: Path) -> None:
    run_program([*node_program("ai_sdk_program.mjs", tmp_path), provider], told, version="7.")
