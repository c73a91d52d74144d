"""S23: what may be set is listed field by field. Anything else is refused, and changes nothing."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.forms.models import model_to_dict
from django.test import Client
from django.utils import timezone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.actions.own_keys import issue_own_key
from registry.actions.projects import set_role
from registry.models import ApiKey, KeySecret, Membership, Project
from registry.rights import Role
from tests.factories import make_project

pytestmark = pytest.mark.django_db

FORBIDDEN = [
    "user", "user_id", "owner", "owner_id", "created_by", "is_staff", "is_superuser", "is_active", "role",
    "quota", "spend", "spent", "budget", "budgets", "limits", "price", "cost_micros", "id", "pk", "public_id",
    "key", "secret", "secrets", "digest", "pepper", "last4", "created", "created_at", "revoked_at", "revoked",
    "last_used_at", "cidrs", "project_id", "max_keys", "key_days", "time_zone", "members", "__class__",
]  # fmt: skip


class Person:
    def __init__(self) -> None:
        self.user = get_user_model().objects.create_user("ann")
        self.other = get_user_model().objects.create_user("ben")
        self.project = make_project(name="a")
        set_role(project=self.project, user=self.user, role=Role.MEMBER, by="test")
        self.key, _ = issue_own_key(user=self.user, project=self.project, name="hers")
        self.client = Client(headers={"host": "localhost:8000"})
        self.client.force_login(self.user)

    def post(self, path: str, body: Any, how: str = "post") -> Any:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        return getattr(self.client, how)(f"/api/v1/{path}", sent, content_type="application/json")

    def patch(self, body: Any) -> Any:
        return self.post(f"keys/{self.key.public_id}", body, "patch")


@pytest.fixture
def person(db: None) -> Person:
    return Person()


def everything() -> list[Any]:
    models = (ApiKey, KeySecret, Project, Membership, get_user_model())
    return [
        model_to_dict(one) | {"pk": one.pk}
        for model in models
        for one in model._default_manager.order_by("pk")
    ]  # type: ignore[attr-defined]


@pytest.mark.parametrize("call", ["keys", "rotate", "revoke", "change"])
def test_what_nobody_may_say_is_refused_by_name(person: Person, call: str) -> None:
    path = "keys" if call == "keys" else f"keys/{person.key.public_id}/{call}"
    path, how = (path.removesuffix("/change"), "patch") if call == "change" else (path, "post")
    body = {"name": "x", "project": person.project.pk} if call == "keys" else {}
    before = everything()
    for field in [*FORBIDDEN, *(["project"] if call == "change" else [])]:
        for value in (person.other.pk, {"id": 1}):
            answer = person.post(path, {**body, field: value}, how)
            assert answer.status_code == 400, (field, value)
            error = answer.json()["error"]
            assert (error["param"], error["code"]) == (field, "unknown_parameter")
    assert everything() == before


def test_a_form_takes_no_more_than_it_shows(person: Person) -> None:
    form = {"name": "x", "project": person.project.pk}
    person.client.post("/keys/", form | dict.fromkeys(FORBIDDEN, "1") | {"cidrs": "10.0.0.0/8"})
    key = ApiKey.objects.latest("pk")
    assert (key.name, key.owner, key.created_by, key.cidrs) == ("x", person.user, "ann", ["10.0.0.0/8"])
    assert key.revoked_at is None
    assert key.public_id != "1"
    assert key.created_at > timezone.now() - timedelta(minutes=1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 121}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "a\x00b"}, "name"),
        ({"name": 5}, "name"),
        ({"project": "1"}, "project"),
        ({"project": 2**63}, "project"),
        ({"routes": ["a b"]}, "routes"),
        ({"routes": ["x"] * 201}, "routes"),
        ({"scopes": ["everything"]}, "scopes"),
        ({"scopes": "chat"}, "scopes"),
        ({"addresses": ["10.0.0.0/40"]}, "addresses"),
        ({"addresses": ["nowhere"]}, "addresses"),
        ({"priority": "first"}, "priority"),
        ({"priority": "interactive"}, "priority"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"metadata": {"a" * 65: "b"}}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"expires_at": "soon"}, "expires_at"),
        ({"expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": 5}, "expires_at"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(person: Person, body: dict[str, Any], param: str) -> None:
    answer = person.post("keys", {"name": "x", "project": person.project.pk} | body)
    assert answer.status_code == 400, answer.content
    assert answer.json()["error"]["param"] == param
    assert ApiKey.objects.count() == 1
    if param != "project":
        before = everything()
        answer = person.patch(body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert everything() == before


def test_what_may_be_changed_of_a_key(person: Person) -> None:
    change = {
        "name": "y" * 120,
        "routes": ["smol*", "chat"],
        "scopes": ["models", "chat"],
        "addresses": ["10.0.0.0/8", "2001:db8::1"],
        "priority": "batch",
        "metadata": {"a" * 64: "b" * 512},
        "expires_at": "2999-01-01T00:00:00Z",
    }
    for field, value in change.items():
        before = person.client.get(f"/api/v1/keys/{person.key.public_id}").json()
        answer = person.patch({field: value})
        assert answer.status_code == 200, (field, answer.content)
        told = answer.json()
        assert told[field] == (sorted(value) if field in ("routes", "scopes") else value)
        assert {name: one for name, one in told.items() if name != field} == {
            name: one for name, one in before.items() if name != field
        }
    for field, default in (("expires_at", None), ("priority", "default")):
        assert person.patch({field: None}).json()[field] == default
    assert person.patch({"routes": [], "scopes": [], "addresses": [], "metadata": {}}).status_code == 200
    before = everything()
    assert person.patch({}).status_code == 200
    assert everything() == before
    person.key.refresh_from_db()
    assert person.key.owner == person.user
    assert person.key.secrets.count() == 1


def test_what_may_be_said_at_its_bounds(person: Person) -> None:
    body = {
        "name": "x" * 120,
        "project": person.project.pk,
        "routes": ["smol*"],
        "scopes": ["chat", "models"],
        "addresses": ["10.0.0.0/8", "2001:db8::1"],
        "priority": "batch",
        "metadata": {"a" * 64: "b" * 512},
        "expires_at": "2999-01-01T00:00:00",
    }
    answer = person.post("keys", body)
    assert answer.status_code == 201, answer.content
    told = answer.json()
    assert {name: told[name] for name in body if name != "expires_at"} == {
        name: value for name, value in body.items() if name != "expires_at"
    }
    assert (told["state"], told["owner"]) == ("usable", "ann")
    assert told["expires_at"] == "2999-01-01T00:00:00Z"
    listed = person.client.get("/api/v1/keys").json()["data"]
    assert [key["id"] for key in listed] == [told["id"], person.key.public_id]
    assert all("key" not in key for key in listed), "shown once"
    answer = person.post(f"keys/{told['id']}/rotate", {"overlap_seconds": 60})
    assert [secret["works"] for secret in answer.json()["secrets"]] == [True, True]
    assert answer.json()["key"].startswith(f"sk-{told['id']}-")
    answer = person.post(f"keys/{told['id']}/revoke", {"reason": "lost"})
    assert answer.json()["state"] == "revoked"
    assert [secret["works"] for secret in answer.json()["secrets"]] == [False, False]
    assert person.post(f"keys/{told['id']}/rotate", {}).status_code == 409
    assert person.client.get("/api/v1/projects").json()["data"][0]["role"] == "member"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.dictionaries(
        st.sampled_from(["name", "project", "routes", "scopes", "addresses", "metadata", *FORBIDDEN]), JSON
    )
    | JSON
    | st.binary(max_size=30)
)
def test_no_body_whatever_is_a_fault_or_makes_somebody_elses_key(person: Person, body: Any) -> None:
    for path in ("keys", f"keys/{person.key.public_id}/rotate"):
        assert person.post(path, body).status_code in (200, 201, 400, 409, 413)
    assert person.patch(body).status_code in (200, 400, 413)
    assert not ApiKey.objects.exclude(owner=person.user).exists()
