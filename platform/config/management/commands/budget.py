"""`manage.py budget`: how much may be used."""

from __future__ import annotations

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from config.management.commands.price import micros_of
from config.printing import table
from config.words import operator
from registry.actions.budgets import (
    amount_text,
    current_periods,
    delete_budget,
    facts_of,
    find_subject,
    save_budget,
)
from registry.errors import InvalidInput
from registry.models import Budget
from registry.models.budget import BudgetPeriodName, BudgetScope, BudgetUnit
from registry.querysets import database_now


class Command(BaseCommand):
    help = "Set, list and remove budgets."

    def add_arguments(self, parser: CommandParser) -> None:
        do = parser.add_subparsers(dest="do", required=True, metavar="set|list|remove")

        set_ = do.add_parser("set", help="Make a budget, or change its limit where there is one.")
        whose = set_.add_mutually_exclusive_group(required=True)
        whose.add_argument(
            "--key", help="Of a key: its public part (sk-…), or its name where only one has it."
        )
        whose.add_argument("--project", help="Of all keys of a project.")
        whose.add_argument("--user", help="Of the keys that a person owns, and their chats.")
        whose.add_argument("--route", help="Of everybody's requests of a model and its adapters.")
        set_.add_argument("--limit", required=True, help="An amount of money, or of tokens with --tokens.")
        set_.add_argument("--tokens", action="store_true", help="Count tokens, not money.")
        set_.add_argument("--per", choices=BudgetPeriodName.values, default="month")
        set_.add_argument("--soft", action="store_true", help="Refuse nothing, only give notice.")
        set_.add_argument("--mail", metavar="ADDRESSES", help="Who gets notices, separated by commas.")
        set_.add_argument("--web-hook", metavar="URL", help="What gets notices as JSON, by POST.")

        listing = do.add_parser("list", help="Budgets, and what is used of them in the period that runs.")
        listing.add_argument("--json", action="store_true", help="The same as JSON.")

        remove = do.add_parser("remove", help="Count and refuse by it no more.")
        remove.add_argument("number", type=int, help="As listed.")

    def handle(self, *args: Any, **options: Any) -> None:
        getattr(self, options["do"])(**options)

    def set(
        self,
        *,
        limit: str,
        tokens: bool,
        per: str,
        soft: bool,
        mail: str | None,
        web_hook: str | None,
        **options: Any,
    ) -> None:
        scope = next(scope for scope in BudgetScope.values if options.get(scope))
        unit = BudgetUnit.TOKENS if tokens else BudgetUnit.MONEY
        if tokens and not limit.isdecimal():
            raise CommandError(f"--limit {limit}: write a number of tokens.")
        amount = int(limit) if tokens else micros_of("--limit", limit)
        try:
            subject, name = find_subject(scope, options[scope])
            same = Budget.objects.filter(scope=scope, subject=subject, unit=unit, period=per, hard=not soft)
            budget = same.first() or Budget(
                scope=scope, subject=subject, unit=unit, period=per, hard=not soft
            )
            budget.limit, budget.subject_name = amount, name[:150]
            if mail is not None:
                budget.mail_to = mail
            if web_hook is not None:
                budget.webhook_url = web_hook
            save_budget(budget=budget, by=operator())
        except InvalidInput as error:
            raise CommandError(str(error)) from error
        self.stdout.write(
            f"Budget {budget.pk}: {scope} {budget.subject_name}, {amount_text(budget, amount)} "
            f"{'in all' if per == 'total' else f'per {per}'}, {'soft' if soft else 'hard'}."
        )

    def list(self, *, json: bool, **_: Any) -> None:
        budgets = list(Budget.objects.all())
        periods = current_periods(budgets, database_now())
        facts = [facts_of(budget, periods.get(budget.pk)) for budget in budgets]
        if json:
            self.stdout.write(_json(facts))
            return
        if not facts:
            self.stdout.write("No budgets; `manage.py budget set` makes one.")
            return
        rows = [
            [
                fact["id"],
                f"{fact['scope']} {fact['subject']}",
                fact["period"],
                "hard" if fact["hard"] else "soft",
                *(amount_text(budget, fact[name]) for name in ("limit", "spent", "held")),
                f"{fact['resets_at']:%Y-%m-%d %H:%M}" if fact["resets_at"] else "",
            ]
            for budget, fact in zip(budgets, facts, strict=True)
        ]
        headings = ["NUMBER", "OF", "PER", "KIND", "LIMIT", "USED", "SET ASIDE", "BEGINS ANEW (UTC)"]
        self.stdout.write(table(headings, rows))

    def remove(self, *, number: int, **_: Any) -> None:
        budget = Budget.objects.filter(pk=number).first()
        if budget is None:
            raise CommandError(f"There is no budget {number}; `manage.py budget list` shows them.")
        delete_budget(budget=budget, by=operator())
        self.stdout.write(f"Removed budget {number}.")


def _json(facts: object) -> str:
    return json.dumps(facts, indent=2, default=str, ensure_ascii=False)
