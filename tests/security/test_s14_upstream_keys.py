"""S14: the key of an upstream server goes to that server, and is shown to nobody. (That no request names
another server: tests/api/test_upstream.py.)"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.core import serializers
from django.core.exceptions import ValidationError
from django.core.management import call_command
from django.core.management.base import CommandError
from django.test import Client
from django.urls import reverse

from inference.fleet import assignment_of
from inference.protocol import Upstream
from registry.actions.deployments import restart_deployment, save_deployment
from registry.models import Deployment, Event, LanguageModel, RouteTarget
from registry.upstreams import last4, unseal
from tests.factories import make_deployment, make_language_model, make_worker

pytestmark = pytest.mark.django_db

KEY = "sk-canary-upstream-1f0c-9Zx7"
URL = "https://models.example.com/v1"
ELSEWHERE = "https://attacker.example.net/v1"


@pytest.fixture
def deployment() -> Deployment:
    made = make_deployment(engine="upstream", arguments={"url": URL, "model": "theirs"})
    return save_deployment(deployment=made, by="test", upstream_key=KEY)


def sent_to(deployment: Deployment) -> Upstream:
    deployment.refresh_from_db()
    worker = make_worker(deployment=deployment, replica=deployment.workers.count())
    access = assignment_of(worker).upstream
    assert access is not None
    return access


@pytest.fixture
def operator() -> Client:
    client = Client(headers={"host": "localhost:8000"})
    client.force_login(get_user_model().objects.create_superuser("olga", password="x"))
    return client


def page_of(deployment: Deployment) -> str:
    return reverse("admin:registry_deployment_change", args=[deployment.pk])


def form_of(deployment: Deployment, **fields: Any) -> dict[str, Any]:
    """What the admin's form sends for it as it stands."""
    names = ("engine", "replicas", "slots", "policy", "queue_limit", "queue_seconds", "drain_seconds")
    return {
        "language_model": deployment.language_model_id,
        **{name: getattr(deployment, name) for name in names},
        **{
            name: json.dumps(getattr(deployment, name))
            for name in ("arguments", "environment", "node_labels")
        },
        **fields,
    }


# -- it goes with its URL


def test_the_key_reaches_the_node_and_is_not_readable_in_the_database(deployment: Deployment) -> None:
    assert sent_to(deployment).key == KEY
    assert KEY not in serializers.serialize("json", [deployment])
    assert KEY not in deployment.upstream_key
    assert KEY not in repr(sent_to(deployment))
    assert last4(deployment.upstream_key, URL) == KEY[-4:]


@pytest.mark.parametrize("url", [ELSEWHERE, URL + "/", "http://models.example.com/v1", URL.upper()])
def test_another_url_clears_it(deployment: Deployment, url: str) -> None:
    deployment.arguments = deployment.arguments | {"url": url.replace("HTTPS", "https")}
    save_deployment(deployment=deployment, by="test")
    deployment.refresh_from_db()
    assert deployment.upstream_key == ""
    assert "URL changed" in Event.objects.filter(kind="deployment").latest("id").reason
    assert sent_to(deployment).key == ""


def test_other_changes_keep_it(deployment: Deployment) -> None:
    deployment.arguments = deployment.arguments | {"timeout": 5}
    deployment.slots = 3
    save_deployment(deployment=deployment, by="test")
    restart_deployment(deployment=deployment, by="test")
    assert sent_to(deployment).key == KEY


def test_another_engine_clears_it(deployment: Deployment) -> None:
    deployment.engine = "simulated"
    save_deployment(deployment=deployment, by="test")
    deployment.refresh_from_db()
    assert deployment.upstream_key == ""


def test_a_url_that_was_changed_behind_our_back_gets_no_key(deployment: Deployment) -> None:
    revision = deployment.revision
    assert revision is not None
    type(revision).objects.filter(pk=revision.pk).update(arguments={"url": ELSEWHERE})
    assert sent_to(deployment).key == ""


def test_an_older_revision_gets_no_newer_key(deployment: Deployment) -> None:
    old = make_worker(deployment=deployment)
    deployment.arguments = {"url": ELSEWHERE}
    save_deployment(deployment=deployment, by="test", upstream_key="sk-of-the-other-server")
    old.refresh_from_db()
    access = assignment_of(old).upstream
    assert access is not None
    assert access.key == ""
    assert sent_to(deployment).key == "sk-of-the-other-server"


def test_another_secret_key_reads_nothing(deployment: Deployment, settings: Any) -> None:
    settings.SECRET_KEY = "x" * 50
    assert unseal(deployment.upstream_key, URL) == ""
    assert sent_to(deployment).key == ""


def test_a_new_key_replaces_the_workers(deployment: Deployment) -> None:
    before = deployment.revision_id
    save_deployment(deployment=deployment, by="test", upstream_key=KEY)
    assert deployment.revision_id == before
    save_deployment(deployment=deployment, by="test", upstream_key=KEY + "2")
    assert deployment.revision_id != before
    save_deployment(deployment=deployment, by="test", upstream_key="")
    assert sent_to(deployment).key == ""


def test_workers_of_other_engines_get_nothing(settings: Any) -> None:
    assert assignment_of(make_worker()).upstream is None
    settings.ROUNDHOUSE_UPSTREAM_HOSTS = ("10.0.0.0/8",)
    made = make_deployment(engine="upstream", arguments={"url": URL})
    assert sent_to(made) == Upstream(key="", allowed=["10.0.0.0/8"])


@pytest.mark.parametrize("key", ["with space", "line\nbreak", "käse", "x" * 501])
def test_what_could_split_a_header_is_no_key(deployment: Deployment, key: str) -> None:
    with pytest.raises(ValidationError, match="key"):
        save_deployment(deployment=deployment, by="test", upstream_key=key)
    with pytest.raises(ValidationError, match="upstream engine"):
        save_deployment(deployment=make_deployment(), by="test", upstream_key=KEY)


# -- the admin


def test_the_admin_takes_it_and_shows_its_end_only(deployment: Deployment, operator: Client) -> None:
    page = operator.get(page_of(deployment)).content.decode()
    assert f"…{KEY[-4:]}" in page
    assert 'type="password"' in page
    new = "sk-canary-second-2b7d-Yw3q"
    saved = operator.post(page_of(deployment), form_of(deployment, new_key=new))
    assert saved.status_code == 302, saved.content.decode()
    assert sent_to(deployment).key == new
    refused = operator.post(page_of(deployment), form_of(deployment, new_key="sk-canary a", slots=0))
    assert refused.status_code == 200
    for shown in (page, refused.content.decode(), operator.get(page_of(deployment)).content.decode()):
        for secret in (KEY, new, deployment.upstream_key, "sk-canary a"):
            assert secret not in shown
    history = reverse("admin:registry_deployment_history", args=[deployment.pk])
    assert "canary" not in operator.get(history).content.decode()
    assert "canary" not in str(list(Event.objects.values()))


def test_the_admin_clears_it_with_the_url(deployment: Deployment, operator: Client) -> None:
    form = form_of(deployment, arguments=json.dumps({"url": ELSEWHERE}))
    assert operator.post(page_of(deployment), form).status_code == 302
    assert sent_to(deployment).key == ""


def test_the_admin_removes_it(deployment: Deployment, operator: Client) -> None:
    assert operator.post(page_of(deployment), form_of(deployment, remove_key="on")).status_code == 302
    assert sent_to(deployment).key == ""
    other = make_deployment()
    told = operator.post(page_of(other), form_of(other, new_key=KEY))
    assert "Only a deployment of the upstream engine" in told.content.decode()


def test_the_admin_makes_one_with_its_key(operator: Client) -> None:
    model = make_language_model(source="upstream")
    form = form_of(
        Deployment(name="new", engine="upstream", language_model=model, arguments={"url": URL}),
        name="new",
        new_key=KEY,
    )
    assert operator.post(reverse("admin:registry_deployment_add"), form).status_code == 302
    assert sent_to(Deployment.objects.get(name="new")).key == KEY


def test_who_may_only_look_can_neither_see_nor_set_it(deployment: Deployment) -> None:
    user = get_user_model().objects.create_user("vera", password="x", is_staff=True)
    user.user_permissions.add(Permission.objects.get(codename="view_deployment"))
    client = Client(headers={"host": "localhost:8000"})
    client.force_login(user)
    page = client.get(page_of(deployment))
    assert page.status_code == 200
    assert "new_key" not in page.content.decode()
    assert KEY not in page.content.decode()
    assert deployment.upstream_key not in page.content.decode()
    assert client.post(page_of(deployment), form_of(deployment, new_key="sk-stolen")).status_code == 403
    assert sent_to(deployment).key == KEY


# -- the command


def run(*arguments: str) -> str:
    output = io.StringIO()
    call_command(*arguments, stdout=output, stderr=io.StringIO())
    return output.getvalue()


def test_one_command_adds_a_server(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    told = run(
        *("upstream", "add", "theirs", "--url", URL, "--preset", "openai", "--model", "gpt"),
        *("--context-length", "1000", "--route", "org/theirs", "--key-file", str(file)),
    )
    assert KEY not in told
    made = Deployment.objects.get(name="theirs")
    assert made.arguments == {"url": URL, "preset": "openai", "model": "gpt", "context_length": 1000}
    assert LanguageModel.objects.get(name="theirs").source == "upstream"
    assert RouteTarget.objects.get(deployment=made).route.name == "org/theirs"
    assert sent_to(made).key == KEY
    run("deploy", "theirs", "--argument", f"url={ELSEWHERE}")
    assert sent_to(made).key == ""
    file.write_text("sk-another")
    run("upstream", "key", "theirs", "--key-file", str(file))
    assert sent_to(made).key == "sk-another"
    run("upstream", "key", "theirs", "--no-key")
    assert sent_to(made).key == ""
    assert "vLLM" in run("upstream", "presets")


def test_nothing_is_begun_while_the_key_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction that waits for a person would hold all other writers up on SQLite."""

    def typed(prompt: str) -> str:
        assert not LanguageModel.objects.exists()
        return KEY

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("getpass.getpass", typed)
    run("upstream", "add", "theirs", "--url", URL)
    assert sent_to(Deployment.objects.get()).key == KEY

    def nothing(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("getpass.getpass", nothing)
    with pytest.raises(CommandError, match="No key was given"):
        run("upstream", "key", "theirs")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--url", "http://user:pw@host/v1", "--no-key"), "user"),
        (("--url", URL), "Where is the key"),
        (("--url", URL, "--key-file", "/nowhere/key"), "cannot be read"),
        (("--url", URL, "--no-key", "--capability", "api_base"), "capabilities"),
    ],
)
def test_what_the_command_cannot_use_changes_nothing(arguments: tuple[str, ...], told: str) -> None:
    with pytest.raises(CommandError, match=told):
        run("upstream", "add", "theirs", *arguments)
    assert not Deployment.objects.exists()
    assert not LanguageModel.objects.exists()


def test_a_model_of_another_server_is_served_by_no_other_engine() -> None:
    with pytest.raises(ValidationError, match="upstream engine"):
        make_deployment(engine="transformers", language_model=make_language_model(source="upstream"))


def test_no_answer_of_ours_has_it(deployment: Deployment, operator: Client) -> None:
    pages = ["/admin/", reverse("admin:registry_deployment_changelist"), page_of(deployment)]
    pages += [reverse("admin:registry_worker_changelist"), "/metrics", "/v1/models", "/v1/openapi.json"]
    make_worker(deployment=deployment)
    for page in pages:
        shown = operator.get(page).content.decode()
        assert KEY not in shown, page
        assert deployment.upstream_key not in shown, page
    assert django_settings.ROUNDHOUSE_UPSTREAM_HOSTS == ()
