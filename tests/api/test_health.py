"""/health, /version, and what OpenAI has and we do not."""

from __future__ import annotations

import pytest

from config.front import make_application
from openai_api.consumers import NOT_SERVED
from openai_api.health import VERSION
from tests.api.conftest import Served, serving
from tests.factories import make_deployment

pytestmark = pytest.mark.django_db(transaction=True)


def test_health_is_a_status_without_a_body_or_a_key(served: Served) -> None:
    answer = served.request("GET", "/health", key=None)
    assert (answer.status, answer.body) == (200, b"")
    by_address = served.raw(b"GET /health HTTP/1.1\r\nHost: 10.0.0.1\r\n\r\n")
    assert by_address.status == 200
    assert served.request("POST", "/health", b"{}").status == 405


def test_health_says_when_no_worker_can_answer(transactional_db: None) -> None:
    make_deployment(route="asleep")
    with serving(make_application()) as port:
        answer = Served(port, "").request("GET", "/health", key=None)
    assert (answer.status, answer.body) == (503, b"")


def test_the_version(served: Served) -> None:
    answer = served.request("GET", "/version", key=None)
    assert (answer.status, answer.json()) == (200, {"version": VERSION})


@pytest.mark.parametrize("name", sorted(NOT_SERVED))
def test_what_openai_has_and_we_do_not_is_said_plainly(served: Served, name: str) -> None:
    for method, path in (("POST", f"/v1/{name}"), ("GET", f"/v1/{name}/one")):
        answer = served.request(method, path, b"{}" if method == "POST" else None)
        error = answer.error()
        assert (answer.status, error["type"]) == (404, "invalid_request_error")
        assert error["message"] == f"Roundhouse does not serve {NOT_SERVED[name]} ({method} {path})."


def test_what_nobody_has_is_another_sentence(served: Served) -> None:
    for path in ("/v1/nothing", "/v1/filesystem", "/api/v1/nothing", "/v2/files"):
        assert served.request("GET", path).error()["message"] == f"Invalid URL (GET {path})"
