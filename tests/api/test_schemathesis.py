"""schemathesis on our own document: whatever it makes of it, valid or not, is answered as described."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model

from openai_api.described import EMBEDDER, MODEL
from openai_api.document import document
from registry.actions.projects import set_role
from tests.api.conftest import ROUTE, Served
from tests.api.test_openapi import ask, examples_served, session_of, vectors  # noqa: F401 - fixtures
from tests.factories import make_api_key, make_project

pytestmark = pytest.mark.django_db(transaction=True)

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "use_after_free",
    "ignored_auth",
)
"""All but three. positive_data_acceptance: what goes together, and what a model's engine honours, no schema
says; it is refused with a 400 that names the field. ensure_resource_availability: an object that was told not
to be stored is not there. object_level_authorization: needs two users and an API of its own; other projects'
responses are tests/api/test_responses.py's."""

REJECTED = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 413, 415, 429, "5xx"]
"""
"""A list longer than its bound may already be a body larger than any may be: that is 413."""
KEYS = ("good", "of another model", "wrong")
SESSION = "a session"
_NO_CHAT = r"--include-path-regex=^/(v1/(embeddings|models|organization|responses/)|[a-z]+$)"
QUICK = {
    # Every field with every wrong kind of value, every bound, every method that there is not: of chat alone
    # that is 1,100 requests, so bodies of messages are the long run's.
    "good": ("--phases=coverage", _NO_CHAT),
    # These are refused before anything of the body is used: what is well-formed shows it.
    "of another model": ("--phases=coverage", "--mode=positive", _NO_CHAT),
    "wrong": ("--phases=coverage", "--mode=positive", _NO_CHAT),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of requests, each with its line: pytest would keep them all."""
    logger = logging.getLogger("roundhouse")
    before, logger.level = logger.level, logging.WARNING
    yield
    logger.level = before


@pytest.mark.parametrize("kind", KEYS)
def test_what_covers_the_document_is_answered_as_described(
    examples_served: Served,  # noqa: F811
    tmp_path: Path,
    kind: str,
) -> None:
    # Long lists and texts take long to make and to send; their bounds have tests of their own.
    run(examples_served, kind, narrowed(examples_served, most=32), tmp_path, *QUICK[kind])


def test_a_few_random_requests_are_answered_as_described(
    examples_served: Served,  # noqa: F811
    tmp_path: Path,
) -> None:
    narrow = narrowed(examples_served, most=32)
    run(
        examples_served,
        "good",
        narrow,
        tmp_path,
        "--phases=fuzzing",
        "--max-examples=2",
        "--exclude-deprecated",
    )


def test_keys_are_managed_as_described(examples_served: Served, tmp_path: Path) -> None:  # noqa: F811
    _manage_keys(examples_served, tmp_path, 32, "--phases=coverage")


@pytest.mark.full
@pytest.mark.timeout(900)
def test_keys_are_managed_as_described_whatever_is_sent(
    examples_served: Served,  # noqa: F811
    tmp_path: Path,
) -> None:
    _manage_keys(examples_served, tmp_path, None, "--phases=coverage,fuzzing", "--max-examples=30")


def _manage_keys(served: Served, folder: Path, most: int | None, *options: str) -> None:
    api = narrowed(served, most=most)
    # schemathesis would take a cookie that is given as a header for one that is missing.
    api["security"] = []
    for item in api["paths"].values():
        for operation in item.values():
            operation.pop("security", None)
    run(served, SESSION, api, folder, *options, "--include-path-regex=^/api/v1/(keys|projects)")


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KEYS)
def test_many_random_requests_are_answered_as_described(
    examples_served: Served,  # noqa: F811
    tmp_path: Path,
    kind: str,
) -> None:
    narrow = narrowed(examples_served, most=None if kind == "good" else 32)
    run(examples_served, kind, narrow, tmp_path, "--phases=coverage,fuzzing", "--max-examples=30")


def narrowed(served: Served, *, most: int | None = None) -> dict[str, Any]:
    """The document, with the models and the one response that there are: what is made of any names at all
    would learn nothing but that they are not there. Bounds above `most` are left out."""
    kept = ask(served, "/v1/responses", "post").json()["id"]
    api: dict[str, Any] = json.loads(json.dumps(document()))
    for name, schema in api["components"]["schemas"].items():
        if name.endswith("Request") or name == "TokenCheck":
            schema["properties"]["model"] = {"enum": [_model_of(name)]}
    for path, item in api["paths"].items():
        for method, operation in item.items():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "model":
                    parameter["schema"] = {"enum": [_model_of(path)]}
                elif parameter["name"] == "key_id":
                    parameter["schema"] = {"enum": _keys_of_ann()}
                # One that is deleted is gone for the others: that one may be any.
                elif parameter["name"] == "response_id" and method != "delete":
                    parameter["schema"] = {"enum": [kept]}
    project = make_project(name="research").pk
    api["components"]["schemas"]["NewKeyRequest"]["properties"]["project"] = {"enum": [project]}
    if most is not None:
        _unbound(api, most)
    return api


def _ann() -> Any:
    """Who has a key in the project."""
    user, _ = get_user_model().objects.get_or_create(username="ann")
    set_role(project=make_project(name="research"), user=user, role="member", by="test")
    return user


def _keys_of_ann() -> list[str]:
    """Several: one that is revoked ends for good."""
    keys = [make_api_key(owner=_ann(), project=make_project(name="research"))[0] for _ in range(3)]
    return [key.public_id for key in keys]


def _model_of(text: str) -> str:
    embeds = ("embed", "rerank", "score")
    return EMBEDDER if any(word in text.lower() for word in embeds) else MODEL


def _unbound(value: Any, most: int) -> None:
    if isinstance(value, dict):
        for name in ("maxItems", "maxLength"):
            if isinstance(value.get(name), int) and value[name] > most:
                del value[name]
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _unbound(one, most)


def run(served: Served, kind: str, api: dict[str, Any], folder: Path, *options: str) -> None:
    """schemathesis, with one kind of key."""
    if kind == "good":
        key = served.api_key
    elif kind == "wrong":
        key = served.api_key[:-4] + "AAAA"
    else:
        key = make_api_key(name="another", routes=[ROUTE], project=make_project(name="another"))[1]
    credentials = session_of(_ann()) if kind == SESSION else [f"Authorization: Bearer {key}"]
    path = folder / "openapi.json"
    path.write_text(json.dumps(api))
    (folder / "schemathesis.toml").write_text(REJECTED)
    # A wrong key opens nothing, so nothing can be said of leaving it out.
    checks = [one for one in CHECKS if kind != "wrong" or one != "ignored_auth"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", str(path)),
            f"--url=http://127.0.0.1:{served.port}",
            *(f"--header={one}" for one in credentials),
            f"--checks={','.join(checks)}",
            *("--seed=4", "--continue-on-failure", "--no-color", "--warnings=off"),
            "--generation-database=none",
            *options,
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"with a key that is {kind}:\n{done.stdout}"
    assert " passed" in done.stdout, done.stdout
