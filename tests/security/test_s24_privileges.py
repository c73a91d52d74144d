"""S24: nobody gains by the API of keys. Random roles, projects and calls: no sequence of them lets a person
do what their roles did not let them do before."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.db import transaction
from django.test import Client
from django.utils import timezone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openai_api.auth import load_key, verify
from registry.actions.api_keys import issue_api_key
from registry.actions.projects import remove_member, set_role
from registry.models import ApiKey, Event, Membership, Project
from registry.rights import PRIORITY_ORDER, Priority, Role, Scope
from tests.factories import make_api_key, make_deployment, make_project

pytestmark = pytest.mark.django_db

ROUTES = ["alpha", "alpha-2", "beta"]
PEOPLE = ["ann", "ben", "cy"]
POWERS = {None: 0, Role.VIEWER: 1, Role.MEMBER: 2, Role.OWNER: 3}


def client_of(user: Any) -> Client:
    client = Client(headers={"host": "localhost:8000"})
    client.force_login(user)
    return client


def send(client: Client, path: str, body: Any, how: str = "post") -> Any:
    return getattr(client, how)(f"/api/v1/{path}", json.dumps(body), content_type="application/json")


def powers(text: str) -> set[tuple[str, str]]:
    """What a text lets one do now: (scope, route), asked of the gateway's own check."""
    from django.conf import settings as django_settings

    from openai_api.errors import ApiError

    public_id = text.split("-")[1]
    try:
        key, _ = verify(text, load_key(public_id), django_settings.ROUNDHOUSE_KEY_PEPPERS)
    except ApiError:
        return set()
    found = set()
    for scope in Scope.values:
        try:
            key.check(scope, lambda: None)
        except ApiError:
            continue
        found |= {(scope, route) for route in ROUTES if key.may_use(route)}
    return found


NAMES = st.sampled_from(PEOPLE)
SCOPES = st.lists(st.sampled_from([*Scope.values, "admin", "*"]), max_size=3)
PATTERNS = st.lists(st.sampled_from([*ROUTES, "*", "a*", "b*", "gone"]), max_size=3)
PROJECTS = st.fixed_dictionaries(
    {
        "routes": st.lists(st.sampled_from(["alpha", "a*", "beta", "*"]), max_size=2),
        "scopes": st.lists(st.sampled_from(Scope.values), max_size=3),
        "priority": st.sampled_from(Priority.values),
        "key_days": st.sampled_from([None, 1, 30]),
        "max_keys": st.sampled_from([None, 1, 3]),
    }
)
CALLS = st.one_of(
    st.tuples(
        st.just("issue"), NAMES, st.integers(0, 1),
        st.fixed_dictionaries(
            {},
            optional={
                "scopes": SCOPES,
                "routes": PATTERNS,
                "priority": st.sampled_from([*Priority.values, "root"]),
                "days": st.sampled_from([1, 2, 365, 4000]),
                "owner": st.just("ann"),
                "role": st.just("owner"),
            },
        ),
    ),
    st.tuples(
        st.just("change"), NAMES, st.integers(0, 20),
        st.fixed_dictionaries(
            {},
            optional={
                "name": st.just("renamed"),
                "scopes": SCOPES,
                "routes": PATTERNS,
                "priority": st.sampled_from([None, *Priority.values, "root"]),
                "days": st.sampled_from([None, -1, 1, 2, 365, 4000]),
                "owner": st.just("ann"),
                "project": st.just(1),
            },
        ),
    ),
    st.tuples(st.just("rotate"), NAMES, st.integers(0, 20), st.sampled_from([0, 60, 86400])),
    st.tuples(st.just("revoke"), NAMES, st.integers(0, 20), st.just(None)),
    st.tuples(st.just("page"), NAMES, st.integers(0, 20), st.sampled_from(["rotate", "revoke", "new"])),
    # Administrators change roles meanwhile.
    st.tuples(st.just("role"), NAMES, st.integers(0, 1), st.sampled_from([None, *Role.values])),
)  # fmt: skip


@pytest.fixture(autouse=True)
def routes(db: None) -> None:
    for name in ROUTES:
        make_deployment(route=name)


PLAYS = {
    "first": PROJECTS,
    "second": PROJECTS,
    "roles": st.lists(st.tuples(NAMES, st.integers(0, 1), st.sampled_from(Role.values)), max_size=5),
    "calls": st.lists(CALLS, max_size=10),
}
OPTIONS: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@settings(max_examples=15, **OPTIONS)
@given(**PLAYS)
def test_no_sequence_of_calls_raises_anybodys_permissions(**facts: Any) -> None:
    _undone(**facts)


@pytest.mark.full
@settings(max_examples=300, **OPTIONS)
@given(**PLAYS)
def test_none_of_many_sequences_does(**facts: Any) -> None:
    _undone(**facts)


def _undone(first: dict[str, Any], second: dict[str, Any], roles: list[Any], calls: list[Any]) -> None:
    with transaction.atomic():
        try:
            _play(first, second, roles, calls)
        finally:
            transaction.set_rollback(True)


def _play(first: dict[str, Any], second: dict[str, Any], roles: list[Any], calls: list[Any]) -> None:
    projects = [Project.objects.create(name=f"p{at}", **facts) for at, facts in enumerate((first, second))]
    users = {name: get_user_model().objects.create(username=name) for name in PEOPLE}
    clients = {name: client_of(user) for name, user in users.items()}
    role: dict[tuple[str, int], str] = {}
    for name, at, what in roles:
        set_role(project=projects[at], user=users[name], role=what, by="test")
        role[name, at] = what
    # Keys that administrators made: a program's with more than any member may give, and one of ann's.
    Project.objects.filter(max_keys__isnull=False).update(max_keys=5)
    strong, _ = issue_api_key(name="strong", project=projects[0], by="root", priority=Priority.INTERACTIVE)
    given_keys = {strong.public_id: None}
    if POWERS[role.get(("ann", 0))] >= 2:
        hers, _ = issue_api_key(name="hers", project=projects[0], by="root", owner=users["ann"])
        given_keys[hers.public_id] = "ann"
    texts: dict[str, tuple[str, str, int]] = {}
    for kind, name, at, more in calls:
        held = dict(role)
        if kind == "role":
            if more is None:
                remove_member(project=projects[at], user=users[name], by="test")
                role.pop((name, at), None)
            else:
                set_role(project=projects[at], user=users[name], role=more, by="test")
                role[name, at] = more
        elif kind == "issue":
            body = {key: value for key, value in more.items() if key != "days"}
            if "days" in more:
                body["expires_at"] = (timezone.now() + timedelta(days=more["days"])).isoformat()
            answer = send(clients[name], "keys", {"name": "n", "project": projects[at].pk, **body})
            assert answer.status_code in (201, 400, 403), answer.content
            if answer.status_code == 201:
                assert not {"owner", "role"} & more.keys(), "what cannot be said was refused"
                texts[answer.json()["key"]] = (name, answer.json()["id"], at)
                _is_within(ApiKey.objects.get(public_id=answer.json()["id"]), projects[at], name)
        else:
            keys = list(ApiKey.objects.order_by("pk").values_list("public_id", flat=True))
            public_id = keys[at % len(keys)]
            before = ApiKey.objects.get(public_id=public_id)
            where = projects.index(before.project)
            mine = before.owner is not None and before.owner.username == name
            power = POWERS[role.get((name, where))]
            got = _act(clients[name], kind, public_id, more)
            after = ApiKey.objects.get(public_id=public_id)
            if got is not None:
                assert _may_have(before, mine, power), "a secret of somebody else's key"
                texts[got] = (name, public_id, where)
            if after.revoked_at and not before.revoked_at:
                assert power == 3 or (mine and power == 2)
            rights = ("priority", "scopes", "routes", "expires_at")
            for field in ("owner_id", "project_id", "created_by", *(() if kind == "change" else rights)):
                assert getattr(after, field) == getattr(before, field)
            if any(getattr(after, field) != getattr(before, field) for field in (*rights, "name")):
                assert _may_have(before, mine, power), "a change of somebody else's key"
            if any(getattr(after, field) != getattr(before, field) for field in rights):
                _rights_are_within(after, projects[where])
        # Roles are as administrators made them.
        now = {
            (one.user.get_username(), projects.index(one.project)): one.role
            for one in Membership.objects.all()
        }
        assert now == role
        if kind != "role":
            assert role == held
            if (kind, name, at, more) != calls[-1]:
                continue
        for text, (whose, _, of) in texts.items():
            can = powers(text)
            allowed = {
                (scope, route)
                for scope in projects[of].scopes or Scope.values
                for route in ROUTES
                if not projects[of].routes or any(_like(one, route) for one in projects[of].routes)
            }
            assert can <= allowed
            key = ApiKey.objects.get(public_id=text.split("-")[1])
            if key.owner is not None and POWERS[role.get((key.owner.username, of))] < 2:
                assert not can, "a role that was taken takes its keys along"
            assert key.owner is None or key.owner.username == whose


def _like(pattern: str, route: str) -> bool:
    return pattern == route or (pattern.endswith("*") and route.startswith(pattern[:-1]))


def _may_have(key: ApiKey, mine: bool, power: int) -> bool:
    """A secret of the key, or a say in it."""
    below = PRIORITY_ORDER[Priority(key.priority)] >= PRIORITY_ORDER[Priority(key.project.priority)]
    return (mine and power >= 2) or (key.owner is None and power == 3 and below)


def _is_within(key: ApiKey, project: Project, name: str) -> None:
    assert key.owner is not None
    assert (key.owner.username, key.created_by, key.project) == (name, name, project)
    _rights_are_within(key, project)
    used = ApiKey.objects.usable(timezone.now()).filter(project=project).count()
    assert project.max_keys is None or used <= 5


def _rights_are_within(key: ApiKey, project: Project) -> None:
    assert PRIORITY_ORDER[Priority(key.priority)] >= PRIORITY_ORDER[Priority(project.priority)]
    assert not project.scopes or set(key.scopes) <= set(project.scopes)
    if project.key_days:
        assert key.expires_at is not None
        assert key.expires_at <= key.created_at + timedelta(days=project.key_days, seconds=5)


def _act(client: Client, kind: str, public_id: str, more: Any) -> str | None:
    """Returns a secret that it got."""
    if kind == "change":
        body = {name: value for name, value in more.items() if name != "days"}
        if "days" in more:
            ends = more["days"] and (timezone.now() + timedelta(days=more["days"])).isoformat()
            body["expires_at"] = ends
        answer = send(client, f"keys/{public_id}", body, "patch")
        assert answer.status_code in (200, 400, 403, 404, 409), answer.content
        assert answer.status_code != 200 or not {"owner", "project"} & more.keys()
        assert answer.status_code != 200 or "key" not in answer.json()
        return None
    if kind == "rotate":
        answer = send(client, f"keys/{public_id}/rotate", {"overlap_seconds": more})
        assert answer.status_code in (200, 403, 404, 409), answer.content
        return str(answer.json()["key"]) if answer.status_code == 200 else None
    if kind == "revoke":
        answer = send(client, f"keys/{public_id}/revoke", {})
        assert answer.status_code in (200, 403, 404), answer.content
        return None
    if more == "new":
        answer = client.post("/keys/", {"name": "n", "project": "1"}, follow=True)
    else:
        form = {"overlap": "24", "sure": "yes"}
        answer = client.post(f"/keys/{public_id}/{more}/", form, follow=True)
    import re

    found = re.search(rf"sk-{public_id}-[0-9A-Za-z]{{49}}", answer.content.decode())
    return found[0] if found else None


# -- by hand


MAY = {
    # whose key: what owner, member and viewer get for rotating and for revoking it
    "own": ((200, 200), (200, 200), (403, 403)),
    "another's": ((403, 200), (403, 403), (403, 403)),
    "a program's": ((200, 200), (403, 403), (403, 403)),
    "a strong program's": ((403, 200), (403, 403), (403, 403)),
}


@pytest.mark.parametrize("whose", MAY)
@pytest.mark.parametrize("at", range(3))
def test_each_role_may_do_what_it_says_and_no_more(whose: str, at: int) -> None:
    project = make_project(name="a")
    ann, ben = (get_user_model().objects.create_user(name) for name in ("ann", "ben"))
    for user in (ann, ben):
        set_role(project=project, user=user, role=Role.MEMBER, by="test")
    owner = {"own": ann, "another's": ben}.get(whose)
    priority = Priority.INTERACTIVE if "strong" in whose else Priority.DEFAULT
    key, _ = make_api_key(project=project, owner=owner, priority=priority)
    set_role(project=project, user=ann, role=list(Role)[at], by="test")
    client = client_of(ann)
    for call, status in zip(("rotate", "revoke"), MAY[whose][at], strict=True):
        answer = send(client, f"keys/{key.public_id}/{call}", {})
        assert answer.status_code == status, (call, answer.content)
        if call == "rotate":
            answer = send(client, f"keys/{key.public_id}", {"name": "renamed"}, "patch")
            assert answer.status_code == status, "what may be rotated may be changed"
        key.refresh_from_db()
        assert (key.name == "renamed") is (MAY[whose][at][0] == 200)
        assert (key.secrets.count() == 2) is (MAY[whose][at][0] == 200)
        assert (key.revoked_at is not None) is (call == "revoke" and status == 200)


@pytest.mark.parametrize("most", Priority.values)
def test_nobody_gives_a_key_more_priority_than_the_project_has(most: str) -> None:
    project = make_project(name="a", priority=most)
    ann = get_user_model().objects.create_user("ann")
    set_role(project=project, user=ann, role=Role.OWNER, by="test")
    client = client_of(ann)
    for asked in Priority.values:
        answer = send(client, "keys", {"name": "x", "project": project.pk, "priority": asked})
        allowed = PRIORITY_ORDER[asked] >= PRIORITY_ORDER[most]
        assert answer.status_code == (201 if allowed else 400), (asked, answer.content)
    given = send(client, "keys", {"name": "x", "project": project.pk}).json()["priority"]
    assert PRIORITY_ORDER[given] >= PRIORITY_ORDER[most]


def test_what_an_administrator_gave_is_not_spread() -> None:
    """A key that may do more than its owner could give stays as it is, until it is brought within that."""
    project = make_project(name="a", routes=["alpha*"], scopes=["chat", "models"], key_days=30)
    ann = get_user_model().objects.create_user("ann")
    set_role(project=project, user=ann, role=Role.MEMBER, by="test")
    strong, _ = make_api_key(
        project=project, owner=ann, priority=Priority.INTERACTIVE, routes=["alpha"], scopes=["chat"]
    )
    client, path = client_of(ann), f"keys/{strong.public_id}"
    for change, param in (
        ({"routes": ["alpha", "alpha-2"]}, "priority"),
        ({"routes": []}, "priority"),
        ({"scopes": []}, "priority"),
        ({"addresses": []}, "priority"),
        ({"expires_at": None}, "priority"),
        ({"priority": "interactive"}, "priority"),
        ({"priority": "default", "routes": ["beta"]}, "routes"),
        ({"priority": "default", "scopes": ["usage"]}, "scopes"),
        ({"priority": None, "expires_at": "2999-01-01T00:00:00Z"}, "expires_at"),
        ({"priority": None, "expires_at": (timezone.now() + timedelta(days=31)).isoformat()}, "expires_at"),
    ):
        answer = send(client, path, change, "patch")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), change
    before = strong.expires_at
    strong.refresh_from_db()
    assert (strong.priority, strong.routes, strong.expires_at) == ("interactive", ["alpha"], before)
    answer = send(client, path, {"priority": None, "routes": ["alpha-2"]}, "patch")
    assert answer.status_code == 200, answer.content
    strong.refresh_from_db()
    assert (strong.priority, strong.routes, strong.scopes) == ("default", ["alpha-2"], ["chat"])
    # It never ended; like the other keys of members it does now.
    assert strong.expires_at == strong.created_at + timedelta(days=30)


def test_a_change_prolongs_no_key_beyond_what_the_project_allows() -> None:
    project = make_project(name="a", key_days=30)
    ann = get_user_model().objects.create_user("ann")
    set_role(project=project, user=ann, role=Role.OWNER, by="test")
    key, _ = make_api_key(project=project, owner=ann, expires_at=timezone.now() + timedelta(days=10))
    ApiKey.objects.filter(pk=key.pk).update(created_at=timezone.now() - timedelta(days=20))
    client, path = client_of(ann), f"keys/{key.public_id}"
    later = (timezone.now() + timedelta(days=11)).isoformat()
    assert send(client, path, {"expires_at": later}, "patch").json()["error"]["param"] == "expires_at"
    sooner = (timezone.now() + timedelta(days=9)).isoformat()
    assert send(client, path, {"expires_at": sooner}, "patch").status_code == 200
    # Issued long ago, when the project allowed more: now it can only be called something else.
    ApiKey.objects.filter(pk=key.pk).update(created_at=timezone.now() - timedelta(days=40))
    assert send(client, path, {"routes": ["alpha"]}, "patch").json()["error"]["param"] == "expires_at"
    assert send(client, path, {"name": "other"}, "patch").status_code == 200


@pytest.mark.parametrize("ended", ["revoked", "expired"])
def test_a_key_that_has_ended_is_not_brought_back(ended: str) -> None:
    project = make_project(name="a")
    ann = get_user_model().objects.create_user("ann")
    set_role(project=project, user=ann, role=Role.OWNER, by="test")
    key, _ = make_api_key(project=project, owner=ann)
    over = timezone.now() - timedelta(seconds=1)
    ApiKey.objects.filter(pk=key.pk).update(**{"revoked_at" if ended == "revoked" else "expires_at": over})
    for change in ({"expires_at": None}, {"expires_at": "2999-01-01T00:00:00Z"}, {"name": "x"}):
        assert send(client_of(ann), f"keys/{key.public_id}", change, "patch").status_code == 409
    key.refresh_from_db()
    assert not key.usable(timezone.now())


def test_what_is_not_ones_own_is_not_there() -> None:
    project, other = make_project(name="a"), make_project(name="b")
    ann, ben = (get_user_model().objects.create_user(name) for name in ("ann", "ben"))
    set_role(project=project, user=ann, role=Role.OWNER, by="test")
    set_role(project=other, user=ben, role=Role.OWNER, by="test")
    theirs, _ = make_api_key(project=other, name="theirs")
    client = client_of(ann)
    assert send(client, f"keys/{theirs.public_id}", {"name": "mine"}, "patch").status_code == 404
    for path in (f"keys/{theirs.public_id}/rotate", f"keys/{theirs.public_id}/revoke"):
        assert send(client, path, {}).status_code == 404
    assert client.get(f"/api/v1/keys/{theirs.public_id}").status_code == 404
    assert client.get(f"/api/v1/keys?after={theirs.public_id}").status_code == 404
    assert client.get(f"/api/v1/keys?project={other.pk}").json()["data"] == []
    assert send(client, "keys", {"name": "x", "project": other.pk}).json()["error"]["param"] == "project"
    for path in ("", "secrets/"):
        assert client.get(f"/keys/{theirs.public_id}/{path}").status_code == 404
    for path in ("rotate/", "revoke/"):
        assert client.post(f"/keys/{theirs.public_id}/{path}", {"sure": "yes"}).status_code == 404
    theirs.refresh_from_db()
    assert theirs.revoked_at is None
    assert theirs.secrets.count() == 1


def test_roles_are_changed_by_administrators_only_and_that_is_noted() -> None:
    project = make_project(name="a")
    ann = get_user_model().objects.create_user("ann")
    set_role(project=project, user=ann, role=Role.MEMBER, by="root")
    remove_member(project=project, user=ann, by="root")
    told = list(Event.objects.filter(kind="project", what="role").order_by("id").values_list("reason", "by"))
    assert told == [("ann: nothing → member", "root"), ("ann: member → nothing", "root")]
    # A person of staff without rights in the admin has none through it.
    ann.is_staff = True
    ann.save()
    client = client_of(ann)
    for path in ("registry/project/", "registry/apikey/", f"registry/project/{project.pk}/change/"):
        assert client.get(f"/admin/{path}").status_code == 403
    key, _ = make_api_key(project=project)
    for path in ("rotate", "secrets"):
        assert client.get(f"/admin/registry/apikey/{key.pk}/{path}/").status_code == 403
    assert client.post(f"/admin/registry/apikey/{key.pk}/rotate/", {"overlap": "0"}).status_code == 403
    assert key.secrets.count() == 1


def test_an_api_key_opens_no_management_and_a_session_needs_its_token() -> None:
    project = make_project(name="a")
    ann = get_user_model().objects.create_user("ann")
    set_role(project=project, user=ann, role=Role.OWNER, by="test")
    key, text = make_api_key(project=project, owner=ann, name="hers")
    stranger = Client(headers={"host": "localhost:8000", "authorization": f"Bearer {text}"})
    before = Event.objects.count(), ApiKey.objects.count()
    for method, path in [
        ("get", "projects"), ("get", "keys"), ("post", "keys"), ("get", f"keys/{key.public_id}"),
        ("post", f"keys/{key.public_id}/rotate"), ("post", f"keys/{key.public_id}/revoke"),
        ("patch", f"keys/{key.public_id}"),
    ]:  # fmt: skip
        answer = getattr(stranger, method)(f"/api/v1/{path}", content_type="application/json")
        assert answer.status_code == 401, path
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    forged = Client(headers={"host": "localhost:8000"}, enforce_csrf_checks=True)
    forged.force_login(ann)
    for path in ("keys", f"keys/{key.public_id}/rotate", f"keys/{key.public_id}/revoke"):
        body = {"name": "x", "project": project.pk} if path == "keys" else {}
        assert send(forged, path, body).status_code == 403, path
    assert send(forged, f"keys/{key.public_id}", {"name": "x"}, "patch").status_code == 403
    for path, form in [
        ("", {"name": "x", "project": project.pk}),
        (f"{key.public_id}/rotate/", {"overlap": "0"}),
        (f"{key.public_id}/revoke/", {"sure": "yes"}),
    ]:
        assert forged.post(f"/keys/{path}", form).status_code == 403, path
        assert forged.get(f"/keys/{path}").status_code in (200, 405)
    assert (Event.objects.count(), ApiKey.objects.count()) == before
