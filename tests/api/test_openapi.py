"""The OpenAPI document and its page: valid, complete, and true."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest
from django.contrib.staticfiles import finders
from openapi_spec_validator import OpenAPIV31SpecValidator

from openai_api import answers
from openai_api.document import document
from openai_api.endpoints import ENDPOINTS
from tests.api.conftest import ROUTE, Served

pytestmark = pytest.mark.django_db(transaction=True)

OPERATIONS = [(path, method) for path, item in document()["paths"].items() for method in item]


def fetched(served: Served) -> dict[str, Any]:
    answer = served.request("GET", "/v1/openapi.json", key=None)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    found: dict[str, Any] = answer.json()
    return found


def test_it_is_served_without_a_key_and_is_valid(served: Served) -> None:
    api = fetched(served)
    assert api["openapi"] == "3.1.0"
    OpenAPIV31SpecValidator(api).validate()
    assert api == json.loads(json.dumps(document()))


def test_every_path_in_it_is_served(served: Served) -> None:
    for path, method in OPERATIONS:
        url = re.sub(r"\{\w+\}", ROUTE, path)
        answer = served.request(method.upper(), url, b"{}" if method == "post" else None)
        assert answer.status in (200, 400), (path, answer.body)
        assert b"Invalid URL" not in answer.body
        refused = served.request(method.upper(), url, b"{}" if method == "post" else None, key=None)
        assert refused.status == 401, path


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
def test_the_examples_of_requests_are_accepted(endpoint: Any) -> None:
    content = document()["paths"][endpoint.path]["post"]["requestBody"]["content"]["application/json"]
    call = endpoint.parse(json.dumps(content["example"]).encode())
    assert call.model == content["example"]["model"]
    assert call.needs() == frozenset()
    schema = document()["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
    for name in schema["required"]:
        assert name in content["example"]


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_the_examples_of_answers_have_the_shape_that_is_described(path: str, method: str) -> None:
    content = document()["paths"][path][method]["responses"]["200"]["content"]["application/json"]
    kind = getattr(answers, content["schema"]["$ref"].rpartition("/")[2])
    msgspec.convert(content["example"], kind, strict=True)


def test_real_answers_have_the_shape_that_is_described(served: Served) -> None:
    message = [{"role": "user", "content": "Hi"}]
    chat = served.request(
        "POST", "/v1/chat/completions", json.dumps({"model": ROUTE, "messages": message}).encode()
    )
    msgspec.json.decode(chat.body, type=answers.ChatCompletion)
    text = served.request("POST", "/v1/completions", json.dumps({"model": ROUTE, "prompt": "Hi"}).encode())
    msgspec.json.decode(text.body, type=answers.Completion)
    msgspec.json.decode(served.request("GET", "/v1/models").body, type=answers.ModelList)
    msgspec.json.decode(served.request("GET", f"/v1/models/{ROUTE}").body, type=answers.Model)
    usage = served.request("GET", "/v1/organization/usage/completions?start_time=1")
    msgspec.json.decode(usage.body, type=answers.UsagePage)
    msgspec.json.decode(served.request("GET", "/v1/models", key=None).body, type=answers.Error)


def test_the_page_shows_every_operation_and_loads_nothing_from_elsewhere(served: Served) -> None:
    answer = served.request("GET", "/docs/", key=None)
    page = answer.body.decode()
    assert answer.status == 200
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    for path, method in OPERATIONS:
        assert f"{method.upper()}</b> <code>{path}</code>" in page
    assert "<script" not in page
    assert "style=" not in page
    linked = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert linked
    assert all(url.startswith(("#", "/", "data:,")) for url in linked)
    (sheet,) = [url for url in linked if url.endswith(".css")]
    assert finders.find(sheet.removeprefix("/static/"))
