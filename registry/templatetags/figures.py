"""Numbers on pages."""

from django import template
from django.conf import settings

from registry.costs import money_text
from registry.reports import Figures

register = template.Library()

_CAUSES = {
    "client_errors": "client",
    "limit_errors": "limit",
    "capacity_errors": "capacity",
    "engine_errors": "engine",
}


@register.filter
def grouped(number: float) -> str:
    """1234567 as 1,234,567."""
    return f"{number:,}"


@register.filter
def money(micros: int) -> str:
    """As people write it: from one of the currency on in cents, below with all digits."""
    return money_text(micros if abs(micros) < 1_000_000 else round(micros, -4), settings.ROUNDHOUSE_CURRENCY)


@register.filter
def causes(figures: Figures) -> str:
    """Whose fault the errors are: 3 client, 1 engine."""
    found = [(getattr(figures, name), label) for name, label in _CAUSES.items()]
    return ", ".join(f"{number:,} {label}" for number, label in found if number)


@register.filter
def milliseconds(number: int | None) -> str:
    """With its unit; a dash where it was not measured."""
    return "–" if number is None else f"{number:,} ms"
