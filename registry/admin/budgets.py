"""Budgets, and what is used of them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from django import forms
from django.conf import settings
from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django.http import HttpRequest

from registry.actions.budgets import amount_text, current_periods, delete_budget, find_subject, save_budget
from registry.admin.common import by, timeline
from registry.errors import InvalidInput
from registry.models import Budget, BudgetPeriod
from registry.models.budget import MOST_LIMIT, BudgetUnit
from registry.querysets import database_now

FIXED = ["scope", "subject", "unit", "period"]


class BudgetForm(forms.ModelForm):
    """The limit as an amount of the currency, or of tokens."""

    amount = forms.DecimalField(
        label="Limit",
        min_value=0,
        max_digits=16,
        decimal_places=6,
        help_text=f"In {settings.ROUNDHOUSE_CURRENCY}, or tokens.",
    )

    class Meta:
        model = Budget
        fields = [*FIXED, "hard", "mail_to", "webhook_url"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "subject" in self.fields:
            self.fields["subject"].help_text = (
                "The key's public part (sk-…), or the name of the project, person or model. "
                "A model's budget counts its adapters too."
            )
        if self.instance.pk is not None and "amount" in self.fields:
            self.fields["amount"].initial = _amount(self.instance)

    def clean(self) -> dict[str, Any]:
        cleaned: dict[str, Any] = super().clean() or self.cleaned_data
        if "subject" in cleaned and "scope" in cleaned:
            try:
                subject, name = find_subject(cleaned["scope"], cleaned["subject"])
            except InvalidInput as error:
                raise ValidationError({error.field: error.message}) from error
            cleaned["subject"] = subject
            self.instance.subject_name = name[:150]
        amount = cleaned.get("amount")
        if amount is not None:
            if cleaned.get("unit", self.instance.unit) == BudgetUnit.MONEY:
                amount = amount.scaleb(6)
            if amount != int(amount):
                raise ValidationError({"amount": "Tokens are counted whole."})
            if amount > MOST_LIMIT:
                raise ValidationError({"amount": "That is more than can be counted."})
            self.instance.limit = int(amount)
        return cleaned


def _amount(budget: Budget) -> Decimal:
    if budget.unit == BudgetUnit.MONEY:
        return Decimal(budget.limit).scaleb(-6)
    return Decimal(budget.limit)


@admin.register(Budget)
class BudgetAdmin(admin.ModelAdmin):
    """The web hook may have a secret in its URL: shown only to those who may change it."""

    form = BudgetForm
    list_display = ["whose", "limit_text", "period", "kind", "used", "set_aside", "begins_anew"]
    list_filter = ["scope", "unit", "period", "hard"]
    search_fields = ["subject", "subject_name"]
    search_help_text = "Key, project, person or model."
    facts = ["used", "set_aside", "begins_anew", "effect", "events"]

    def get_fields(self, request: HttpRequest, obj: Budget | None = None) -> Any:
        if obj is None:
            return [*FIXED, "amount", "hard", "mail_to", "webhook_url"]
        if not self.has_change_permission(request, obj):
            return ["whose", "limit_text", "period", "kind", "mail_to", "has_web_hook", *self.facts]
        return ["whose", "unit", "period", "amount", "hard", "mail_to", "webhook_url", *self.facts]

    def get_readonly_fields(self, request: HttpRequest, obj: Budget | None = None) -> Any:
        if obj is None:
            return ()
        if not self.has_change_permission(request, obj):
            return self.get_fields(request, obj)
        return ["whose", "unit", "period", *self.facts]

    def _period(self, obj: Budget) -> BudgetPeriod | None:
        # Three columns ask for it: kept with the object.
        if "running_period" not in obj.__dict__:
            obj.__dict__["running_period"] = current_periods([obj], database_now()).get(obj.pk)
        period: BudgetPeriod | None = obj.__dict__["running_period"]
        return period

    @admin.display(description="of", ordering="subject_name")
    def whose(self, obj: Budget) -> str:
        return f"{obj.scope} {obj.subject_name or obj.subject}"

    @admin.display(description="limit", ordering="limit")
    def limit_text(self, obj: Budget) -> str:
        return amount_text(obj, obj.limit)

    @admin.display(description="kind", ordering="hard")
    def kind(self, obj: Budget) -> str:
        return "hard" if obj.hard else "soft"

    @admin.display(description="used")
    def used(self, obj: Budget) -> str:
        period = self._period(obj)
        spent = period.spent if period else 0
        share = f" ({100 * spent // obj.limit} %)" if obj.limit else ""
        return f"{amount_text(obj, spent)}{share}"

    @admin.display(description="set aside for running requests")
    def set_aside(self, obj: Budget) -> str:
        period = self._period(obj)
        return amount_text(obj, period.held if period else 0)

    @admin.display(description="begins anew")
    def begins_anew(self, obj: Budget) -> str:
        period = self._period(obj)
        return f"{period.end:%Y-%m-%d %H:%M} UTC" if period and period.end else "-"

    @admin.display(description="web hook", boolean=True)
    def has_web_hook(self, obj: Budget) -> bool:
        return bool(obj.webhook_url)

    @admin.display(description="effect")
    def effect(self, obj: Budget) -> str:
        if obj.hard:
            return "A request that could go over it is refused with 429 before it begins."
        return "Nothing is refused; notices are sent at 50, 80 and 100 %."

    @admin.display(description="timeline")
    def events(self, obj: Budget) -> str:
        return timeline(obj)

    def save_model(self, request: HttpRequest, obj: Budget, form: Any, change: bool) -> None:
        save_budget(budget=obj, by=by(request))
        messages.info(request, f"{self.effect(obj)} Every gateway goes by it within a second.")

    def delete_model(self, request: HttpRequest, obj: Budget) -> None:
        delete_budget(budget=obj, by=by(request))

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Budget]) -> None:
        for obj in queryset:
            delete_budget(budget=obj, by=by(request))
