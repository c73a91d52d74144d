"""`manage.py price`: what requests cost."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from config.printing import table
from config.words import operator
from registry.actions.prices import set_price
from registry.errors import InvalidInput
from registry.models import Price
from registry.querysets import database_now

COMPONENTS = {
    "input": ("input_micros", "per million prompt tokens"),
    "cached": ("cached_micros", "per million prompt tokens that came from a cache (default: as --input)"),
    "output": ("output_micros", "per million generated tokens"),
    "request": ("request_micros", "per answered request"),
    "gpu_second": ("gpu_second_micros", "per second between the wait in the queue and the answer's end"),
}


class Command(BaseCommand):
    help = "Set and list prices. A price is never edited: a new one ends it."

    def add_arguments(self, parser: CommandParser) -> None:
        do = parser.add_subparsers(dest="do", required=True, metavar="set|list")

        set_ = do.add_parser("set", help="Set what a model costs from now, or another time, on.")
        set_.add_argument(
            "route",
            nargs="?",
            help="The model, as clients name it. Adapters without a price of their own pay it too.",
        )
        set_.add_argument(
            "--every-other", action="store_true", help="Instead: every model without a price of its own."
        )
        for name, (_, help_) in COMPONENTS.items():
            set_.add_argument(f"--{name.replace('_', '-')}", metavar="AMOUNT", help=help_)
        set_.add_argument(
            "--from",
            dest="starts",
            metavar="WHEN",
            help="2026-12-01 or 2026-12-01T08:00, UTC unless a zone is given (default: now). In the past: "
            "what was charged already is put right by `manage.py usage rerate`.",
        )

        listing = do.add_parser("list", help="Prices, the newest of each model first.")
        listing.add_argument("--all", action="store_true", help="Those that are over too.")
        listing.add_argument("--json", action="store_true", help="The same as JSON, in millionths.")

    def handle(self, *args: Any, **options: Any) -> None:
        getattr(self, options["do"])(**options)

    def set(self, *, route: str | None, every_other: bool, starts: str | None, **options: Any) -> None:
        if bool(route) == every_other:
            raise CommandError("Name a model, or say --every-other.")
        amounts = {
            column: micros_of(f"--{name.replace('_', '-')}", options[name])
            for name, (column, _) in COMPONENTS.items()
            if options[name] is not None
        }
        if not amounts:
            raise CommandError("Give at least one amount, such as --input 0.15.")
        price = Price(route=route or "", starts_at=_moment(starts), **amounts)
        try:
            set_price(price=price, by=operator())
        except InvalidInput as error:
            raise CommandError(str(error)) from error
        self.stdout.write(f"Set for {price}.")

    def list(self, *, all: bool, json: bool, **_: Any) -> None:
        now = database_now()
        facts: list[dict[str, Any]] = []
        current: set[str] = set()
        for price in Price.objects.all():
            over = price.starts_at <= now and price.route in current
            if price.starts_at <= now:
                current.add(price.route)
            if over and not all:
                continue
            facts.append({"route": price.route, "starts_at": price.starts_at, "over": over})
            facts[-1] |= {column: getattr(price, column) for column, _ in COMPONENTS.values()}
        if json:
            self.stdout.write(_json({"currency": settings.ROUNDHOUSE_CURRENCY, "prices": facts}))
            return
        if not facts:
            self.stdout.write("No prices: nothing costs anything. `manage.py price set` sets one.")
            return
        rows = [
            [
                fact["route"] or "every other",
                f"{fact['starts_at']:%Y-%m-%d %H:%M}",
                *(_amount(fact[column]) for column, _ in COMPONENTS.values()),
                "over" if fact["over"] else "to come" if fact["starts_at"] > now else "in force",
            ]
            for fact in facts
        ]
        headings = ["MODEL", "FROM", "INPUT", "CACHED", "OUTPUT", "REQUEST", "GPU-SECOND", "STATE"]
        self.stdout.write(table(headings, rows))
        self.stdout.write(f"In {settings.ROUNDHOUSE_CURRENCY}; tokens per million.")


def micros_of(name: str, text: str) -> int:
    """An amount of the currency in whole millionths."""
    try:
        micros = Decimal(text).scaleb(6)
        exact = micros.is_finite() and micros == micros.to_integral_value()
    except InvalidOperation:
        exact = False
    if not exact or micros < 0:
        raise CommandError(f"{name} {text}: write an amount such as 0.15, with at most six decimals.")
    return int(micros)


def _amount(micros: int | None) -> str:
    if micros is None:
        return ""
    return f"{Decimal(micros).scaleb(-6):f}".rstrip("0").rstrip(".") if micros else "0"


def _moment(text: str | None) -> datetime:
    if text is None:
        return database_now()
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise CommandError(f"--from {text}: write a date such as 2026-12-01.") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _json(facts: object) -> str:
    return json.dumps(facts, indent=2, default=str, ensure_ascii=False)
