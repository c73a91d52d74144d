"""`manage.py budget`."""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from registry.actions.usage import record_usage
from registry.models import Budget, Route
from registry.querysets import database_now
from tests.factories import make_api_key, make_budget, make_project
from tests.usage import make_event


def run(*words: str) -> str:
    out = StringIO()
    call_command("budget", *words, stdout=out)
    return out.getvalue()


@pytest.mark.django_db
def test_a_budget_is_made_changed_listed_and_removed(django_user_model: Any) -> None:
    django_user_model.objects.create_user("anna")
    Route.objects.create(name="chat")
    make_project(name="Team Blue")
    api_key, text = make_api_key(name="robot")
    run("set", "--project", "Team Blue", "--limit", "100")
    run("set", "--project", "Team Blue", "--limit", "120.5", "--mail", "a@example.org")
    run("set", "--project", "Team Blue", "--limit", "90", "--soft")
    run("set", "--key", text, "--limit", "5000", "--tokens", "--per", "day")
    run("set", "--user", "anna", "--limit", "1", "--per", "total")
    run("set", "--route", "chat", "--limit", "7")
    budget = Budget.objects.get(scope="project", hard=True)
    assert (budget.limit, budget.mail_to, budget.period, budget.unit) == (
        *(120_500_000, "a@example.org"),
        *("month", "money"),
    )
    assert Budget.objects.count() == 5
    record_usage(
        [
            make_event(
                started_at=database_now(),
                key_public_id=api_key.public_id,
                prompt_tokens=10,
                completion_tokens=5,
            )
        ]
    )
    listed = run("list")
    assert "120.50 USD" in listed
    facts = {fact["id"]: fact for fact in json.loads(run("list", "--json"))}
    mine = facts[Budget.objects.get(scope="key").pk]
    assert (mine["subject"], mine["limit"], mine["spent"], mine["held"]) == ("robot", 5000, 15, 0)
    run("remove", str(budget.pk))
    assert not Budget.objects.filter(pk=budget.pk).exists()


@pytest.mark.django_db
@pytest.mark.parametrize(
    "words",
    [
        ("set", "--key", "nobody", "--limit", "1"),
        ("set", "--project", "nobody", "--limit", "1"),
        ("set", "--user", "nobody", "--limit", "1"),
        ("set", "--route", "nobody", "--limit", "1"),
        ("set", "--route", "chat", "--limit", "-1"),
        ("set", "--route", "chat", "--limit", "1e12"),
        ("set", "--route", "chat", "--limit", "1.5", "--tokens"),
        ("set", "--route", "chat", "--limit", "1", "--web-hook", "ftp://example.org/"),
        ("set", "--route", "chat", "--limit", "1", "--mail", "nobody"),
        ("set", "--route", "chat", "--key", "x", "--limit", "1"),
        ("set", "--limit", "1"),
        ("remove", "12345"),
    ],
)
def test_what_makes_no_budget_is_refused(words: tuple[str, ...]) -> None:
    Route.objects.create(name="chat")
    with pytest.raises(CommandError):
        run(*words)
    assert not Budget.objects.exists()


@pytest.mark.django_db
def test_the_list_does_not_show_web_hooks() -> None:
    make_budget(limit=1, webhook_url="https://hooks.example/s3cr3t")
    assert "s3cr3t" not in run("list") + run("list", "--json")
