"""Budgets and prices in the admin."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.test import Client
from django.urls import reverse

from registry.actions.usage import record_usage
from registry.models import Budget, Price, Route
from registry.querysets import database_now
from tests.factories import make_api_key, make_budget, make_price, make_project
from tests.usage import make_event

pytestmark = pytest.mark.django_db
HOOK = "https://hooks.example/s3cr3t"


def client_of(*permissions: str) -> Client:
    """Logged in: a superuser, or one with these rights only."""
    client = Client(headers={"host": "localhost:8000"})
    people = get_user_model().objects
    if not permissions:
        client.force_login(people.create_superuser("olga", password="x"))
        return client
    person = people.create_user("vera", password="x", is_staff=True)
    person.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    client.force_login(person)
    return client


def errors_of(response: Any) -> dict[str, Any]:
    return dict(response.context["adminform"].form.errors)


BUDGET = {
    "scope": "project",
    "subject": "Team Blue",
    "unit": "money",
    "period": "month",
    "amount": "12.50",
    "hard": "on",
    "mail_to": "",
    "webhook_url": HOOK,
}
ADD_BUDGET = "admin:registry_budget_add"


def test_a_budget_is_made_by_names_and_amounts_of_money() -> None:
    project = make_project(name="Team Blue")
    answer = client_of().post(reverse(ADD_BUDGET), BUDGET)
    assert answer.status_code == 302
    budget = Budget.objects.get()
    assert (budget.subject, budget.subject_name, budget.limit) == (str(project.pk), "Team Blue", 12_500_000)
    assert budget.created_by == "olga"


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("subject", "Nobody", "subject"),
        ("amount", "-1", "amount"),
        ("amount", "0.0000001", "amount"),
        ("amount", "1e15", "amount"),
        ("webhook_url", "ftp://example.org", "webhook_url"),
        ("mail_to", "nobody", "mail_to"),
        ("scope", "planet", "scope"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_at_its_field(field: str, value: str, named: str) -> None:
    make_project(name="Team Blue")
    answer = client_of().post(reverse(ADD_BUDGET), BUDGET | {field: value})
    assert answer.status_code == 200
    assert named in errors_of(answer)
    assert not Budget.objects.exists()


def test_half_a_token_and_the_same_budget_twice_are_refused() -> None:
    make_project(name="Team Blue")
    olga = client_of()
    assert "amount" in errors_of(olga.post(reverse(ADD_BUDGET), BUDGET | {"unit": "tokens"}))
    assert olga.post(reverse(ADD_BUDGET), BUDGET).status_code == 302
    assert olga.post(reverse(ADD_BUDGET), BUDGET).status_code == 200
    assert Budget.objects.count() == 1


def test_a_budgets_limit_is_changed_and_whose_it_is_is_not() -> None:
    budget = make_budget(limit=100)
    page = reverse("admin:registry_budget_change", args=[budget.pk])
    olga = client_of()
    changed = {"amount": "250", "subject": "other", "unit": "money", "mail_to": "", "webhook_url": ""}
    assert olga.post(page, changed).status_code == 302
    budget.refresh_from_db()
    assert (budget.limit, budget.hard, budget.subject, budget.unit) == (250, False, "abc", "tokens")


def test_the_list_says_what_is_used() -> None:
    make_budget(limit=1000)
    record_usage([make_event(started_at=database_now(), prompt_tokens=123)])
    text = client_of().get(reverse("admin:registry_budget_changelist")).content.decode()
    assert "123 tokens (12 %)" in text


def test_a_web_hook_is_shown_only_to_those_who_may_change_it() -> None:
    api_key, _ = make_api_key()
    budget = make_budget(limit=1000, subject=api_key.public_id, webhook_url=HOOK)
    page = reverse("admin:registry_budget_change", args=[budget.pk])
    assert "s3cr3t" in client_of().get(page).content.decode()
    vera = client_of("view_budget")
    looked = vera.get(page)
    assert looked.status_code == 200
    assert "s3cr3t" not in looked.content.decode()
    assert vera.post(page, {"amount": "5", "webhook_url": "https://evil.example/"}).status_code == 403
    assert vera.post(reverse(ADD_BUDGET), BUDGET).status_code == 403
    budget.refresh_from_db()
    assert (budget.limit, budget.webhook_url) == (1000, HOOK)


PRICE = {"route": "chat", "starts_at_0": "2026-03-01", "starts_at_1": "00:00:00", "input_micros": "0.15"}


def test_a_price_is_entered_in_the_currency_and_never_edited() -> None:
    Route.objects.create(name="chat")
    olga = client_of()
    assert olga.post(reverse("admin:registry_price_add"), PRICE | {"output_micros": "0.6"}).status_code == 302
    price = Price.objects.get()
    assert (price.input_micros, price.cached_micros, price.output_micros) == (150_000, None, 600_000)
    assert price.created_by == "olga"
    page = reverse("admin:registry_price_change", args=[price.pk])
    assert "0.15 USD" in olga.get(page).content.decode()
    assert olga.post(page, PRICE | {"input_micros": "9"}).status_code == 403
    assert olga.post(reverse("admin:registry_price_delete", args=[price.pk])).status_code == 403
    price.refresh_from_db()
    assert price.input_micros == 150_000


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("route", "nowhere", "route"),
        ("input_micros", "-1", "input_micros"),
        ("output_micros", "10001", "output_micros"),
        ("cached_micros", "0.0000001", "cached_micros"),
        ("starts_at_0", "soon", "starts_at"),
    ],
)
def test_a_price_that_cannot_be_is_refused_at_its_field(field: str, value: str, named: str) -> None:
    Route.objects.create(name="chat")
    answer = client_of().post(reverse("admin:registry_price_add"), PRICE | {field: value})
    assert answer.status_code == 200
    assert named in errors_of(answer)
    assert not Price.objects.exists()


def test_the_list_says_which_price_is_in_force() -> None:
    make_price("chat", input_micros=1)
    make_price("chat", input_micros=2)
    text = client_of().get(reverse("admin:registry_price_changelist")).content.decode()
    assert text.count(">in force<") == 1
    assert text.count(">over<") == 1
