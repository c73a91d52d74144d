"""S12: a text that somebody wrote stays that text: nothing of the environment or of a file is put in it."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from django.contrib.auth import get_user_model
from django.db import models
from django.test import Client
from django.urls import reverse

from inference.engines.vllm.arguments import read_arguments
from inference.engines.vllm.command import command
from inference.fleet import assignment_of
from inference.worker.engine_process import engine_environment
from registry.models import LanguageModel, Worker
from tests.api.conftest import ROUTE, Served
from tests.api.scripted import Scripted, in_front_of, scripted
from tests.factories import make_deployment, make_language_model, make_node, make_worker
from tests.integration.test_admin import make_one_of_each
from tests.integration.test_commands import run

pytestmark = pytest.mark.django_db(transaction=True)

ROOT = Path(__file__).resolve().parents[2]
OURS = ("platform", "registry", "inference", "openai_api", "webchat")
NAME = "S12_CANARY"
CANARY = "canary-5ee1-of-the-environment"
IN_FILE = "canary-77d0-of-a-file"
FORMS = (
    "${NAME}",
    "$NAME",
    "%NAME%",
    "%(NAME)s",
    "os.environ/NAME",
    "env:NAME",
    "{{ env.NAME }}",
    "{NAME}",
    "!ENV ${NAME}",
    "$(cat FILE)",
    "oidc/file/FILE",
    "oidc/env/NAME",
    "file://FILE",
    "@FILE",
    "~/FILE",
    "!include FILE",
)
"""As LiteLLM, LibreChat, shells, compose files, YAML and Python write what is to be looked up."""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each form, with a variable and a file behind it that are there."""
    monkeypatch.setenv(NAME, CANARY)
    monkeypatch.setenv("HOME", "/")
    file = tmp_path / "f"
    file.write_text(IN_FILE)
    return [form.replace("NAME", NAME).replace("FILE", str(file)) for form in FORMS]


def gives_nothing_away(*texts: str | bytes) -> None:
    for text in texts:
        shown = text.decode(errors="replace") if isinstance(text, bytes) else text
        assert CANARY not in shown
        assert IN_FILE not in shown


# -- what clients write


@pytest.fixture
def asked() -> Iterator[tuple[Served, Scripted]]:
    with scripted() as worker:
        worker.answer = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        with in_front_of(worker, "tools", "json", worker_id=512) as served:
            yield served, worker


def request_with(text: str) -> dict[str, Any]:
    return {
        "model": ROUTE,
        "messages": [
            {"role": "system", "content": text},
            {"role": "user", "content": [{"type": "text", "text": text}]},
            {"role": "user", "content": text},
        ],
        "stop": [text],
        "user": text,
        "metadata": {"k": text},
        "prompt_cache_key": text,
        "safety_identifier": text,
    }


def test_texts_of_a_request_reach_the_worker_as_they_are(
    asked: tuple[Served, Scripted], written: list[str]
) -> None:
    served, worker = asked
    for text in written:
        body = request_with(text)
        answer = served.chat(body)
        assert answer.status == 200, answer.body
        gives_nothing_away(answer.body, json.dumps(worker.asked[-1][1]))
        passed_on = worker.asked[-1][1]
        assert passed_on["messages"][0]["content"] == text
        assert passed_on["messages"][-1]["content"] == text
        assert passed_on["stop"] in (text, [text])
        refused = served.chat(body | {"model": text[:100]}, f"X-Request-Id: {text[:60]}")
        assert refused.status in (400, 403, 404)
        gives_nothing_away(refused.body, str(refused.headers))


# -- what operators write


def filled(obj: models.Model, text: str) -> list[str]:
    """Put the text into each field of the row that a person could have written, past every check; the
    fields that took it."""
    values: dict[str, Any] = {}
    for field in obj._meta.concrete_fields:
        if field.choices or field.primary_key or field.is_relation:
            continue
        if isinstance(field, models.JSONField):
            values[field.name] = {text: text} if isinstance(getattr(obj, field.name), dict) else [text]
        elif isinstance(field, models.CharField | models.TextField) and (
            field.max_length is None or field.max_length >= len(text)
        ):
            values[field.name] = text
    type(obj)._default_manager.filter(pk=obj.pk).update(**values)
    return sorted(values)


CLOSED = frozenset({"usageevent", "event"})
"""The ledger and the timeline take no change."""


@pytest.mark.parametrize(
    "form",
    [0, *(pytest.param(number, marks=pytest.mark.full) for number in range(1, len(FORMS)))],
    ids=FORMS,
)
def test_a_row_that_holds_such_a_text_shows_it_and_nothing_else(written: list[str], form: int) -> None:
    text = written[form]
    client = Client(headers={"host": "localhost:8000"})
    client.force_login(get_user_model().objects.create_superuser("olga", password="x"))
    rows = {model: obj for model, obj in make_one_of_each().items() if model._meta.model_name not in CLOSED}
    took = {model._meta.model_name: filled(obj, text) for model, obj in rows.items()}
    assert {"name", "source", "chat_template"} <= set(took["languagemodel"])
    assert {"arguments", "environment", "node_labels"} <= set(took["deployment"])
    for model, obj in rows.items():
        name = f"admin:registry_{model._meta.model_name}"
        gives_nothing_away(client.get(reverse(f"{name}_changelist")).content)
        page = client.get(reverse(f"{name}_change", args=[obj.pk]))
        assert page.status_code == 200, model
        gives_nothing_away(page.content)
    for path in ("/usage/", "/keys/", "/admin/", "/chat/", "/api/v1/keys", "/v1/models"):
        gives_nothing_away(client.get(path, follow=True).content)
    model = LanguageModel.objects.get(pk=rows[LanguageModel].pk)
    assert model.source == text
    for arguments in (("model", "list", "--json"), ("model", "show", model.name), ("status", "--json")):
        gives_nothing_away(run(*arguments))


@pytest.mark.parametrize("form", range(len(FORMS)), ids=FORMS)
def test_a_worker_is_started_with_the_text_that_was_written(written: list[str], form: int) -> None:
    text = written[form]
    language_model = make_language_model(source=f"/{text}", chat_template=text)
    deployment = make_deployment(
        name=f"of-{form}",
        language_model=language_model,
        arguments={"text": text},
        environment={"VALUE": text},
    )
    worker = Worker.objects.select_related("revision__language_model", "deployment", "node").get(
        pk=make_worker(deployment=deployment, node=make_node()).pk
    )
    order = assignment_of(worker)
    gives_nothing_away(msgspec.json.encode(order))
    assert order.arguments["text"] == text
    assert order.model.source == f"/{text}"
    assert order.model.chat_template == text
    environment = engine_environment({"PATH": "/bin"}, order.environment, "secret")
    assert environment["VALUE"] == text
    gives_nothing_away(json.dumps(environment))
    line = command(
        read_arguments({}),
        python="/python",
        model_path=order.model.source,
        served_name=text,
        slots=4,
        chat_template=None,
        host="127.0.0.1",
        port=9000,
    )
    assert f"--model=/{text}" in line
    gives_nothing_away(*line)


# -- the code


FUNCTIONS = frozenset({"expandvars", "safe_substitute", "load_dotenv", "dotenv_values"})
PARSERS = frozenset({"ConfigParser", "RawConfigParser", "ExtendedInterpolation"})


def lookups_of(source: str) -> list[int]:
    """Lines where a variable of the environment is looked up by a name that is not written there (or is no
    constant of the module), or where a text is filled in from elsewhere."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            if ast.unparse(node.value) == "os.environ" and not _is_constant(node.slice):
                found.add(node.lineno)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            looks = called in ("os.environ.get", "os.getenv", "os.environ.pop", "os.environb.get")
            if (looks and not _is_constant(node.args[0])) or called.rpartition(".")[2] in FUNCTIONS | PARSERS:
                found.add(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module in ("configparser", "string"):
            fills_in = {alias.name for alias in node.names} & (PARSERS | {"Template", "Formatter"})
            found |= {node.lineno} if fills_in else set()
    return sorted(found)


KNOWN = frozenset({("inference/engines/transformers/grammar.py", "_PASSED_ON")})
"""Files that look up each name of a constant list, and that list."""


def _is_constant(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id.isupper())


def test_the_lint_finds_lookups() -> None:
    faulty = (
        *("os.environ[x]", "os.environ.get(x)", "os.getenv('a' + x)", "os.path.expandvars(x)"),
        *("from string import Template", "configparser.ConfigParser()"),
    )
    assert lookups_of("\n".join(faulty)) == [1, 2, 3, 4, 5, 6]
    assert lookups_of("os.environ['A']\nos.getenv(NAME)\nos.environ['A'] = x") == []


def test_nothing_of_ours_looks_up_what_a_text_names() -> None:
    files = [file for name in OURS for file in (ROOT / name).rglob("*.py")]
    assert len(files) > 300
    found = {str(file.relative_to(ROOT)): lookups_of(file.read_text()) for file in files}
    for name, names in KNOWN:
        (line,) = found.pop(name)
        assert f"for name in {names}" in (ROOT / name).read_text().splitlines()[line - 1]
    assert {name: lines for name, lines in found.items() if lines} == {}
