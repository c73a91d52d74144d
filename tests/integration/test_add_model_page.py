"""The page "add a model": what it checks, what it tells beforehand, what it makes, and how it follows."""

from __future__ import annotations

import html
import re
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from registry import chat_templates
from registry.actions.language_models import record_copy
from registry.models import Deployment, Event, LanguageModel, ModelCopy, Route
from registry.states import CopyState
from tests.engines.test_hub_source import COMMIT, FakeHub, fake, llama
from tests.factories import make_deployment, make_language_model, make_node

__all__ = ["fake", "llama"]  # the fixtures, found by their names

pytestmark = pytest.mark.django_db

ADD = "admin:registry_languagemodel_add"
HUB = {"kind": "hub", "repository": "acme/tiny", "commit": COMMIT, "name": "tiny"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, settings: Any) -> None:
    settings.ROUNDHOUSE_CACHE = tmp_path / "cache"


@pytest.fixture
def operator() -> Client:
    client = Client(headers={"host": "localhost:8000"})
    client.force_login(get_user_model().objects.create_superuser("olga", password="x"))
    return client


def staff(*permissions: str) -> Client:
    user = get_user_model().objects.create_user("sam", password="x", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    client = Client(headers={"host": "localhost:8000"})
    client.force_login(user)
    return client


def posted(client: Client, **fields: str) -> str:
    """The page that answers, as a person reads it."""
    answer = client.post(reverse(ADD), fields, follow=True)
    assert answer.status_code == 200
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", answer.content.decode())))


def test_a_model_of_a_hub_is_told_before_it_is_added(operator: Client, fake: FakeHub) -> None:
    make_node(name="box", memory_bytes=2_000_000_000, memory_free_bytes=1_000_000_000)
    said = posted(operator, **HUB, _check="1")
    for text in (
        "What is known of it",
        "LlamaForCausalLM",
        "512 tokens",
        "of KV cache per token",
        "node box, 1.0 GB free: about ",
        "users × 512 tokens",
    ):
        assert text in said, text
    assert not LanguageModel.objects.exists()
    assert not any(path.endswith(".safetensors") for _, path, *_ in fake.seen)


def test_a_model_that_would_be_refused_is_told_so_beforehand(operator: Client, fake: FakeHub) -> None:
    fake.files["modeling_tiny.py"] = b"print()"
    fake.files["config.json"] = fake.files["config.json"].replace(b"{", b'{"auto_map": {},', 1)
    assert "auto_map" in posted(operator, **HUB, _check="1")
    assert "has no acme/other" in posted(operator, **HUB | {"repository": "acme/other"}, _check="1")


def test_a_hub_that_cannot_be_reached_is_no_reason_to_wait(
    operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "127.0.0.1 cannot be used" in posted(operator, **HUB, _check="1")
    posted(operator, **HUB)
    assert LanguageModel.objects.get().source == f"hub:acme/tiny@{COMMIT}"


def test_a_folder_without_a_template_gets_one_of_the_library(
    operator: Client, llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "vicuna-tiny"))
    (folder / "LICENSE").write_text("Llama 2 Community License\n")
    about = folder / "tokenizer_config.json"
    about.write_text(about.read_text().replace('"chat_template"', '"no_template"'))
    form = {"kind": "folder", "folder": str(folder), "name": "tiny"}
    said = posted(operator, **form, _check="1")
    assert "choose one, or it does not chat. vicuna fits its name" in said
    assert "Llama 2 Community License" in said
    posted(operator, **form, template="vicuna")
    model = LanguageModel.objects.get()
    assert (model.source, model.chat_template) == (str(folder), chat_templates.read("vicuna"))
    assert Event.objects.filter(kind="languagemodel", what="added", by="olga").exists()
    assert not Deployment.objects.exists()


def test_model_deployment_and_route_are_made_in_one_go_or_not_at_all(operator: Client) -> None:
    form = HUB | {"deployed": "on", "engine": "simulated", "replicas": "2"}
    said = posted(operator, **form)
    assert "Added tiny and deployed it. This page follows its files" in said
    deployment = Deployment.objects.get(name="tiny")
    assert (deployment.engine, deployment.replicas) == ("simulated", 2)
    assert list(deployment.routes.values_list("name", flat=True)) == ["tiny"]
    make_deployment(name="taken", route="public")
    assert "There is a deployment of that name" in posted(operator, **form | {"name": "taken"})
    assert "There is a route of that name" in posted(operator, **form | {"name": "public"})
    assert "Ensure this value is less" in posted(operator, **form | {"name": "new", "replicas": "9999"})
    assert set(LanguageModel.objects.values_list("name", flat=True)) == {
        "tiny",
        Deployment.objects.get(name="taken").language_model.name,
    }
    assert Route.objects.count() == 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"commit": "main"}, "git ls-remote"),
        ({"repository": "../../etc"}, "hub:ORG/NAME@COMMIT"),
        ({"repository": "acme/tiny@main#"}, "hub:ORG/NAME@COMMIT"),
        ({"name": "bad name"}, "Use letters, digits"),
        ({"name": "acme/tiny", "deployed": "on"}, "As the name of a deployment: Use letters"),
        ({"name": "there"}, "There is a model of that name already"),
        ({"template": "vicuna", "chat_template": "{{ messages }}"}, "not both"),
        ({"chat_template": "{{ messages }}\n{% for %}"}, "line 2"),
        ({"template": "nonsense"}, "Select a valid choice"),
        ({"kind": "folder", "folder": "/srv/../etc"}, "without '..'"),
        ({"kind": "folder", "folder": "models/tiny"}, "absolute folder"),
        ({"kind": "package", "package": "weights", "sha256": "0" * 64}, "NAME==VERSION"),
        ({"kind": "source", "source": "ftp://host/model"}, "absolute folder"),
    ],
)
def test_what_cannot_be_added_is_marked_at_its_field(
    operator: Client, fields: dict[str, str], says: str
) -> None:
    make_language_model(name="there")
    assert says in posted(operator, **HUB | fields)
    assert LanguageModel.objects.count() == 1


def test_each_kind_of_source_comes_to_its_line(operator: Client) -> None:
    digest = "AB" * 32
    posted(operator, kind="modelscope", repository="a/b", commit=COMMIT, file="q4.gguf", name="one")
    posted(operator, kind="package", package="weights==1.0", sha256=digest, name="two")
    posted(operator, source="/srv/models/three", name="three")
    posted(operator, kind="source", source="upstream", name="four")
    assert dict(LanguageModel.objects.values_list("name", "source")) == {
        "one": f"modelscope:a/b@{COMMIT}/q4.gguf",
        "two": f"package:weights==1.0#sha256={digest.lower()}",
        "three": "/srv/models/three",
        "four": "upstream",
    }


def test_who_may_not_deploy_is_not_offered_it_and_cannot_do_it() -> None:
    client = staff("add_languagemodel", "view_languagemodel")
    assert b'name="deployed"' not in client.get(reverse(ADD)).content
    posted(client, **HUB, deployed="on", engine="simulated")
    assert LanguageModel.objects.get().name == "tiny"
    assert not Deployment.objects.exists()


def test_a_folder_whose_name_no_disk_takes_is_not_here(operator: Client) -> None:
    form = {"kind": "folder", "folder": f"/{'x' * 300}", "name": "tiny"}
    assert "This machine has no such folder" in posted(operator, **form, _check="1")


def test_files_that_a_deployment_needs_cannot_become_another_servers(operator: Client) -> None:
    deployment = make_deployment(name="tiny")
    page = reverse("admin:registry_languagemodel_change", args=[deployment.language_model.pk])
    answer = operator.post(page, {"source": "upstream", "chat_template": ""})
    assert b"by the deployment(s) tiny" in answer.content
    assert LanguageModel.objects.get().source != "upstream"


def test_who_may_only_look_sees_the_page_of_a_model() -> None:
    deployment = make_deployment(name="tiny")
    page = reverse("admin:registry_languagemodel_change", args=[deployment.language_model.pk])
    answer = staff("view_languagemodel").get(page)
    assert answer.status_code == 200
    assert b"<textarea" not in answer.content
    assert b"<select" not in answer.content


def test_who_may_not_add_gets_no_page() -> None:
    client = staff("view_languagemodel")
    assert client.get(reverse(ADD)).status_code == 403
    assert client.post(reverse(ADD), HUB).status_code == 403
    assert not LanguageModel.objects.exists()


def test_the_page_of_a_model_follows_its_files(operator: Client) -> None:
    deployment = make_deployment(name="tiny")
    model, node = deployment.language_model, make_node(name="box")
    page = operator.get(reverse("admin:registry_languagemodel_change", args=[model.pk])).content.decode()
    assert "Fetched by the node that first needs them." in page
    poll = html.unescape(re.search(r'id="live-poll" hx-get="([^"]+)"', page)[1])  # type: ignore[index]
    facts = {"step": "download", "done": 400, "total": 1000, "files_done": 1, "files_total": 3}
    record_copy(node=node, language_model_id=model.pk, state=CopyState.FETCHING, **facts)
    ModelCopy.objects.update(step_began_at=timezone.now() - timedelta(seconds=10), step_began_done=200)
    ModelCopy.objects.update(updated_at=timezone.now())
    fresh = operator.get(poll)
    said = fresh.content.decode()
    assert '<progress value="400" max="1000">' in said
    assert "download, file 2 of 3, 400 B of 1.0 kB, 40 %, 30 s left" in said
    again = html.unescape(re.search(r'hx-get="([^"]+)"', said)[1])  # type: ignore[index]
    assert operator.get(again).status_code == 204
    record_copy(node=node, language_model_id=model.pk, state=CopyState.FAILED, detail="The disk is full.")
    assert "The disk is full." in operator.get(again).content.decode()


def test_a_template_of_the_library_is_picked_on_the_page_of_a_model(operator: Client) -> None:
    deployment = make_deployment(name="tiny")
    page = reverse("admin:registry_languagemodel_change", args=[deployment.language_model.pk])
    form = {"source": "/srv/models/tiny", "chat_template": "{{ messages }}"}
    operator.post(page, form | {"library": "zephyr"})
    model = LanguageModel.objects.get()
    assert model.chat_template == chat_templates.read("zephyr")
    deployment.refresh_from_db()
    assert deployment.revision is not None
    assert deployment.revision.chat_template == model.chat_template  # so its workers are replaced
    operator.post(page, form)
    assert LanguageModel.objects.get().chat_template == "{{ messages }}"
    answer = operator.post(page, form | {"chat_template": "{% for %}"})
    assert b"This is no chat template: line 1" in answer.content
