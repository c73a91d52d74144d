"""The examples of docs/connect.md, run as they stand there with this test's port and key."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import openai
import pytest
import yaml

from tests.clients.environments import python_with
from tests.e2e.conftest import Roundhouse
from tests.e2e.documented import block, blocks, clone, run, with_facts_of

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(600)]

PYTHON = dict(zip(("Tokyo", "Paris", "True"), blocks("connect", "python openai"), strict=True))
CURL = {
    "text_completion": block("connect", "curl http://127.0.0.1:8000/v1/completions"),
    "relevance_score": block("connect", "curl http://127.0.0.1:8000/v1/rerank"),
}
VARIABLES = block("connect", "export OPENAI_BASE_URL")
LANGCHAIN = block("connect", "langchain_openai")
LLAMA_INDEX = block("connect", "llama_index")
CONTINUE = block("connect", "apiBase")
AIDER = block("connect", "aider --model")
RUN = [*PYTHON.values(), *CURL.values(), VARIABLES, LANGCHAIN, LLAMA_INDEX, CONTINUE, AIDER]


def program(example: str, *lines: str) -> str:
    return "\n".join([example, *lines])


@pytest.mark.parametrize("said", PYTHON)
def test_a_python_example_answers(roundhouse: Roundhouse, tmp_path: Path, said: str) -> None:
    folder = clone(tmp_path, roundhouse.data)
    (folder / "example.py").write_text(PYTHON[said].text)
    assert said in run(f"{sys.executable} example.py", folder, os.environ).stdout


@pytest.mark.parametrize("said", CURL)
def test_a_curl_example_answers(roundhouse: Roundhouse, tmp_path: Path, said: str) -> None:
    assert said in run(with_facts_of(roundhouse, CURL[said]), tmp_path, os.environ).stdout


def test_the_two_variables_are_enough_for_a_client(roundhouse: Roundhouse, tmp_path: Path) -> None:
    ask = f"{sys.executable} -c 'import openai; print([one.id for one in openai.OpenAI().models.list()])'"
    done = run(with_facts_of(roundhouse, VARIABLES) + ask, tmp_path, os.environ)
    assert "smollm2-135m-instruct" in done.stdout


def test_langchain_chats_and_embeds(roundhouse: Roundhouse, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(
        program(
            with_facts_of(roundhouse, LANGCHAIN),
            "assert chat.invoke('What is the capital of Japan?').content.count('Tokyo')",
            "assert len(embeddings.embed_query('king')) == 384",
        )
    )
    said = run(f"{python_with('langchain')} example.py", tmp_path, os.environ).stdout
    assert said.strip()


@pytest.mark.full
def test_llama_index_completes(roundhouse: Roundhouse, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(with_facts_of(roundhouse, LLAMA_INDEX))
    said = run(f"{python_with('llama-index')} example.py", tmp_path, os.environ).stdout
    assert said.strip()


def test_what_continue_is_told_leads_to_a_model_for_each_role(roundhouse: Roundhouse) -> None:
    """Continue lives in an editor: what its configuration says is asked with the official client."""
    models = yaml.safe_load(with_facts_of(roundhouse, CONTINUE))["models"]
    assert [model["roles"] for model in models] == [["chat", "edit"], ["embed"]]
    for model in models:
        assert model["provider"] == "openai"
        client = openai.OpenAI(base_url=model["apiBase"], api_key=model["apiKey"], max_retries=0)
        if "chat" in model["roles"]:
            answer = client.chat.completions.create(
                model=model["model"], messages=[{"role": "user", "content": "Hello"}], max_tokens=4
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens > 0
        else:
            assert len(client.embeddings.create(model=model["model"], input="king").data[0].embedding) == 384


AIDER_STANDS_FOR = f"""#!{sys.executable}
import os, sys, openai

option, model = sys.argv[1:]
provider, _, name = model.partition("/")
assert (option, provider) == ("--model", "openai")
client = openai.OpenAI(base_url=os.environ["OPENAI_API_BASE"], api_key=os.environ["OPENAI_API_KEY"])
question = [{{"role": "user", "content": "What is the capital of Japan?"}}]
answer = client.chat.completions.create(model=name, messages=question, temperature=0)
print(answer.choices[0].message.content)
"""
"""Aider reads these two variables and the model's name, and sends the same request."""


def test_what_aider_is_told_leads_to_the_model(roundhouse: Roundhouse, tmp_path: Path) -> None:
    aider = tmp_path / "aider"
    aider.write_text(AIDER_STANDS_FOR)
    aider.chmod(aider.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert "Tokyo" in run(with_facts_of(roundhouse, AIDER), tmp_path, environment).stdout
