"""What every worker refuses, and that it lives on."""

from __future__ import annotations

import httpx
import pytest

from tests.contract.serving import Served

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/load", "/health", "/metrics", "/nothing")


def test_a_prompt_beyond_the_context_is_refused_and_named(served: Served) -> None:
    if served.engine.context is None:
        pytest.skip("nobody told how much this server takes")
    served.can("/v1/completions")
    for stream in (False, True):
        error = served.refusal(
            messages=[{"role": "user", "content": "word " * 2100}], max_tokens=1, stream=stream
        )
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == "messages"
        error = served.refusal("/v1/completions", prompt=[5] * 2049, max_tokens=1, stream=stream)
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == "prompt"
    assert served.complete(prompt=[5] * 2047, max_tokens=1)["usage"]["prompt_tokens"] == 2047


def test_a_token_that_is_none_is_refused(served: Served) -> None:
    served.can("/v1/completions")
    refused = served.refusal("/v1/completions", prompt=[2**31 - 1], max_tokens=1)
    # A foreign server may leave it at words.
    assert refused["param"] == "prompt" or (served.engine.behind and refused["message"])
    assert served.complete(max_tokens=1)["choices"]


def test_an_unknown_path_is_a_404_of_the_apis_shape(served: Served) -> None:
    reply = served.http.post("/v1/nothing", json={})
    assert reply.status_code == 404
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_workers_port_answers_nobody_without_its_secret(served: Served) -> None:
    with httpx.Client(base_url=served.worker_url) as stranger:
        for path in PATHS:
            for header in (None, "Bearer wrong", f"Basic {served.worker_secret}"):
                for method in ("GET", "POST"):
                    headers = {} if header is None else {"Authorization": header}
                    reply = stranger.request(method, path, headers=headers, json={})
                    assert reply.status_code == 401, (method, path, header)


def test_a_workers_port_has_no_other_path(served: Served) -> None:
    headers = {"Authorization": f"Bearer {served.worker_secret}"}
    assert httpx.get(f"{served.worker_url}/nothing", headers=headers).status_code == 404
    assert httpx.get(f"{served.worker_url}/v1/models", headers=headers).status_code == 200
