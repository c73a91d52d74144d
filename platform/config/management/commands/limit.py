"""`manage.py limit`: how much may be used in a time, or at once."""

from __future__ import annotations

import json
import re
from typing import Any

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser

from config.management.commands.key import find_key
from config.printing import table
from config.words import operator, sentence_of
from registry.actions.limits import remove_limit, save_limit
from registry.adapters import model_names
from registry.models import Each, Limit, Metric, Per, Project, WhenAway
from registry.rights import matches_route

_AMOUNT = re.compile(r"([0-9]{1,12})(?:/([a-z]+))?")


class Command(BaseCommand):
    help = "Set, list and remove limits. Every gateway goes by them within a second."

    def add_arguments(self, parser: CommandParser) -> None:
        do = parser.add_subparsers(dest="do", required=True, metavar="set|list|remove")

        setting = do.add_parser(
            "set", help="Set a limit, or change the one that there is for the same requests."
        )
        setting.add_argument("metric", choices=Metric.values, help="What is counted.")
        setting.add_argument(
            "amount",
            metavar="AMOUNT[/TIME]",
            help=f"60/minute, 1000000/day; TIME is {', '.join(Per.values)}. Parallel requests have none.",
        )
        whose = setting.add_mutually_exclusive_group()
        whose.add_argument("--key", help="Of this key: sk-… or its name (default: of everybody).")
        whose.add_argument("--project", help="Of the keys of this project.")
        whose.add_argument("--user", help="Of the keys and chats of this person.")
        setting.add_argument(
            "--each",
            choices=Each.values,
            default="",
            help="Each of these has the amount for themselves (default: all share it).",
        )
        setting.add_argument(
            "--route",
            default="",
            help="On this model and its adapters; 'smol*' means those that begin so (default: on all).",
        )
        setting.add_argument(
            "--each-route",
            action="store_true",
            help="Each model has an amount of its own, which its adapters share.",
        )
        setting.add_argument(
            "--burst", type=int, help="How much may be used at once (default: the whole amount)."
        )
        setting.add_argument(
            "--when-redis-is-away",
            choices=WhenAway.values,
            default=WhenAway.LOCAL.value,
            help="; ".join(WhenAway.labels) + " (default: %(default)s).",
        )

        listing = do.add_parser("list", help="All limits.")
        listing.add_argument("--json", action="store_true", help="The same as JSON.")

        remove = do.add_parser("remove", help="Let go what it held back.")
        remove.add_argument("limit", type=int, help="Its number, as `limit list` shows it.")

    def handle(self, *args: Any, **options: Any) -> None:
        getattr(self, options["do"])(**options)

    def set(
        self, *, metric: str, amount: str, route: str, each: str, each_route: bool, **options: Any
    ) -> None:
        match = _AMOUNT.fullmatch(amount)
        if match is None or (match[2] is not None and match[2] not in Per.values):
            raise CommandError(
                f"{amount}: write a number and a time, such as 60/minute; times are {', '.join(Per.values)}."
            )
        names = model_names()
        if route and not any(matches_route([route], name) for name in names):
            raise CommandError(f"There is no route {route}; known: {', '.join(names) or 'none'}.")
        which = {
            "api_key": find_key(options["key"]) if options["key"] else None,
            "project": _one(Project, name=options["project"]),
            "user": _one(get_user_model(), username=options["user"]),
            "route": route,
            "each": each,
            "each_route": each_route,
            "metric": metric,
            "per": match[2] or "",
        }
        limit = Limit.objects.filter(**which).first() or Limit(**which)
        limit.amount = int(match[1])
        limit.burst = options["burst"]
        limit.when_redis_is_away = options["when_redis_is_away"]
        try:
            save_limit(limit=limit, by=operator())
        except ValidationError as error:
            raise CommandError(sentence_of(error)) from error
        self.stdout.write(f"Limit {limit.pk}. {limit.effect}")

    def list(self, *, json: bool, **_: Any) -> None:
        limits = Limit.objects.select_related("api_key", "project", "user")
        if json:
            self.stdout.write(_json([_facts(limit) for limit in limits]))
            return
        if not limits:
            self.stdout.write(
                "There is no limit; `manage.py limit set requests 60/minute --each key` sets one."
            )
            return
        rows = [[limit.pk, limit.concerns, limit.allows, limit.when_redis_is_away] for limit in limits]
        self.stdout.write(table(["LIMIT", "CONCERNS", "ALLOWS", "REDIS AWAY"], rows))

    def remove(self, *, limit: int, **_: Any) -> None:
        found = Limit.objects.filter(pk=limit).first()
        if found is None:
            raise CommandError(f"There is no limit {limit}; `manage.py limit list` shows them.")
        remove_limit(limit=found, by=operator())
        self.stdout.write(f"Removed: {found}.")


def _one(kind: Any, **which: str | None) -> Any:
    (name,) = which.values()
    if name is None:
        return None
    found = kind.objects.filter(**which).first()
    if found is None:
        raise CommandError(f"There is no {kind._meta.verbose_name} {name}.")
    return found


def _facts(limit: Limit) -> dict[str, Any]:
    return {
        "id": limit.pk,
        "key": f"sk-{limit.api_key.public_id}" if limit.api_key is not None else None,
        "project": limit.project.name if limit.project is not None else None,
        "user": limit.user.get_username() if limit.user is not None else None,
        "route": limit.route or None,
        "each": limit.each or None,
        "each_route": limit.each_route,
        "metric": limit.metric,
        "amount": limit.amount,
        "per": limit.per or None,
        "burst": limit.at_once,
        "when_redis_is_away": limit.when_redis_is_away,
    }


def _json(facts: object) -> str:
    return json.dumps(facts, indent=2, ensure_ascii=False)
