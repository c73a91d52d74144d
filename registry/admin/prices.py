"""Prices: entered, never edited."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from django import forms
from django.conf import settings
from django.contrib import admin
from django.http import HttpRequest

from registry.actions.prices import set_price
from registry.adapters import model_names
from registry.admin.common import by
from registry.models import Price
from registry.models.price import MOST_MICROS
from registry.querysets import database_now

MOST = MOST_MICROS // 1_000_000


class PriceForm(forms.ModelForm):
    """Amounts of the currency, where the table has millionths of it."""

    route = forms.ChoiceField(required=False, label="model")

    class Meta:
        model = Price
        fields = ["route", "starts_at"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "route" not in self.fields:
            # Somebody who may only look.
            return
        self.fields["route"].choices = [  # type: ignore[attr-defined]
            ("", "every model without a price of its own"),
            *((name, name) for name in model_names()),
        ]
        for name, what in AMOUNTS.items():
            self.fields[name] = forms.DecimalField(
                label=what,
                required=False,
                min_value=0,
                max_value=MOST,
                max_digits=11,
                decimal_places=6,
                help_text=f"{settings.ROUNDHOUSE_CURRENCY}. Empty: {_EMPTY.get(name, 'nothing')}.",
            )

    def clean(self) -> dict[str, Any]:
        cleaned: dict[str, Any] = super().clean() or self.cleaned_data
        for name in AMOUNTS:
            amount = cleaned.get(name)
            empty = None if name == "cached_micros" else 0
            setattr(self.instance, name, empty if amount is None else int(amount.scaleb(6)))
        return cleaned


AMOUNTS = {
    "input_micros": "input, per million prompt tokens",
    "cached_micros": "cached input, per million prompt tokens",
    "output_micros": "output, per million generated tokens",
    "request_micros": "per answered request",
    "gpu_second_micros": "per GPU-second",
}
_EMPTY = {"cached_micros": "as other input"}


@admin.register(Price)
class PriceAdmin(admin.ModelAdmin):
    form = PriceForm
    list_display = ["whose", "starts_at", "input", "cached", "output", "request_price", "gpu_second", "state"]
    list_filter = ["starts_at"]
    search_fields = ["route"]
    search_help_text = "Model."

    def get_fields(self, request: HttpRequest, obj: Price | None = None) -> Any:
        if obj is None:
            return ["route", "starts_at", *AMOUNTS]
        shown = ["whose", "starts_at", "input", "cached", "output", "request_price", "gpu_second"]
        return [*shown, "state", "created_at", "created_by"]

    def get_readonly_fields(self, request: HttpRequest, obj: Price | None = None) -> Any:
        return () if obj is None else self.get_fields(request, obj)

    def get_form(
        self, request: HttpRequest, obj: Price | None = None, change: bool = False, **kwargs: Any
    ) -> Any:
        # The amounts are the form's own fields, which Django would look for in the table's.
        return super().get_form(
            request, obj, **kwargs | {"fields": ["route", "starts_at"] if obj is None else []}
        )

    def has_change_permission(self, request: HttpRequest, obj: Price | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Price | None = None) -> bool:
        return False

    def save_model(self, request: HttpRequest, obj: Price, form: Any, change: bool) -> None:
        set_price(price=obj, by=by(request))

    @admin.display(description="model", ordering="route")
    def whose(self, obj: Price) -> str:
        return obj.route or "every other"

    @admin.display(description="input")
    def input(self, obj: Price) -> str:
        return _amount(obj.input_micros)

    @admin.display(description="cached input")
    def cached(self, obj: Price) -> str:
        return _amount(obj.input_micros if obj.cached_micros is None else obj.cached_micros)

    @admin.display(description="output")
    def output(self, obj: Price) -> str:
        return _amount(obj.output_micros)

    @admin.display(description="request")
    def request_price(self, obj: Price) -> str:
        return _amount(obj.request_micros)

    @admin.display(description="GPU-second")
    def gpu_second(self, obj: Price) -> str:
        return _amount(obj.gpu_second_micros)

    @admin.display(description="state")
    def state(self, obj: Price) -> str:
        now = database_now()
        if obj.starts_at > now:
            return "to come"
        # Uses index price_in_force_idx.
        newest = Price.objects.filter(route=obj.route, starts_at__lte=now).first()
        return "in force" if newest == obj else "over"


def _amount(micros: int) -> str:
    return f"{Decimal(micros).scaleb(-6).normalize():f} {settings.ROUNDHOUSE_CURRENCY}" if micros else "-"
