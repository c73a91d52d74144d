"""What a request costs: integers only, no floats and no decimals on the way.

A price's components are millionths of the currency: tokens per million of them, the rest per piece. The
parts of one request are added up exactly, and the sum is rounded once, to the nearest whole millionth, a
half upwards. So a request's cost is within half a millionth of the exact one, and never falls when any of
its figures rises: what was set aside for the most it may use is enough for what it used.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal

from registry.models import Price
from registry.statements import aware, select

PER_MILLION = 1_000_000
GPU_SECONDS_MOST = 600
"""A request pays for at most so many GPU-seconds: only so the most that it may cost is known beforehand."""

_FIELDS = (
    *("id", "route", "starts_at"),
    *("input_micros", "cached_micros", "output_micros", "request_micros", "gpu_second_micros"),
)
# Uses index price_in_force_idx; newest first, and of one instant the later entry first.
_PRICES = (
    f"SELECT {', '.join(_FIELDS)} FROM registry_price WHERE route IN %s "  # noqa: S608 - names of our own
    "ORDER BY route, starts_at DESC, id DESC"
)


def cost_micros(
    price: Price | None,
    *,
    prompt_tokens: int,
    cached_tokens: int,
    completion_tokens: int,
    milliseconds: int,
) -> int:
    """What an answered request costs. Without a price: nothing."""
    if price is None:
        return 0
    cached_price = price.input_micros if price.cached_micros is None else price.cached_micros
    exact = (
        (prompt_tokens - cached_tokens) * price.input_micros
        + cached_tokens * cached_price
        + completion_tokens * price.output_micros
        + price.request_micros * PER_MILLION
        + price.gpu_second_micros * min(milliseconds, GPU_SECONDS_MOST * 1000) * (PER_MILLION // 1000)
    )
    return (exact + PER_MILLION // 2) // PER_MILLION


def most_micros(price: Price | None, *, prompt_tokens: int, completion_tokens: int) -> int:
    """What a request of at most these tokens costs at most, however much of its prompt is cached and however
    long it takes."""
    figures = {"completion_tokens": completion_tokens, "milliseconds": GPU_SECONDS_MOST * 1000}
    return max(
        cost_micros(price, prompt_tokens=prompt_tokens, cached_tokens=cached, **figures)
        for cached in (0, prompt_tokens)
    )


class PriceBook:
    """The prices of some routes, read once."""

    def __init__(self, routes: Iterable[str]) -> None:
        self._prices: dict[str, list[Price]] = {}
        for number, route, starts_at, *micros in select(_PRICES, tuple({*routes, ""})):
            price = Price.from_db(None, _FIELDS, (number, route, aware(starts_at), *micros))
            self._prices.setdefault(route, []).append(price)

    def in_force(self, route: str, at: datetime, base: str = "") -> Price | None:
        """What a request that begins at `at` pays: the route's own price, else that of the route it is an
        adapter of (`base`), else that of every other."""
        for name in (route, base, ""):
            for price in self._prices.get(name, ()):
                if price.starts_at <= at:
                    return price
        return None

    def by_id(self, price_id: int | None) -> Price | None:
        """The price of this number, if it is one of these routes'."""
        for prices in self._prices.values():
            for price in prices:
                if price.pk == price_id:
                    return price
        return None


def money_text(micros: int, currency: str) -> str:
    """`12.50 EUR`; the digits that cents do not hold follow where there are any."""
    amount = Decimal(abs(micros)).scaleb(-6)
    text = f"{amount:,.6f}".rstrip("0")
    whole, _, digits = text.partition(".")
    return f"{'-' if micros < 0 else ''}{whole}.{digits:0<2} {currency}"
