"""The OpenAPI document and its page: valid, complete, and true."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from django.contrib.auth import get_user_model
from django.contrib.staticfiles import finders
from django.test import Client
from django.urls import URLPattern
from openapi_spec_validator import OpenAPIV31SpecValidator

from config.front import Front, make_application
from openai_api import answers, management
from openai_api.described import EMBEDDER, KEPT, KEY, MODEL
from openai_api.document import document
from openai_api.endpoints import ENDPOINTS
from openai_api.protocol.sampled import OWNED
from openai_api.urls import urlpatterns
from registry.actions.events import publish_change
from registry.actions.projects import set_role
from registry.rights import Role
from tests.api.conftest import CAPABILITIES, ROUTE, WORKER_ID, Answer, Served, Worker, serving
from tests.api.embedder import CAPABILITIES as EMBEDDERS
from tests.api.embedder import embedder
from tests.factories import make_api_key, make_deployment, make_language_model, make_project, make_worker

pytestmark = pytest.mark.django_db(transaction=True)

OPERATIONS = [(path, method) for path, item in document()["paths"].items() for method in item]
"""All of them."""
NOT_DESCRIBED = {"fleet", "chat"}
"""First words of URLs that are no public API: workers' and the chat page's own."""

_NAMES = """
    add_generation_prompt add_special_tokens after allowed_token_ids api_key_ids audio background
    bad_words batch best_of bucket_width chat_template chat_template_kwargs continue_final_message
    conversation data_1 data_2 dimensions documents echo embed_dtype encoding_format end_time endianness
    frequency_penalty function_call functions group_by guided_choice guided_grammar guided_json
    guided_regex ignore_eos include include_reasoning include_stop_str_in_output input instruction
    instructions items length_penalty limit logit_bias logprob_token_ids logprobs max_chunks_per_doc
    max_completion_tokens max_output_tokens max_tokens max_tokens_per_doc max_tool_calls mcp_servers
    messages metadata min_p min_tokens modalities model models n normalize order output_config page
    parallel_tool_calls presence_penalty previous_response_id project_ids prompt prompt_cache_key
    prompt_logprobs prompts queries query rank_fields reasoning reasoning_effort repetition_detection
    repetition_penalty response_format response_id return_documents return_prompt_text return_token_ids
    return_token_strs return_tokens_as_token_ids safety_identifier seed skip_special_tokens
    spaces_between_special_tokens start_time stop stop_sequences stop_token_ids store stream
    stream_options structured_outputs suffix system temperature text text_1 text_2 thinking
    thinking_token_budget tokens tool_choice tools top_k top_logprobs top_n top_p truncate_prompt_tokens
    truncation_side use_activation use_beam_search user user_ids verbosity web_search_options
"""
PARAMETERS = set(_NAMES.split())
"""S2: all that a client may say, by name. A new one is added by hand, once it is sure that it decides nothing
of ours."""
_OF_KEYS = """
    addresses after expires_at key_id limit metadata name overlap_seconds priority project reason routes
    scopes
"""
OF_SESSIONS = set(_OF_KEYS.split())
"""All that a person who is logged in may say of keys."""


def told(path: str, method: str) -> dict[str, Any]:
    operation: dict[str, Any] = document()["paths"][path][method]
    return operation


def is_public(operation: dict[str, Any]) -> bool:
    return {} in operation.get("security", ())


def is_by_session(operation: dict[str, Any]) -> bool:
    return any("session" in one for one in operation.get("security", ()))


def answered(path: str, method: str, kind: str = "application/json") -> dict[str, Any] | None:
    responses = told(path, method)["responses"]
    content = responses.get("201", responses.get("200", {})).get("content", {})
    found: dict[str, Any] | None = content.get(kind)
    return found


def named(reference: dict[str, Any]) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def fetched(served: Served) -> dict[str, Any]:
    answer = served.request("GET", "/v1/openapi.json", key=None)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    found: dict[str, Any] = answer.json()
    return found


@pytest.fixture(scope="module")
def vectors() -> Iterator[str]:
    with embedder() as url:
        yield url


@pytest.fixture
def examples_served(vectors: str, transactional_db: None, worker: Worker) -> Iterator[Served]:
    """A gateway that has the models of the examples."""
    generating, embedding = (
        make_deployment(route=route, language_model=make_language_model(context_length=8192))
        for route in (MODEL, EMBEDDER)
    )
    make_worker(deployment=generating, id=WORKER_ID, url=worker.url, capabilities=CAPABILITIES)
    make_worker(deployment=embedding, id=7401, url=vectors, capabilities=EMBEDDERS)
    publish_change("route", "*")
    front = make_application()
    with serving(front) as port:
        yield Served(port, make_api_key(name="tests")[1], front)


def test_it_is_served_without_a_key_and_is_valid(served: Served) -> None:
    api = fetched(served)
    assert api["openapi"] == "3.1.0"
    OpenAPIV31SpecValidator(api).validate()
    assert api == json.loads(json.dumps(document()))
    ids = [told(path, method)["operationId"] for path, method in OPERATIONS]
    assert len(ids) == len(set(ids))


def test_it_has_every_path_that_is_routed() -> None:
    front: Front = make_application()
    described = {re.sub(r"\{\w+\}", "X", path) for path in document()["paths"]}
    routes = [("", route) for route in (*front._http.routes, *urlpatterns)]
    routes += [("api/v1/", route) for route in management.urlpatterns]
    seen = set()
    for prefix, route in routes:
        assert isinstance(route, URLPattern)
        text = prefix + re.sub(r"<\w+:\w+>|\(\?P<\w+>.*?\}\)", "X", str(route.pattern))
        path = "/" + text.removeprefix("^").removesuffix(r"\Z")
        if (
            path.startswith(("/v1/models(", "/(v1|", "/api/v1/(projects"))
            or path == "/"
            or path.split("/")[1] in NOT_DESCRIBED
        ):
            # Django's own routing, which its `urlpatterns` tell; what is under no path.
            continue
        assert path in described, path
        seen.add(path)
    assert seen == described


def test_only_what_is_meant_for_clients_is_a_parameter() -> None:
    api = document()
    of_keys: set[str] = set()
    of_sessions: set[str] = set()
    for path, method in OPERATIONS:
        operation = told(path, method)
        names = of_sessions if is_by_session(operation) else of_keys
        names |= {one["name"] for one in operation.get("parameters", ())}
        if "requestBody" in operation:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            names |= set(
                schema.get("properties") or api["components"]["schemas"][named(schema)]["properties"]
            )
    assert of_keys == PARAMETERS
    assert of_sessions == OF_SESSIONS
    assert not of_keys & OWNED


def test_every_operation_is_served_and_asks_for_a_key(served: Served) -> None:
    for path, method in OPERATIONS:
        operation = told(path, method)
        url = path.replace("{model}", ROUTE).replace("{response_id}", KEPT).replace("{key_id}", KEY)
        body = b"{}" if method in ("post", "patch") else None
        answer = served.request(method.upper(), url, body)
        assert str(answer.status) in operation["responses"], (path, answer.body)
        assert b"Invalid URL" not in answer.body
        assert not is_by_session(operation) or answer.status == 401, "a key opens no management of keys"
        refused = served.request(method.upper(), url, body, key=None)
        assert refused.status == (200 if is_public(operation) else 401), path


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_the_examples_of_answers_have_the_shape_that_is_described(path: str, method: str) -> None:
    content = answered(path, method)
    if content is None or "example" not in content:
        return
    kind = getattr(answers, named(content["schema"]))
    # As it comes: an instant is a text.
    msgspec.json.decode(json.dumps(content["example"]), type=kind, strict=True)


def test_the_examples_of_requests_are_answered_as_the_examples_say(examples_served: Served) -> None:
    kept = ask(examples_served, "/v1/responses", "post").json()["id"]
    compared = 0
    for path, method in OPERATIONS:
        example = (answered(path, method) or {}).get("example")
        if example is None:
            continue
        # Last, and then it is gone.
        if method == "delete":
            continue
        answer = ask(examples_served, path, method, kept)
        assert answer.status == (201 if "201" in told(path, method)["responses"] else 200), (
            path,
            answer.body,
        )
        told_now = answer.json()
        if "/organization/" in path:
            told_now["data"] = [one for one in told_now["data"] if one["results"]]
            assert told_now["data"]
        assert shape(told_now) == shape(example), path
        compared += 1
    deleted = ask(examples_served, "/v1/responses/{response_id}", "delete", kept)
    assert deleted.json().keys() == answered("/v1/responses/{response_id}", "delete")["example"].keys()  # type: ignore[index]
    assert compared > 27


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_the_examples_of_streams_are_what_is_streamed(examples_served: Served, path: str) -> None:
    content = answered(path, "post", "text/event-stream")
    assert content is not None
    answer = ask(examples_served, path, "post", stream=True)
    # What is told once for all tokens, and once for each.
    real, shown = events_of(unchunked(answer.body)), events_of(content["x-example"])
    assert [*dict.fromkeys(real)] == [*dict.fromkeys(shown)]
    data = content["schema"]["properties"]["data"]
    kind = getattr(answers, named((data["anyOf"][0] if "anyOf" in data else data)["contentSchema"]))
    for event in re.findall(r"^data: (\{.*)$", content["x-example"] + unchunked(answer.body), re.MULTILINE):
        msgspec.json.decode(event, type=kind)


def ask(served: Served, path: str, method: str, kept: str = KEPT, **more: Any) -> Answer:
    """Send the example of an operation."""
    operation = told(path, method)
    if is_by_session(operation):
        return ask_as_member(served, path, method)
    body = None
    if "requestBody" in operation:
        body = json.dumps(operation["requestBody"]["content"]["application/json"]["example"] | more).encode()
    model = EMBEDDER if "embeddings" in path else MODEL
    url = path.replace("{model}", model).replace("{response_id}", kept)
    if "/organization/" in path:
        url += f"?start_time={int(time.time()) - 3600}&limit=31"
    return served.request(method.upper(), url, body)


def session_of(user: Any) -> list[str]:
    """The headers that a browser would send."""
    client = Client()
    client.force_login(user)
    token = "t" * 32
    cookies = f"sessionid={client.cookies['sessionid'].value}; csrftoken={token}"
    return [f"Cookie: {cookies}", f"X-CSRFToken: {token}"]


def ask_as_member(served: Served, path: str, method: str) -> Answer:
    """The same of a person who has a key as the example says."""
    user, _ = get_user_model().objects.get_or_create(username="ann")
    project = make_project(name="research")
    set_role(project=project, user=user, role=Role.MEMBER, by="test")
    cidrs, scopes = ["10.0.0.0/8"], ["chat"]
    key, _ = make_api_key(name="nightly build", owner=user, project=project, cidrs=cidrs, scopes=scopes)
    body = None
    if "requestBody" in (operation := told(path, method)):
        example = operation["requestBody"]["content"]["application/json"]["example"]
        body = json.dumps(example | ({"project": project.pk} if "project" in example else {})).encode()
    url = path.replace("{key_id}", key.public_id)
    return served.request(method.upper(), url, body, *session_of(user), key=None)


@pytest.mark.parametrize("kind", ["of another model", "wrong"])
def test_every_operation_refuses_other_keys_as_described(examples_served: Served, kind: str) -> None:
    key = examples_served.api_key[:-4] + "AAAA"
    if kind != "wrong":
        key = make_api_key(name="another", routes=[ROUTE], project=make_project(name="another"))[1]
    kept = ask(examples_served, "/v1/responses", "post").json()["id"]
    examples_served.api_key = key
    for path, method in OPERATIONS:
        operation = told(path, method)
        answer = ask(examples_served, path, method, kept)
        if is_by_session(operation):
            assert answer.status in (200, 201), "keys are not looked at"
        elif is_public(operation):
            assert answer.status == 200, path
        elif kind == "wrong":
            assert answer.status == 401, path
        elif "requestBody" in operation:
            assert answer.status == 403, path
        else:
            # Another project's response, a model that it may not use; the lists are short.
            assert answer.status == (200 if path == "/v1/models" or "/organization/" in path else 404), path
        if answer.status >= 400:
            name = named(operation["responses"][str(answer.status)])
            content = document()["components"]["responses"][name]["content"]["application/json"]
            msgspec.json.decode(answer.body, type=getattr(answers, named(content["schema"])))


def shape(value: Any) -> Any:
    """Keys and kinds; of a list the first item's, for how many there are depends on the model."""
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return type(value).__name__


def unchunked(body: bytes) -> str:
    return re.sub(rb"(?:\A|\r\n)[0-9a-f]+\r\n", b"", body).decode()


def events_of(text: str) -> list[str]:
    """Each event with the shape of its data."""
    found = []
    for event in text.strip().split("\n\n"):
        lines = event.strip().split("\n")
        data = lines[-1].removeprefix("data: ")
        found.append(repr((lines[:-1], data if data == "[DONE]" else sorted(json.loads(data)))))
    return found


def test_every_field_of_a_request_is_explained() -> None:
    for endpoint in ENDPOINTS:
        schema = document()["components"]["schemas"][endpoint.request.__name__]
        for name, field in schema["properties"].items():
            assert field.get("description"), (endpoint.path, name)
        content = told(endpoint.path, "post")["requestBody"]["content"]["application/json"]
        assert endpoint.parse(json.dumps(content["example"]).encode()).needs() == frozenset()
        for name in schema["required"]:
            assert name in content["example"]
    for kind in (management.NewKeyRequest, management.KeyChangeRequest, management.KeyRotationRequest):
        for name, field in document()["components"]["schemas"][kind.__name__]["properties"].items():
            assert field.get("description"), (kind, name)


def test_errors_have_the_shape_that_is_described(served: Served) -> None:
    for path in ("/v1/models", "/v1/messages"):
        method = "post" if path == "/v1/messages" else "get"
        name = named(told(path, method)["responses"]["401"])
        content = document()["components"]["responses"][name]["content"]["application/json"]
        kind = getattr(answers, named(content["schema"]))
        msgspec.convert(content["example"], kind, strict=True)
        body = b"{}" if method == "post" else None
        msgspec.json.decode(served.request(method.upper(), path, body, key=None).body, type=kind)


def test_the_page_shows_every_operation_and_loads_nothing_from_elsewhere(served: Served) -> None:
    answer = served.request("GET", "/docs/", key=None)
    page = answer.body.decode()
    assert answer.status == 200
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    for path, method in OPERATIONS:
        assert f"{method.upper()}</b> <code>{path}</code>" in page
    for name in document()["components"]["schemas"]:
        assert f'id="type-{name}"' in page
    assert "<script" not in page
    assert "style=" not in page
    linked = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert linked
    assert all(url.startswith(("#", "/", "data:,")) for url in linked)
    ids = set(re.findall(r'id="([^"]+)"', page))
    assert {url[1:] for url in linked if url.startswith("#")} <= ids
    (sheet,) = [url for url in linked if url.endswith(".css")]
    assert finders.find(sheet.removeprefix("/static/"))
