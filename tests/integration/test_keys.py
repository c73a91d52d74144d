"""Keys and projects: actions, commands, pages, and the migration that gave keys several secrets."""

from __future__ import annotations

import io
import re
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from openai_api.auth import load_key, verify
from openai_api.errors import WrongKey
from registry.actions.api_keys import (
    MAX_SECRETS,
    issue_api_key,
    note_key_use,
    publish_key_changes,
    revoke_api_key,
    rotate_api_key,
    still_good,
)
from registry.actions.projects import (
    delete_project,
    note_people_changed,
    remove_member,
    save_project,
    set_role,
)
from registry.admin import access
from registry.errors import InvalidInput, InvalidTransition, StillInUse
from registry.models import ApiKey, Change, Event, KeySecret, Membership, Project
from registry.rights import Role
from tests.factories import make_api_key, make_deployment, make_project

pytestmark = pytest.mark.django_db

PEPPERS = {1: b"p" * 32}


def accepted(text: str, peppers: dict[int, bytes] | None = None) -> bool:
    from django.conf import settings

    try:
        verify(text, load_key(text.split("-")[1]), peppers or settings.ROUNDHOUSE_KEY_PEPPERS)
    except WrongKey:
        return False
    return True


def make_user(name: str, **facts: Any) -> Any:
    return get_user_model().objects.create_user(name, **facts)


def client_of(user: Any) -> Client:
    client = Client(headers={"host": "localhost:8000"})
    client.force_login(user)
    return client


# -- rotation


def test_rotating_keeps_the_id_and_ends_the_old_secrets_in_time() -> None:
    key, first = make_api_key()
    second = rotate_api_key(api_key=key, by="ann", overlap=timedelta(hours=2))
    third = rotate_api_key(api_key=key, by="ann", overlap=timedelta(hours=1))
    assert [accepted(text) for text in (first, second, third)] == [True] * 3
    ends = [secret.expires_at for secret in KeySecret.objects.order_by("id")]
    assert ends[2] is None
    assert ends[0] == ends[1], "a later rotation can only shorten"
    fourth = rotate_api_key(api_key=key, by="ann", overlap=timedelta(0))
    assert [accepted(text) for text in (first, second, third, fourth)] == [False, False, False, True]
    key.refresh_from_db()
    assert key.last4 == fourth[-4:]
    assert Event.objects.filter(kind="apikey", what="rotated", by="ann").count() == 3
    revoke_api_key(api_key=key, by="ann")
    assert not accepted(fourth)
    with pytest.raises(InvalidTransition, match="issue a new one"):
        rotate_api_key(api_key=key, by="ann")


def test_a_key_has_few_secrets_at_once() -> None:
    key, _ = make_api_key()
    for _ in range(MAX_SECRETS - 1):
        rotate_api_key(api_key=key, by="x")
    with pytest.raises(InvalidTransition, match="5 secrets"):
        rotate_api_key(api_key=key, by="x")
    text = rotate_api_key(api_key=key, by="x", overlap=timedelta(0))
    assert accepted(text)
    for overlap in (timedelta(seconds=-1), timedelta(days=91)):
        with pytest.raises(InvalidInput):
            rotate_api_key(api_key=key, by="x", overlap=overlap)
    expired, _ = make_api_key(expires_at=timezone.now() - timedelta(seconds=1))
    with pytest.raises(InvalidTransition):
        rotate_api_key(api_key=expired, by="x")


def test_a_new_pepper_is_for_new_secrets_and_the_old_goes_on(settings: Any) -> None:
    settings.ROUNDHOUSE_KEY_PEPPERS = PEPPERS
    key, first = make_api_key()
    both = {**PEPPERS, 2: b"q" * 32}
    settings.ROUNDHOUSE_KEY_PEPPERS = both
    second = rotate_api_key(api_key=key, by="x")
    assert list(KeySecret.objects.order_by("id").values_list("pepper", flat=True)) == [1, 2]
    assert [accepted(text) for text in (first, second)] == [True, True]
    assert [accepted(text, {2: both[2]}) for text in (first, second)] == [False, True]


def test_a_secrets_use_is_the_keys_use() -> None:
    key, _ = make_api_key()
    rotate_api_key(api_key=key, by="x")
    old = KeySecret.objects.earliest("id")
    at = timezone.now()
    note_key_use(secret_id=old.pk, at=at)
    assert list(KeySecret.objects.order_by("id").values_list("last_used_at", flat=True)) == [at, None]
    key.refresh_from_db()
    assert key.last_used_at == at


# -- projects


def test_a_project_may_have_only_so_many_keys_in_use() -> None:
    project = make_project(name="small", max_keys=2)
    first, _ = make_api_key(project=project)
    make_api_key(project=project)
    with pytest.raises(InvalidInput, match="2 keys in use"):
        make_api_key(project=project)
    revoke_api_key(api_key=first, by="x")
    make_api_key(project=project)
    assert project.api_keys.usable(timezone.now()).count() == 2


def test_a_persons_key_lives_as_long_as_they_may_have_one() -> None:
    project, ann = make_project(name="a"), make_user("ann")
    with pytest.raises(InvalidInput, match="owner"):
        make_api_key(project=project, owner=ann)
    set_role(project=project, user=ann, role=Role.VIEWER, by="x")
    with pytest.raises(InvalidInput, match="owner"):
        make_api_key(project=project, owner=ann)
    set_role(project=project, user=ann, role=Role.MEMBER, by="x")
    key, text = make_api_key(project=project, owner=ann)
    assert accepted(text)
    chat = f"user-{ann.pk}"
    asked = frozenset({key.public_id, chat, "user-x", "gone"})
    assert set(still_good(asked)) == {key.public_id, chat}

    def told() -> set[str]:
        heard = set(Change.objects.filter(kind="api_key").values_list("key", flat=True))
        Change.objects.all().delete()
        return heard

    told()
    remove_member(project=project, user=ann, by="x")
    assert (accepted(text), told()) == (False, {key.public_id})
    set_role(project=project, user=ann, role=Role.OWNER, by="x")
    assert (accepted(text), told()) == (True, {key.public_id})
    ann.is_active = False
    ann.save()
    assert (accepted(text), told()) == (False, {key.public_id, chat})
    assert still_good(asked) == {}
    ann.is_active = True
    ann.save(update_fields=["is_active"])
    assert (accepted(text), told()) == (True, {key.public_id, chat})
    # Of many at once no signal tells; control sees it.
    seen = note_people_changed(frozenset())
    assert (seen, told()) == (frozenset(), set())
    get_user_model().objects.filter(pk=ann.pk).update(is_active=False)
    assert told() == set()
    seen = note_people_changed(seen)
    assert (accepted(text), told()) == (False, {key.public_id, chat})
    assert note_people_changed(seen) == seen == {ann.pk}
    assert told() == set(), "once"
    get_user_model().objects.filter(pk=ann.pk).update(is_active=True)
    assert note_people_changed(seen) == frozenset()
    assert (accepted(text), told()) == (True, {key.public_id, chat})
    ann.last_login = timezone.now()
    ann.save(update_fields=["last_login"])
    assert told() == set(), "a log-in is no news"
    get_user_model().objects.filter(pk=ann.pk).delete()
    assert (accepted(text), told()) == (False, {key.public_id, chat})
    key.refresh_from_db()
    assert (key.owner, key.revoked_at is not None) == (None, True)


def test_a_change_of_many_keys_is_told_as_one() -> None:
    project = make_project(name="many")
    make_api_key(project=project)
    ApiKey.objects.bulk_create(
        ApiKey(name="n", project=project, public_id=f"{n:012d}", last4="0000") for n in range(600)
    )
    Change.objects.all().delete()
    publish_key_changes(project.api_keys.all())
    assert list(Change.objects.values_list("kind", "key")) == [("api_key", "*")]
    with pytest.raises(StillInUse):
        delete_project(project=project, by="x")
    with pytest.raises(InvalidInput, match="time_zone"):
        save_project(project=Project(name="zone", time_zone="Mars"), by="x")


def test_the_last_free_place_is_given_once(django_db_blocker: Any) -> None:
    project = make_project(name="one", max_keys=1)
    issue_api_key(name="first", project=project, by="x")
    stale = Project.objects.get(pk=project.pk)
    with pytest.raises(InvalidInput):
        issue_api_key(name="second", project=stale, by="x")


# -- commands


def run(*arguments: str) -> str:
    output = io.StringIO()
    call_command(*arguments, stdout=output, stderr=io.StringIO())
    return output.getvalue()


def refusal(*arguments: str) -> str:
    with pytest.raises(CommandError) as caught:
        run(*arguments)
    return str(caught.value)


def test_keys_are_made_with_rights_and_rotated_by_command() -> None:
    make_deployment(route="smol-1")
    text = run(
        "key", "create", "ci", "--project", "web", "--routes", "smol*", "--scopes", "models", "chat",
        "--addresses", "10.0.0.0/8", "--priority", "batch",
    ).strip()  # fmt: skip
    key = ApiKey.objects.get()
    assert (key.routes, key.scopes, key.cidrs, key.priority) == (
        ["smol*"], ["chat", "models"], ["10.0.0.0/8"], "batch",
    )  # fmt: skip
    new = run("key", "rotate", "ci", "--overlap", "24h").strip()
    assert re.fullmatch(rf"sk-{key.public_id}-[0-9A-Za-z]{{49}}", new)
    assert new != text
    assert accepted(text)
    assert accepted(new)
    last = run("key", "rotate", f"sk-{key.public_id}", "--overlap", "0").strip()
    assert [accepted(one) for one in (text, new, last)] == [False, False, True]
    assert last not in run("key", "list")
    assert "write 90min" in refusal("key", "rotate", "ci", "--overlap", "soon")
    assert "90 days" in refusal("key", "rotate", "ci", "--overlap", "20w")
    assert "no such key" in refusal("key", "rotate", "nobody")
    run("key", "revoke", "ci")
    assert "issue a new one" in refusal("key", "rotate", f"sk-{key.public_id}")
    assert "--addresses" in refusal("key", "create", "x", "--addresses", "here")
    assert "no route" in refusal("key", "create", "x", "--project", "new", "--routes", "big*")
    assert not Project.objects.filter(name="new").exists()


# -- pages


def test_a_member_makes_rotates_and_revokes_keys_on_the_page() -> None:
    ann = make_user("ann")
    client = client_of(ann)
    assert "You are in no project yet" in client.get("/keys/").content.decode()
    project = make_project(name="web", key_days=30, routes=["smol*"], scopes=["chat", "models"])
    set_role(project=project, user=ann, role=Role.MEMBER, by="x")
    assert "No keys yet" in client.get("/keys/").content.decode()
    answer = client.post(
        "/keys/", {"name": "<b>ci</b>", "project": project.pk, "scopes": ["chat"]}, follow=True
    )
    html = answer.content.decode()
    [text] = set(re.findall(r"sk-[0-9A-Za-z]{12}-[0-9A-Za-z]{49}", html))
    assert "<b>ci" not in html
    key = ApiKey.objects.get()
    assert (key.owner, key.project, key.scopes, key.created_by) == (ann, project, ["chat"], "ann")
    assert key.expires_at is not None
    assert abs(key.expires_at - timezone.now() - timedelta(days=30)) < timedelta(minutes=1)
    assert answer["Cache-Control"] == "private, no-store"
    page = f"/keys/{key.public_id}/"
    for path in ("/keys/", page, f"{page}secrets/"):
        shown = client.get(path)
        assert shown["Cache-Control"] == "private, no-store"
        assert text not in shown.content.decode(), "shown once"
    answer = client.post(f"{page}rotate/", {"overlap": "1"}, follow=True)
    [new] = set(re.findall(r"sk-[0-9A-Za-z]{12}-[0-9A-Za-z]{49}", answer.content.decode()))
    assert (accepted(text), accepted(new)) == (True, True)
    note_key_use(secret_id=KeySecret.objects.earliest("id").pk, at=timezone.now())
    rows = re.findall(r"<td>([^<]*)</td>", client.get(f"{page}secrets/").content.decode())
    assert (rows[0], rows[2], rows[3]) == (f"…{new[-4:]}", "works", "never")
    assert (rows[4], rows[7]) == (f"…{text[-4:]}", "within the last minute")
    assert rows[6].startswith("works until ")
    client.post(f"{page}revoke/")
    assert accepted(new), "asked first"
    answer = client.post(f"{page}revoke/", {"sure": "yes"}, follow=True)
    assert "is revoked" in answer.content.decode()
    assert not accepted(new)
    assert "Make a new secret" not in client.get(page).content.decode()
    assert "report" in client.get(page).content.decode()


def test_what_a_member_may_not_ask_is_said_at_its_field() -> None:
    ann = make_user("ann")
    project = make_project(
        name="web", key_days=30, routes=["smol*"], scopes=["chat"], priority="batch", max_keys=1
    )
    set_role(project=project, user=ann, role=Role.MEMBER, by="x")
    client = client_of(ann)
    for field, value in [
        ("name", ""), ("name", "a\x7f"), ("project", make_project(name="other").pk), ("expires", "90"),
        ("routes", "big"), ("routes", "a b"), ("scopes", ["models"]), ("cidrs", "here"),
        ("priority", "default"),
    ]:  # fmt: skip
        answer = client.post("/keys/", {"name": "x", "project": project.pk} | {field: value})
        assert answer.status_code == 400, (field, value)
        assert field in answer.context["form"].errors, (field, value)
    assert not ApiKey.objects.exists()
    client.post("/keys/", {"name": "x", "project": project.pk})
    assert ApiKey.objects.get().priority == "batch"
    answer = client.post("/keys/", {"name": "y", "project": project.pk})
    assert "may have 1" in str(answer.context["form"].errors["project"])


def test_an_owner_manages_and_a_viewer_sees() -> None:
    project = make_project(name="web")
    people = {role: make_user(role.value) for role in Role}
    for role, user in people.items():
        set_role(project=project, user=user, role=role, by="x")
    theirs, _ = make_api_key(project=project, name="member's", owner=people[Role.MEMBER])
    program, _ = make_api_key(project=project, name="program's")
    buttons = {}
    for role, user in people.items():
        client = client_of(user)
        html = client.get("/keys/").content.decode()
        assert "member&#x27;s" in html
        assert ("A new key" in html) is (role is not Role.VIEWER)
        for key in (theirs, program):
            page = client.get(f"/keys/{key.public_id}/").content.decode()
            buttons[role, key.name] = ("Make a new secret" in page, ">Revoke</button>" in page)
    assert buttons == {
        (Role.OWNER, "member's"): (False, True),
        (Role.OWNER, "program's"): (True, True),
        (Role.MEMBER, "member's"): (True, True),
        (Role.MEMBER, "program's"): (False, False),
        (Role.VIEWER, "member's"): (False, False),
        (Role.VIEWER, "program's"): (False, False),
    }
    anonymous = Client(headers={"host": "localhost:8000"})
    for path in ("/keys/", f"/keys/{theirs.public_id}/", f"/keys/{theirs.public_id}/secrets/"):
        assert anonymous.get(path)["Location"].startswith("/login/")
    for path in ("rotate", "revoke"):
        anonymous.post(f"/keys/{theirs.public_id}/{path}/", {"sure": "yes", "overlap": "0"})
    assert accepted_count() == 2


def accepted_count() -> int:
    return ApiKey.objects.usable(timezone.now()).count()


# -- the admin


@pytest.fixture
def operator() -> Client:
    return client_of(get_user_model().objects.create_superuser("olga", password="x"))


def project_form(**facts: Any) -> dict[str, Any]:
    return {
        "name": "web", "time_zone": "Europe/Vienna", "patterns": "smol*", "scopes": ["chat"],
        "priority": "default", "key_days": "30", "max_keys": "5",
        "memberships-TOTAL_FORMS": "0", "memberships-INITIAL_FORMS": "0",
    } | facts  # fmt: skip


def test_projects_and_their_members_are_managed_in_the_admin(operator: Client) -> None:
    ann, ben = make_user("ann"), make_user("ben")
    member = {"memberships-TOTAL_FORMS": "1", "memberships-0-user": ann.pk, "memberships-0-role": "member"}
    operator.post(reverse("admin:registry_project_add"), project_form(**member))
    project = Project.objects.get(name="web")
    assert (project.time_zone, project.routes, project.scopes) == ("Europe/Vienna", ["smol*"], ["chat"])
    key, text = make_api_key(project=project, owner=ann)
    membership = Membership.objects.get()
    url = reverse("admin:registry_project_change", args=[project.pk])
    changed = {
        "memberships-TOTAL_FORMS": "1", "memberships-INITIAL_FORMS": "1",
        "memberships-0-id": membership.pk, "memberships-0-project": project.pk,
        "memberships-0-user": ben.pk, "memberships-0-role": "owner",
    }  # fmt: skip
    operator.post(url, project_form(**changed))
    assert [(one.user, one.role) for one in Membership.objects.all()] == [(ben, "owner")]
    assert not accepted(text), "ann is no member any more"
    membership = Membership.objects.get()
    gone = changed | {"memberships-0-id": membership.pk, "memberships-0-DELETE": "on"}
    operator.post(url, project_form(**gone))
    assert not Membership.objects.exists()
    told = Event.objects.filter(kind="project", object_id=project.pk, what="role").values_list(
        "by", flat=True
    )
    assert list(told) == ["olga"] * 4
    wrong = operator.post(url, project_form(time_zone="Mars", patterns="a b"))
    assert {"time_zone", "patterns"} <= set(wrong.context["adminform"].form.errors)
    refused = operator.post(
        reverse("admin:registry_project_delete", args=[project.pk]), {"post": "yes"}, follow=True
    )
    assert Project.objects.filter(pk=project.pk).exists()
    assert refused.status_code == 200
    assert key.project == project


def test_a_key_is_issued_with_rights_and_rotated_in_the_admin(operator: Client) -> None:
    make_deployment(route="chat")
    project, ann = make_project(name="web", max_keys=1), make_user("ann")
    form = {
        "name": "ci", "project": project.pk, "routes": ["chat"], "patterns": "smol*, org/*",
        "scopes": ["chat"],
        "cidrs": "10.0.0.0/8, 2001:db8::/32", "priority": "interactive", "metadata": '{"team": "a"}',
        "expires_at_0": "", "expires_at_1": "",
    }  # fmt: skip
    add = reverse("admin:registry_apikey_add")
    for field, value in [
        ("owner", ann.pk), ("patterns", "chat"), ("cidrs", "x"), ("metadata", '{"a": 1}'), ("priority", "no"),
    ]:  # fmt: skip
        assert field in operator.post(add, form | {field: value}).context["adminform"].form.errors, field
    html = operator.post(add, form, follow=True).content.decode()
    [text] = set(re.findall(r"sk-[0-9A-Za-z]{12}-[0-9A-Za-z]{49}", html))
    key = ApiKey.objects.get()
    assert key.routes == ["chat", "org/*", "smol*"]
    assert (key.cidrs, key.priority, key.metadata) == (
        ["10.0.0.0/8", "2001:db8::/32"],
        "interactive",
        {"team": "a"},
    )
    assert "project" in operator.post(add, form).context["adminform"].form.errors, "no room"
    page = reverse("admin:registry_apikey_change", args=[key.pk])
    rotate = reverse("admin:registry_apikey_rotate", args=[key.pk])
    assert rotate in operator.get(page).content.decode()
    assert "The old secret ends" in operator.get(rotate).content.decode()
    html = operator.post(rotate, {"overlap": "24"}, follow=True).content.decode()
    [new] = set(re.findall(r"sk-[0-9A-Za-z]{12}-[0-9A-Za-z]{49}", html))
    assert (accepted(text), accepted(new)) == (True, True)
    rows = operator.get(reverse("admin:registry_apikey_secrets", args=[key.pk])).content.decode()
    assert rows.count("<tr>") == 2
    assert new[-4:] in operator.get(page).content.decode()
    revoke_api_key(api_key=key, by="x")
    assert rotate not in operator.get(page).content.decode()
    html = operator.post(rotate, {"overlap": "24"}, follow=True).content.decode()
    assert "cannot be rotated" in html
    assert KeySecret.objects.count() == 2


def test_keys_are_found_by_what_one_knows_of_them(operator: Client) -> None:
    key, text = make_api_key(name="Nightly build", project=make_project(name="a"))
    other, _ = make_api_key(name="other", project=make_project(name="b"))
    url = reverse("admin:registry_apikey_changelist")

    def found(**asked: str) -> list[ApiKey]:
        return list(operator.get(url, asked).context["cl"].queryset)

    for asked in (
        "nightly",
        "Nightly build",
        key.public_id,
        text,
        f"sk-{key.public_id}-…{key.last4}",
        key.last4,
    ):
        assert found(q=asked) == [key], asked
    assert found(q="build") == []
    assert found(q="%") == []
    assert set(found()) == {key, other}
    revoke_api_key(api_key=other, by="x")
    assert (found(state="usable"), found(state="ended")) == ([key], [other])
    assert found(project=str(key.project_id)) == found(q="a") == [key]
    for project in ("0", "x", "9" * 30):
        assert operator.get(url, {"project": project}).status_code == 200


def test_of_very_many_keys_the_first_are_listed(operator: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "KEYS_PAGED", 60)
    monkeypatch.setattr(access, "PROJECTS_LISTED", 1)
    project = make_project(name="many")
    ApiKey.objects.bulk_create(
        ApiKey(name=f"n{n}", project=project, public_id=f"{n:012d}", last4="0000") for n in range(70)
    )
    make_project(name="other")
    url = reverse("admin:registry_apikey_changelist")
    answer = operator.get(url)
    assert answer.context["cl"].result_count == 60
    assert "search or filter" in answer.content.decode()
    assert len(operator.get(url, {"p": "2"}).context["cl"].result_list) == 10
    assert operator.get(url, {"q": "n69"}).context["cl"].result_count == 1
    assert "search or filter" not in operator.get(url, {"q": "n69"}).content.decode()
    chosen = operator.get(url, {"project": str(project.pk)})
    assert "many" in chosen.content.decode()


# -- the migration


@pytest.mark.django_db(transaction=True)
def test_keys_of_before_keep_working_over_the_migration_and_back() -> None:
    before, after = [("registry", "0004_vllm_engine")], [("registry", "0005_keys")]
    latest = [
        node for node in MigrationExecutor(connection).loader.graph.leaf_nodes() if node[0] == "registry"
    ]
    key, text = make_api_key(name="old")
    second = rotate_api_key(api_key=key, by="x")
    note_key_use(secret_id=KeySecret.objects.earliest("id").pk, at=timezone.now())
    kept = KeySecret.objects.latest("id")
    try:
        MigrationExecutor(connection).migrate(before)
        state = MigrationExecutor(connection).loader.project_state(before).apps
        row = state.get_model("registry", "ApiKey").objects.get()
        assert (row.digest, row.pepper, row.last4) == (kept.digest, kept.pepper, kept.last4)
        MigrationExecutor(connection).migrate(after)
    finally:
        MigrationExecutor(connection).migrate(latest)
    [secret] = KeySecret.objects.all()
    assert (secret.digest, secret.last4, secret.expires_at) == (kept.digest, kept.last4, None)
    assert accepted(second)
    assert not accepted(text), "a key had room for one"
    key = ApiKey.objects.get()
    assert secret.last_used_at == key.last_used_at
