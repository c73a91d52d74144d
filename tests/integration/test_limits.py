"""Limits as operators set them: rules, pages, the command, and what the gateways hear of it."""

from __future__ import annotations

import json
import re
from io import StringIO
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.core.exceptions import ValidationError
from django.core.management import CommandError, call_command
from django.db import IntegrityError, transaction
from django.test import Client
from django.urls import reverse

from openai_api.admission import Rule, load_rules
from openai_api.auth import load_key
from registry.actions.gateways import count_gateways, note_gateway
from registry.actions.limits import remove_limit, save_limit
from registry.models import Change, Event, Gateway, Limit, Metric, Per
from registry.models.limit import AMOUNT_MAX
from registry.querysets import database_now
from tests.factories import make_api_key, make_deployment, make_limit, make_project
from webchat.actions import chat_key

pytestmark = pytest.mark.django_db


def person(name: str = "ann") -> Any:
    return get_user_model().objects.create_user(name)


def changes() -> list[str]:
    keys = list(Change.objects.filter(kind="api_key").values_list("key", flat=True))
    Change.objects.all().delete()
    return keys


def buckets(rules: tuple[Rule, ...]) -> dict[str, str]:
    """Whose requests each rule counts together."""
    return {
        rule.subject: rule.bucket.partition("::")[2] or rule.bucket.rpartition(":hour")[2] for rule in rules
    }


# -- what may be set


@pytest.mark.parametrize(
    ("facts", "fields"),
    [
        ({"amount": 0}, {"amount"}),
        ({"amount": AMOUNT_MAX + 1}, {"amount"}),
        ({"burst": 0}, {"burst"}),
        ({"metric": "money"}, {"metric"}),
        ({"per": "week"}, {"per"}),
        ({"per": ""}, {"per"}),
        ({"metric": "parallel", "per": "hour"}, {"per"}),
        ({"metric": "parallel", "per": "", "burst": 2}, {"burst"}),
        ({"each": "gateway"}, {"each"}),
        ({"route": "a b"}, {"route"}),
        ({"route": "*****"}, {"route"}),
        ({"route": "chat", "each_route": True}, {"each_route"}),
        ({"when_redis_is_away": "wait"}, {"when_redis_is_away"}),
    ],
)
def test_what_cannot_be_is_refused_by_field(facts: dict[str, Any], fields: set[str]) -> None:
    limit = Limit(**{"amount": 10, "metric": "requests", "per": "hour"} | facts)
    with pytest.raises(ValidationError) as refused:
        save_limit(limit=limit, by="test")
    assert set(refused.value.message_dict) == fields
    assert not Limit.objects.exists()
    assert not Event.objects.exists()


def test_a_limit_names_one_subject_and_does_not_divide_it_by_itself() -> None:
    api_key, _ = make_api_key()
    for facts, field in (
        ({"api_key": api_key, "project": api_key.project}, "project"),
        ({"project": api_key.project, "user": person()}, "user"),
        ({"api_key": api_key, "each": "user"}, "each"),
        ({"project": api_key.project, "each": "project"}, "each"),
        ({"user": get_user_model().objects.get(), "each": "user"}, "each"),
    ):
        with pytest.raises(ValidationError) as refused:
            make_limit(**facts)
        assert set(refused.value.message_dict) == {field}


def test_there_is_one_limit_of_a_kind() -> None:
    make_limit(5)
    make_limit(5, per="minute")
    make_limit(5, each="key")
    make_limit(5, route="chat")
    with pytest.raises(ValidationError, match="There is a limit of this kind already"):
        make_limit(6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"amount": 0},
        {"amount": AMOUNT_MAX + 1},
        {"burst": 0},
        {"metric": "money"},
        {"per": "week"},
        {"per": ""},
        {"metric": "parallel"},
        {"each": "gateway"},
        {"when_redis_is_away": "wait"},
    ],
)
def test_the_database_holds_the_rules_too(wrong: dict[str, Any]) -> None:
    limit = make_limit()
    with pytest.raises(IntegrityError), transaction.atomic():
        Limit.objects.filter(pk=limit.pk).update(**wrong)
    with pytest.raises(IntegrityError), transaction.atomic():
        Limit.objects.create(amount=3, metric="requests", per="hour")


def test_it_tells_what_it_does() -> None:
    project = make_project(name="web")
    assert make_limit(60, per="minute", project=project, each="key", route="smol*").effect == (
        "Each key of project web, on model smol*: at most 60 requests per minute. What is beyond gets 429 "
        "and is told when to try again. While Redis is away each gateway counts its share."
    )
    assert str(make_limit(1_000_000, "tokens", "day", burst=5_000, each_route=True)) == (
        "everybody together, on each model: 1,000,000 tokens per day, 5,000 at once"
    )
    assert str(make_limit(4, "parallel", user=person())) == "person ann: 4 parallel requests"


# -- what a key meets


def test_a_key_meets_its_own_limits_its_projects_its_owners_and_everybodys() -> None:
    ann, bob = person("ann"), person("bob")
    web, lab = make_project(name="web"), make_project(name="lab")
    mine, _ = make_api_key(name="mine", project=web)
    mine.owner = ann
    mine.save()
    other, _ = make_api_key(name="other", project=lab)
    for facts in (
        *({"api_key": mine}, {"api_key": other}, {"project": web}, {"project": lab}),
        *({"user": ann}, {"user": bob}, {}, {"each": "key"}, {"each": "project"}, {"each": "user"}),
        {"project": web, "each": "key"},
    ):
        make_limit(**facts)
    found = load_key(mine.public_id)
    assert found is not None
    assert buckets(found.rules) == {
        "key mine": "",
        "project web": "",
        "person ann": "",
        "everybody together": "",
        "each key": f":{mine.public_id}",
        "each project": f":{web.pk}",
        "each person": f":{ann.pk}",
        "each key of project web": f":{mine.public_id}",
    }
    theirs = load_key(other.public_id)
    assert theirs is not None
    # Nobody is behind it: it shares with no person, and no limit of each person's concerns it.
    assert set(buckets(theirs.rules)) == {
        *("key other", "project lab", "everybody together", "each key", "each project"),
    }
    chat = chat_key(bob)
    assert set(buckets(chat.rules)) == {
        *("person bob", "everybody together", "each key", "each project", "each person"),
    }
    assert buckets(chat.rules)["each person"] == f":{bob.pk}"


def test_a_changed_amount_keeps_the_count_and_another_time_begins_anew() -> None:
    limit = make_limit(10)

    def rule() -> Rule:
        (found,) = load_rules(api_key=None, public_id="k", project_id=1, user_id=None)
        return found

    before = rule()
    limit.amount, limit.burst = 20, 5
    save_limit(limit=limit, by="test")
    assert rule().bucket == before.bucket
    assert (rule().amount, rule().burst) == (20, 5)
    limit.per = Per.DAY
    save_limit(limit=limit, by="test")
    assert rule().bucket != before.bucket


def test_gateways_hear_of_each_change() -> None:
    api_key, _ = make_api_key()
    changes()
    limit = make_limit(api_key=api_key)
    assert changes() == [api_key.public_id]
    limit.api_key, limit.project = None, api_key.project
    save_limit(limit=limit, by="test")
    assert set(changes()) == {api_key.public_id, "*"}
    remove_limit(limit=limit, by="test")
    assert changes() == ["*"]
    told = Event.objects.filter(kind="limit").order_by("id").values_list("what", flat=True)
    assert list(told) == ["set", "changed", "removed"]


def test_live_gateways_are_counted() -> None:
    assert count_gateways() == 0
    for name in ("a", "b", "c"):
        note_gateway(name=name, unbroken=False)
    Gateway.objects.filter(name="b").update(seen_at=database_now().replace(year=2020))
    assert count_gateways() == 2


# -- the command


def run(*arguments: str) -> str:
    out = StringIO()
    call_command("limit", *arguments, stdout=out)
    return out.getvalue()


def test_the_command_sets_lists_changes_and_removes() -> None:
    make_deployment(route="chat")
    api_key, _ = make_api_key(name="search")
    assert "There is no limit" in run("list")
    said = run("set", "requests", "60/minute", "--key", "search", "--route", "chat")
    assert "Key search, on model chat: at most 60 requests per minute." in said
    # The same again changes it.
    run("set", "requests", "30/minute", "--key", "search", "--route", "chat", "--burst", "5")
    limit = Limit.objects.get()
    assert (limit.api_key, limit.amount, limit.burst) == (api_key, 30, 5)
    run("set", "parallel", "8", "--each", "project", "--when-redis-is-away", "closed")
    listed = run("list")
    assert re.search(r"key search, on model chat +30 requests per minute, 5 at once +local", listed)
    assert re.search(r"each project +8 parallel requests +closed", listed)
    facts = json.loads(run("list", "--json"))
    assert [one["amount"] for one in facts] == [30, 8]
    assert facts[0]["key"] == f"sk-{api_key.public_id}"
    assert "Removed: key search" in run("remove", str(limit.pk))
    assert Limit.objects.get().metric == Metric.PARALLEL


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["set", "requests", "60/week"], "such as 60/minute"),
        (["set", "requests", "many"], "such as 60/minute"),
        (["set", "requests", "60"], "per: Say in which time"),
        (["set", "requests", "0/minute"], "amount: "),
        (["set", "parallel", "4/minute"], "per: Parallel requests"),
        (["set", "requests", "60/minute", "--route", "nope"], "There is no route nope"),
        (["set", "requests", "60/minute", "--key", "nope"], "There is no such key"),
        (["set", "requests", "60/minute", "--project", "nope"], "There is no project nope"),
        (["set", "requests", "60/minute", "--user", "nope"], "There is no user nope"),
        (["set", "requests", "60/minute", "--key", "a", "--user", "b"], "not allowed with argument"),
        (["set", "money", "60/minute"], "invalid choice"),
        (["remove", "99"], "There is no limit 99"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], told: str) -> None:
    with pytest.raises(CommandError, match=re.escape(told)):
        run(*arguments)
    assert not Limit.objects.exists()


# -- the pages


def page(what: str, *args: Any) -> str:
    return reverse(f"admin:registry_limit_{what}", args=args)


@pytest.fixture
def operator() -> Client:
    client = Client(headers={"host": "localhost:8000"})
    client.force_login(get_user_model().objects.create_superuser("olga", password="x"))
    return client


FORM = {"metric": "requests", "amount": "60", "per": "minute", "when_redis_is_away": "local", "each": "key"}


def test_the_page_sets_a_limit_and_shows_what_it_does(operator: Client) -> None:
    make_deployment(route="chat")
    answer = operator.post(page("add"), FORM | {"route": "chat"}, follow=True)
    assert "Each key, on model chat: at most 60 requests per minute." in answer.content.decode()
    limit = Limit.objects.get()
    assert changes()[-1] == "*"
    shown = operator.get(page("change", limit.pk)).content.decode()
    assert "While Redis is away each gateway counts its share." in shown
    assert "olga" in shown, "the timeline says who set it"
    operator.post(page("change", limit.pk), FORM | {"route": "chat", "amount": "70"})
    limit.refresh_from_db()
    assert limit.amount == 70
    operator.post(page("delete", limit.pk), {"post": "yes"})
    assert not Limit.objects.exists()
    assert Event.objects.filter(kind="limit", what="removed", by="olga").exists()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"amount": "0"}, "greater than or equal to 1"),
        ({"per": ""}, "Say in which time"),
        ({"route": "nope"}, "There is no such model"),
        ({"metric": "parallel"}, "leave this empty"),
    ],
)
def test_the_page_says_what_is_wrong_at_the_field(operator: Client, wrong: dict[str, str], told: str) -> None:
    answer = operator.post(page("add"), FORM | wrong)
    assert answer.status_code == 200
    (errors,) = answer.context["adminform"].form.errors.values()
    assert told in " ".join(errors)
    assert not Limit.objects.exists()


def test_who_may_only_look_may_not_set(operator: Client) -> None:
    limit = make_limit()
    watcher = get_user_model().objects.create_user("wim", is_staff=True)
    watcher.user_permissions.add(Permission.objects.get(codename="view_limit"))
    client = Client(headers={"host": "localhost:8000"})
    client.force_login(watcher)
    assert client.get(page("change", limit.pk)).status_code == 200
    assert client.post(page("change", limit.pk), FORM).status_code == 403
    assert client.post(page("add"), FORM).status_code == 403
    assert client.post(page("delete", limit.pk), {"post": "yes"}).status_code == 403
    limit.refresh_from_db()
    assert limit.amount == 10
