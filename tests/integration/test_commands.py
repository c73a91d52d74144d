"""The operator's commands against a database: what they change, what they print, what they refuse."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.core.management.base import CommandError
from django.utils import timezone

from config import doctor
from config.doctor import Finding
from config.links import trace
from config.management.commands.chat import Command as Chat
from config.printing import amount_of_bytes, table
from config.waiting import wait_until_ready
from inference.sources import parse_source
from inference.sources.prepare import prepare, slot_of
from registry.actions.api_keys import revoke_api_key, still_good
from registry.actions.nodes import move_node
from registry.models import ApiKey, Deployment, Event, LanguageModel, Route, UsageEvent
from registry.states import NodeState, WorkerState
from tests.engines.tiny_model import make_tiny_llama
from tests.factories import (
    make_api_key,
    make_deployment,
    make_language_model,
    make_node,
    make_project,
    make_worker,
)

pytestmark = pytest.mark.django_db

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run(*arguments: str, **options: Any) -> str:
    """What a command prints."""
    output = io.StringIO()
    call_command(*arguments, stdout=output, stderr=io.StringIO(), **options)
    return output.getvalue()


def refusal(*arguments: str) -> str:
    with pytest.raises(CommandError) as refused:
        run(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def cache(tmp_path: Path, settings: Any) -> Path:
    settings.ROUNDHOUSE_CACHE = tmp_path / "cache"
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


# -- printing


def test_a_table_keeps_to_lines_and_columns_whatever_is_in_it():
    text = table(["A", "LONGER"], [["x\ny\x1b[31m", None], ["", 7]])
    assert text.splitlines() == ["A         LONGER", "x y [31m  -", "-         7"]
    assert amount_of_bytes(999) == "999 B"
    assert amount_of_bytes(93_200_000) == "93.2 MB"


# -- model


def test_a_model_is_added_listed_shown_and_removed():
    run("model", "add", "tiny", "--source", f"hub:acme/tiny@{COMMIT}")
    assert LanguageModel.objects.get(name="tiny").source == f"hub:acme/tiny@{COMMIT}"
    assert "tiny" in run("model", "list")
    (listed,) = json.loads(run("model", "list", "--json"))
    assert listed["source"] == f"hub:acme/tiny@{COMMIT}"
    assert "added" in run("model", "show", "tiny")
    assert "Removed" in run("model", "remove", "tiny")
    assert not LanguageModel.objects.exists()
    assert Event.objects.filter(kind="languagemodel", what="deleted").exists()


def test_what_cannot_be_a_model_is_refused_in_one_sentence():
    make_language_model(name="there")
    assert "already" in refusal("model", "add", "there", "--source", "/nowhere")
    assert "git ls-remote" in refusal("model", "add", "new", "--source", "hub:acme/tiny@main")
    assert "absolute" in refusal("model", "add", "new", "--source", "models/tiny")
    assert "name" in refusal("model", "add", "bad name", "--source", "/nowhere")
    assert "no model" in refusal("model", "show", "missing")
    assert "cannot be read" in refusal(
        "model", "add", "new", "--source", "/nowhere", "--chat-template", "/nowhere/t.jinja"
    )


def test_a_folder_that_is_here_is_checked_at_once(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    assert "config.json" in refusal("model", "add", "new", "--source", str(tmp_path))
    assert not LanguageModel.objects.exists()


def test_a_folder_is_copied_into_the_cache_without_its_code(llama: Path, cache: Path, tmp_path: Path):
    original = tmp_path / "disk"
    original.mkdir()
    for file in llama.iterdir():
        (original / file.name).write_bytes(file.read_bytes())
    (original / "notes.txt").write_text("mine")
    (original / "run.sh").write_text("never")
    run("model", "add", "tiny", "--source", str(original), "--copy")
    copy = Path(LanguageModel.objects.get(name="tiny").source)
    assert copy == cache / "imported" / "tiny"
    originals = {file.name for file in llama.iterdir()}
    assert {file.name for file in copy.iterdir()} == originals | {".roundhouse.json"}
    assert "has its digest" in run("model", "verify", "tiny")
    run("model", "remove", "tiny")
    assert "exists already" in refusal("model", "add", "tiny", "--source", str(original), "--copy")


def test_a_model_in_use_is_not_removed():
    deployment = make_deployment()
    assert "deployment" in refusal("model", "remove", deployment.language_model.name)


def test_a_damaged_copy_is_found_and_its_files_go_with_the_model(
    llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    source = parse_source(f"hub:acme/tiny@{COMMIT}")
    slot = slot_of("tiny", source, cache)  # type: ignore[arg-type]

    def fetch(_: object, folder: Path, reporter: object) -> Path:
        folder.mkdir()
        for file in llama.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    monkeypatch.setattr("inference.sources.hub.fetch", fetch)
    make_language_model(name="tiny", source=str(source))
    assert "--repair" in refusal("model", "verify", "tiny")
    prepare("tiny", source, cache, lambda report: None)
    assert "whole" in run("model", "verify", "tiny")
    weights = slot.path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "model.safetensors" in refusal("model", "verify", "tiny")
    assert "whole" in run("model", "verify", "tiny", "--repair")
    assert weights.read_bytes() == content
    run("model", "remove", "tiny", "--files")
    assert not slot.path.exists()


# -- key


def test_a_key_is_printed_once_and_alone(client: Any):
    make_deployment(route="demo")
    text = run("key", "create", "ci", "--project", "web", "--expires", "30d", "--routes", "demo").strip()
    key = ApiKey.objects.get()
    assert text.startswith(f"sk-{key.public_id}-")
    assert text.endswith(key.last4)
    assert (key.project.name, key.routes) == ("web", ["demo"])
    assert key.expires_at is not None
    assert abs(key.expires_at - timezone.now() - timedelta(days=30)) < timedelta(minutes=1)
    listed = run("key", "list")
    assert "ci" in listed
    assert text not in listed


def test_keys_are_revoked_by_name_by_public_part_or_whole():
    (_, first), (second, _), (third, _) = (make_api_key(name=name) for name in ("a", "b", "c"))
    run("key", "revoke", first)
    run("key", "revoke", f"sk-{second.public_id}")
    run("key", "revoke", "c")
    assert not ApiKey.objects.usable(timezone.now()).exists()
    assert "revoked before" in run("key", "revoke", f"sk-{third.public_id}")
    assert "No key" in run("key", "list")
    assert len(json.loads(run("key", "list", "--all", "--json"))) == 3


def test_what_cannot_be_a_key_is_refused_in_one_sentence():
    make_api_key(name="twice")
    make_api_key(name="twice")
    assert "2 keys" in refusal("key", "revoke", "twice")
    assert "no such key" in refusal("key", "revoke", "sk-000000000000")
    assert "no route" in refusal("key", "create", "x", "--routes", "missing")
    assert "over already" in refusal("key", "create", "x", "--expires", "2020-01-01")
    for text in ("soon", "0d", "9d9", "2030-13-01", "0001-01-01"):
        assert "--expires" in refusal("key", "create", "x", "--expires", text)
    assert "characters" in refusal("key", "create", " ")
    assert ApiKey.objects.count() == 2


# -- deploy, scale


def test_a_model_is_deployed_under_a_route_of_its_name():
    make_language_model(name="tiny")
    said = run(
        "deploy", "tiny", "--model", "tiny", "--engine", "simulated", "--replicas", "2", "--slots", "4",
        "--argument", "tokens_per_second=50", "--argument", "dtype=float32",
        "--environment", "OMP_NUM_THREADS=8",
        "--label", "gpu=h100", "--policy", "lottery",
    )  # fmt: skip
    assert "2 replica(s) of tiny, revision 1, route tiny" in said
    deployment = Deployment.objects.get(name="tiny")
    assert deployment.arguments == {"tokens_per_second": 50, "dtype": "float32"}
    assert deployment.environment == {"OMP_NUM_THREADS": "8"}
    assert deployment.node_labels == {"gpu": "h100"}
    assert (deployment.slots, deployment.policy) == (4, "lottery")
    assert [route.name for route in deployment.routes.all()] == ["tiny"]


def test_a_second_deploy_changes_only_what_is_given():
    make_language_model(name="tiny")
    run("deploy", "tiny", "--model", "tiny", "--slots", "4", "--argument", "a=1", "--no-route")
    assert "revision 2" in run("deploy", "tiny", "--argument", "b=x", "--argument", "a=")
    deployment = Deployment.objects.get(name="tiny")
    assert (deployment.slots, deployment.arguments) == (4, {"b": "x"})
    assert not Route.objects.exists()
    assert "revision 2, route public" in run("deploy", "tiny", "--route", "public")
    assert Route.objects.get().name == "public"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "missing"], "no model"),
        ([], "--model"),
        (["--model", "tiny", "--replicas", "-1"], "replicas"),
        (["--model", "tiny", "--replicas", "1000"], "replicas"),
        (["--model", "tiny", "--slots", "0"], "slots"),
        (["--model", "tiny", "--argument", "dtype"], "NAME=VALUE"),
        (["--model", "tiny", "--environment", "1X=2"], "environment"),
        (["--model", "tiny", "--route", "bad route"], "name"),
    ],
)
def test_what_cannot_be_deployed_is_refused_and_leaves_nothing(arguments: list[str], says: str):
    make_language_model(name="tiny")
    assert says in refusal("deploy", "new", *arguments)
    assert not Deployment.objects.exists()
    assert not Route.objects.exists()


def test_a_number_that_is_no_json_stays_text():
    make_language_model(name="tiny")
    run("deploy", "tiny", "--model", "tiny", "--argument", "a=NaN", "--argument", "b=1e999")
    assert Deployment.objects.get().arguments == {"a": "NaN", "b": "1e999"}


def test_a_deployment_is_scaled():
    deployment = make_deployment(name="tiny")
    assert "1 → 3" in run("scale", "tiny", "3")
    deployment.refresh_from_db()
    assert deployment.replicas == 3
    assert "replicas" in refusal("scale", "tiny", "257")
    assert "replicas" in refusal("scale", "tiny", "--", "-1")
    assert "known: tiny" in refusal("scale", "missing", "1")


def test_waiting_ends_with_the_cause_when_it_fails():
    deployment = make_deployment(name="tiny")
    make_worker(deployment=deployment, state=WorkerState.FAILED, cause="bad_argument", state_reason="No x.")
    with pytest.raises(CommandError, match="bad argument"):
        wait_until_ready(deployment, 1, print, print)
    # A new wish is a new try: what failed before it does not count.
    assert "not ready after" in refusal("scale", "tiny", "1", "--wait", "0")
    run("scale", "tiny", "0", "--wait", "1")


# -- status


def test_status_shows_what_runs_and_what_to_do():
    make_worker(deployment=make_deployment(name="good", route="public"), node=make_node(name="box"))
    make_deployment(name="idle", replicas=0)
    failed = make_deployment(name="bad")
    make_worker(deployment=failed, state=WorkerState.FAILED, cause="unsafe_format", state_reason="A pickle.")
    UsageEvent.objects.create(
        request_id="r", started_at=timezone.now(), project_id=1, project_name="p", key_public_id="k",
        key_name="k", route="public", endpoint="/v1/chat/completions", status=200, outcome="ok",
        prompt_tokens=7, completion_tokens=3, gateway="g",
    )  # fmt: skip
    said = run("status")
    for text in ("box", "good-0 #1", "public", "Use a model with safetensors weights", "7 tokens in, 3 out"):
        assert text in said
    facts = json.loads(run("status", "--json"))
    assert {one["name"]: one["status"] for one in facts["deployments"]} == {
        "good": "ready", "idle": "stopped", "bad": "failed",
    }  # fmt: skip
    assert facts["usage_today"]["requests"] == 1


def test_status_of_nothing_says_how_to_begin():
    said = run("status")
    assert "manage.py up" in said
    assert "manage.py deploy" in said


# -- doctor


def by_name(findings: Any) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_doctor_says_what_is_wrong_and_what_to_do(cache: Path, settings: Any, tmp_path: Path):
    settings.ROUNDHOUSE_DATA = tmp_path
    settings.ROUNDHOUSE_REDIS_URL = "redis://127.0.0.1:9/0"
    settings.ROUNDHOUSE_PORT = 9
    tmp_path.chmod(0o755)
    node = make_node(name="far")
    move_node(node=node, to=NodeState.SUSPECT, reason="silent", by="test")
    failed = make_deployment(name="bad")
    make_worker(node=node, deployment=failed, state=WorkerState.FAILED, cause="checksum", state_reason="No.")
    output = io.StringIO()
    with pytest.raises(CommandError, match="checks failed"):
        call_command("doctor", stdout=output)
    said = output.getvalue()
    for text in ("chmod go=", "REDIS_URL", "nothing answers", "far: its agent is silent", "pinned digest"):
        assert text in said
    assert "✓ migrations" in said


def test_doctor_finds_another_program_at_the_port(settings: Any):
    import http.server
    import threading

    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.handle_request)
        # The probe of the port is one connection, the question another.
        second = threading.Thread(target=server.handle_request)
        thread.start()
        settings.ROUNDHOUSE_PORT = server.server_port
        second.start()
        found = doctor.check_gateway()
        thread.join()
        second.join()
    assert not found.well
    assert "another program" in found.said


def test_doctor_finds_a_clock_that_is_off(monkeypatch: pytest.MonkeyPatch):
    assert doctor.check_clock().well
    monkeypatch.setattr(doctor, "database_now", lambda: timezone.now() + timedelta(hours=1))
    assert "3600 s" in doctor.check_clock().said


def test_doctor_tells_a_missing_control(settings: Any, tmp_path: Path):
    settings.ROUNDHOUSE_DATA = tmp_path
    assert not doctor.check_control().well


def test_doctor_checks_the_files_that_are_here(llama: Path, tmp_path: Path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = make_language_model(name="tiny", source=str(folder))
    make_deployment(name="tiny", language_model=model, engine="transformers")
    assert by_name(doctor.check_model_files(hash_files=False))["files of tiny"].well
    (folder / "model.safetensors").write_bytes(b"cut")
    assert "damaged" in by_name(doctor.check_model_files(hash_files=False))["files of tiny"].said


def test_a_refused_key_is_explained():
    from config.links import _why_refused

    row, text = make_api_key(name="old")
    assert "does not prove it" in _why_refused(text)[0]
    revoke_api_key(api_key=row, by="test")
    assert "was revoked" in _why_refused(text)[0]
    expired, text = make_api_key(name="short", expires_at=timezone.now() - timedelta(hours=1))
    assert "expired" in _why_refused(text)[0]
    expired.delete()
    assert "not known" in _why_refused(text)[0]
    assert "form" in _why_refused("sk-nonsense")[0]


@pytest.mark.parametrize(
    ("build", "what", "says"),
    [
        (lambda: None, "route", "no route"),
        (lambda: make_deployment(name="m"), "route", "no route of that name"),
        (lambda: make_deployment(name="m", route="m", replicas=0), "deployment", "scaled to 0"),
        (lambda: Route.objects.create(name="m"), "route", "no deployment"),
        (lambda: Route.objects.create(name="m", enabled=False), "route", "disabled"),
        (lambda: make_deployment(name="m", route="m"), "nodes", "no machine has joined"),
        (
            lambda: make_worker(
                deployment=make_deployment(name="m", route="m"), state=WorkerState.FAILED, cause="disk"
            ),
            "control",
            "",
        ),
        (lambda: make_worker(deployment=make_deployment(name="m", route="m")), "worker", "busy"),
    ],
)
def test_the_broken_link_is_named(
    monkeypatch: pytest.MonkeyPatch,
    settings: Any,
    tmp_path: Path,
    build: Any,
    what: str,
    says: str,
):
    from config.asking import Unanswered

    settings.ROUNDHOUSE_DATA = tmp_path

    def refused(*_: Any, **__: Any) -> Any:
        raise Unanswered("Overloaded.", 503)

    monkeypatch.setattr("config.asking.Api.models", lambda self: [])
    monkeypatch.setattr("config.asking.Api.chat", refused)
    build()
    _, text = make_api_key()
    findings = list(trace("m", url="http://127.0.0.1:9/v1", key=text))
    assert findings[0].said == "the list of models is empty."
    assert findings[-1].what == what
    assert says in findings[-1].said
    assert findings[-1].todo


def test_a_gateway_that_is_not_there_is_the_broken_link(settings: Any):
    settings.ROUNDHOUSE_PORT = 9
    (finding,) = trace("m", url="http://127.0.0.1:9/v1", key="sk-x")
    assert finding.what == "gateway"
    assert "make up" in finding.todo


def test_chat_without_a_roundhouse_says_what_to_give(settings: Any, tmp_path: Path):
    settings.ROUNDHOUSE_DATA = tmp_path
    assert "--url and --key" in refusal("chat", "m")
    assert Chat.requires_system_checks == []


def test_doctor_speaks_where_the_database_does_not(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    environment |= {
        "DATABASE_URL": "postgres://nobody@127.0.0.1:9/none",
        "ROUNDHOUSE_DATA": str(tmp_path),
        "ROUNDHOUSE_PORT": "9",
    }
    done = subprocess.run(
        [sys.executable, str(django_settings.BASE_DIR / "manage.py"), "doctor"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "✗ database: PostgreSQL cannot be used" in done.stdout
    assert "Traceback" not in done.stderr


# -- member


def test_people_get_and_lose_roles_by_command() -> None:
    ann = get_user_model().objects.create_user("ann")
    get_user_model().objects.create_user("ben", is_active=False)
    project = make_project(name="web")
    assert run("member", "add", "web", "ann").strip() == "ann is member of web."
    key, _ = make_api_key(project=project, owner=ann)
    assert run("member", "add", "web", "ann", "--role", "owner").strip() == "ann is owner of web."
    assert run("member", "add", "web", "ben", "--role", "viewer").strip() == "ben is viewer of web."
    run("member", "add", make_project(name="other").name, "ann", "--role", "viewer")
    assert [line.split() for line in run("member", "list").splitlines()] == [
        ["PROJECT", "USER", "ROLE", "ACTIVE"],
        ["other", "ann", "viewer", "yes"],
        ["web", "ann", "owner", "yes"],
        ["web", "ben", "viewer", "disabled"],
    ]
    assert [one["role"] for one in json.loads(run("member", "list", "web", "--json"))] == ["owner", "viewer"]
    assert still_good(frozenset({key.public_id})) == {key.public_id: None}
    assert "their keys there are refused" in run("member", "remove", "web", "ann")
    assert still_good(frozenset({key.public_id})) == {}
    assert Event.objects.filter(kind="project", object_id=project.pk, what="role").count() == 4
    assert refusal("member", "remove", "web", "ann") == "ann has no role in web."
    assert "no project nowhere" in refusal("member", "add", "nowhere", "ann")
    assert "no person nobody" in refusal("member", "add", "web", "nobody")
    assert "invalid choice" in refusal("member", "add", "web", "ann", "--role", "root")
