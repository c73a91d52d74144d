"""Everything that is no generation: models, probes, pages, headers."""

from __future__ import annotations

import pytest

from config.front import make_application
from registry.models import LanguageModel
from tests.api.conftest import ROUTE, Served, serving

pytestmark = pytest.mark.django_db(transaction=True)


async def test_models_are_listed_for_the_official_client(served: Served) -> None:
    async with served.client() as client:
        models = [model async for model in client.models.list()]
        assert [(model.id, model.object, model.owned_by) for model in models] == [
            (ROUTE, "model", "roundhouse")
        ]
        assert models[0].created > 1_700_000_000
        one = await client.models.retrieve(ROUTE)
        assert one.id == ROUTE


def test_models_tell_their_context_length(served: Served) -> None:
    LanguageModel.objects.update(context_length=4096)
    assert served.request("GET", "/v1/models").json()["data"][0]["max_model_len"] == 4096


def test_an_id_with_a_slash_is_found_plain_and_quoted(served: Served) -> None:
    for path in ("/v1/models/org/sim", "/v1/models/org%2Fsim"):
        answer = served.request("GET", path)
        assert (answer.status, answer.json()["id"]) == (200, ROUTE)
    missing = served.request("GET", "/v1/models/org/none")
    assert missing.status == 404
    assert (missing.error()["code"], missing.error()["param"]) == ("model_not_found", "model")


def test_models_need_a_key_and_ignore_what_is_accepted(served: Served) -> None:
    answer = served.request("GET", "/v1/models", key=None)
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.error()["code"] is None
    wrong = served.request("GET", "/v1/models", key="sk-wrong")
    assert wrong.error()["code"] == "invalid_api_key"
    html = served.request("GET", "/v1/models", None, "Accept: text/html")
    assert html.status == 200
    assert html.headers["content-type"] == "application/json"


def test_probes_say_whether_the_gateway_lives_and_is_ready(served: Served) -> None:
    assert served.request("GET", "/healthz", key=None).status == 200
    assert served.request("GET", "/readyz", key=None).status == 200


def test_pages_carry_a_strict_policy_and_a_request_id(served: Served) -> None:
    page = served.request("GET", "/admin/login/", key=None)
    assert page.status == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-request-id"].startswith("req_")
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["x-frame-options"] == "DENY"
    nowhere = served.request("GET", "/no/such/page", key=None)
    assert nowhere.status == 404
    assert nowhere.headers["x-request-id"]


def test_cors_is_closed_by_default(served: Served) -> None:
    answer = served.request("GET", "/v1/models", None, "Origin: https://app.example")
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_cors_is_open_for_the_origins_that_are_set(facts: str) -> None:
    front = make_application(cors_origins=["https://app.example"])
    with serving(front) as port:
        served = Served(port, facts, front)
        asked = (
            "Origin: https://app.example",
            "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: authorization,content-type,x-stainless-os",
        )
        before = served.request("OPTIONS", "/v1/chat/completions", None, *asked, key=None)
        assert before.status == 204
        assert before.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-stainless-os" in before.headers["access-control-allow-headers"]
        refused = served.request("GET", "/v1/models", None, "Origin: https://app.example", key=None)
        assert refused.status == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        other = served.request("GET", "/v1/models", None, "Origin: https://evil.example")
        assert "access-control-allow-origin" not in other.headers


def test_an_upgrade_to_a_websocket_is_refused(served_by_both: Served) -> None:
    answer = served_by_both.request(
        "GET",
        "/chat/",
        None,
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        key=None,
    )
    assert answer.status in (403, 404)
