"""From nothing to a first answer, by the bundled model, through the official client."""

from __future__ import annotations

import json
import re
import stat
import subprocess

import openai
import pytest

from tests.e2e.conftest import Roundhouse, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(600)]

QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


def test_the_printed_curl_answers_with_real_text(roundhouse: Roundhouse):
    (command,) = re.findall(r"^curl .*$", roundhouse.output, re.MULTILINE)
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert "Tokyo" in json.loads(result.stdout)["choices"][0]["message"]["content"]


def test_the_password_is_printed_once_and_kept_for_the_owner_only(roundhouse: Roundhouse):
    path = roundhouse.data / "credentials.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    facts = roundhouse.credentials
    assert roundhouse.output.count(facts["admin_password"]) == 1
    assert facts["base_url"].endswith("/v1")
    assert facts["chat_model"] == "smollm2-135m-instruct"
    assert facts["embedding_model"] == "all-minilm-l6-v2"
    assert {"chat_url", "admin_url", "admin_username", "api_key"} <= facts.keys()
    for log in roundhouse.data.glob("log/*.log"):
        text = log.read_text(errors="replace")
        assert facts["admin_password"] not in text, log.name
        assert facts["api_key"] not in text, log.name


def test_streamed_and_not_the_same_text_with_tokyo_in_it(roundhouse: Roundhouse):
    client = roundhouse.client()
    model = roundhouse.credentials["chat_model"]
    whole = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    text, usage = "", None
    for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        usage = chunk.usage or usage
    assert "Tokyo" in text
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == "stop"
    assert usage == whole.usage


def test_usage_reaches_the_ledger(roundhouse: Roundhouse):
    model = roundhouse.credentials["chat_model"]
    answer = roundhouse.client().chat.completions.with_raw_response.create(
        model=model, messages=QUESTION, max_tokens=4
    )
    request_id = answer.headers["x-request-id"]
    usage = answer.parse().usage
    rows = eventually(
        lambda: roundhouse.rows(
            "SELECT prompt_tokens, completion_tokens, outcome FROM registry_usageevent WHERE request_id = %s",
            request_id,
        ),
        seconds=3,
        what="the event is in the ledger",
    )
    assert rows == [(usage.prompt_tokens, usage.completion_tokens, "ok")]


def test_models_lists_what_the_key_may_use(roundhouse: Roundhouse):
    client = roundhouse.client()
    assert roundhouse.credentials["chat_model"] in [model.id for model in client.models.list()]
    assert client.models.retrieve(roundhouse.credentials["chat_model"]).object == "model"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("no-such-model")
    assert error.value.code == "model_not_found"


def test_a_second_up_on_the_same_data_says_so_in_one_sentence(roundhouse: Roundhouse):
    result = roundhouse.manage("up", "--detach", check=False)
    assert result.returncode == 1
    assert "Roundhouse runs already on" in result.stdout


def test_a_busy_port_is_named_in_one_sentence(roundhouse: Roundhouse, tmp_path):
    environment = roundhouse.environment | {"ROUNDHOUSE_DATA": str(tmp_path / "other")}
    other = Roundhouse(data=tmp_path, environment=environment)
    result = other.manage("up", "--detach", check=False)
    assert result.returncode == 1
    assert f"Port {environment['ROUNDHOUSE_PORT']}" in result.stdout
    assert "ROUNDHOUSE_PORT" in result.stdout


def test_a_folder_that_cannot_be_made_is_named_in_one_sentence(roundhouse: Roundhouse, tmp_path):
    (tmp_path / "file").touch()
    environment = roundhouse.environment | {"ROUNDHOUSE_DATA": str(tmp_path / "file" / "data")}
    result = Roundhouse(data=tmp_path, environment=environment).manage("up", check=False)
    assert result.returncode == 1
    assert "ROUNDHOUSE_DATA" in result.stderr
    assert result.stderr.strip().count("\n") == 0


def test_too_little_disk_is_told_before_anything_is_fetched(roundhouse: Roundhouse, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this account may not mount a small disk")
    try:
        environment = roundhouse.environment | {
            "ROUNDHOUSE_DATA": str(tmp_path / "data"),
            "ROUNDHOUSE_CACHE": str(small),
        }
        result = Roundhouse(data=tmp_path, environment=environment).manage("up", check=False)
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert result.returncode == 1
    assert "Too little disk" in result.stderr
    assert "ROUNDHOUSE_CACHE" in result.stderr
