"""`manage.py key`: the API keys."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction
from django.utils import timezone

from config.printing import age, table
from config.words import operator
from registry.actions.api_keys import issue_api_key, revoke_api_key, rotate_api_key
from registry.adapters import model_names
from registry.errors import InvalidInput, InvalidTransition
from registry.models import ApiKey, Project
from registry.rights import Priority, Scope, matches_route

_LIFETIME = re.compile(r"([1-9][0-9]{0,4})(min|h|d|w)")
_UNITS = {"min": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Command(BaseCommand):
    help = "Create, list, rotate and revoke API keys."

    def add_arguments(self, parser: CommandParser) -> None:
        do = parser.add_subparsers(dest="do", required=True, metavar="create|list|rotate|revoke")

        create = do.add_parser("create", help="Issue a key and print it, once.")
        create.add_argument("name", help="Who or what uses it; shown in reports.")
        create.add_argument(
            "--project", default="default", help="Who pays; made when it is new (default: %(default)s)."
        )
        create.add_argument(
            "--expires", metavar="WHEN", help="30d, 12h, 8w, 90min, or a date: 2030-12-31 (default: never)."
        )
        create.add_argument(
            "--routes",
            nargs="+",
            default=[],
            metavar="ROUTE",
            help="Models that it may use; 'smol*' means those that begin so (default: all).",
        )
        create.add_argument(
            "--scopes",
            nargs="+",
            default=[],
            choices=Scope.values,
            metavar="SCOPE",
            help=f"Endpoints that it may use: {', '.join(Scope.values)} (default: all).",
        )
        create.add_argument(
            "--addresses",
            nargs="+",
            default=[],
            metavar="NETWORK",
            help="Where it may be used from, such as 10.0.0.0/8 (default: everywhere).",
        )
        create.add_argument(
            "--priority",
            default=Priority.DEFAULT.value,
            choices=Priority.values,
            help="Who goes first when all workers are busy (default: %(default)s).",
        )

        listing = do.add_parser("list", help="Keys that can be used.")
        listing.add_argument("--all", action="store_true", help="Revoked and expired ones too.")
        listing.add_argument("--json", action="store_true", help="The same as JSON.")

        rotate = do.add_parser("rotate", help="Give a key a new secret and print it, once.")
        rotate.add_argument("key", help="The key, its public part (sk-…), or its name where only one has it.")
        rotate.add_argument(
            "--overlap",
            default="24h",
            metavar="TIME",
            help="How long the old secret works on: 30min, 24h, 7d, or 0 (default: %(default)s).",
        )

        revoke = do.add_parser("revoke", help="Refuse a key everywhere within a second, for good.")
        revoke.add_argument("key", help="The key, its public part (sk-…), or its name where only one has it.")

    def handle(self, *args: Any, **options: Any) -> None:
        getattr(self, options["do"])(**options)

    def create(
        self,
        *,
        name: str,
        project: str,
        expires: str | None,
        routes: list[str],
        scopes: list[str],
        addresses: list[str],
        priority: str,
        **_: Any,
    ) -> None:
        if not name.strip() or len(name) > 120 or not name.isprintable():
            raise CommandError("A key's name has 1 to 120 printable characters.")
        if not project.strip() or len(project) > 120 or not project.isprintable():
            raise CommandError("A project's name has 1 to 120 printable characters.")
        known = model_names()
        if unknown := [route for route in routes if not any(matches_route([route], name) for name in known)]:
            raise CommandError(f"There is no route {unknown[0]}; known: {', '.join(known) or 'none'}.")
        ends = _moment(expires) if expires else None
        try:
            with transaction.atomic():
                owner, made = Project.objects.get_or_create(name=project)
                api_key, text = issue_api_key(
                    name=name,
                    project=owner,
                    by=operator(),
                    expires_at=ends,
                    routes=sorted(set(routes)),
                    scopes=sorted(set(scopes)),
                    cidrs=addresses,
                    priority=priority,
                )
        except InvalidInput as error:
            raise CommandError(_sentence(error)) from error
        # Only the key goes to stdout: KEY=$(manage.py key create …) holds it and nothing else.
        self.stdout.write(text)
        new = " (new)" if made else ""
        until = f"until {ends:%Y-%m-%d %H:%M} UTC" if ends else "until it is revoked"
        uses = ", ".join(api_key.routes) or "every model"
        self.stderr.write(
            f"Key {name} of project {project}{new} may use {uses}, {until}. "
            "It is not kept and cannot be shown again."
        )

    def rotate(self, *, key: str, overlap: str, **_: Any) -> None:
        found = find_key(key)
        try:
            text = rotate_api_key(api_key=found, by=operator(), overlap=_lifetime("--overlap", overlap))
        except InvalidInput as error:
            raise CommandError(_sentence(error)) from error
        except InvalidTransition as error:
            raise CommandError(str(error)) from error
        self.stdout.write(text)
        was = "has ended" if overlap == "0" else f"works for another {overlap}"
        self.stderr.write(
            f"Key {found.name} has a new secret; the old one {was}. "
            "The new one is not kept and cannot be shown again."
        )

    def list(self, *, all: bool, json: bool, **_: Any) -> None:
        now = timezone.now()
        keys = ApiKey.objects.select_related("project")
        if not all:
            keys = keys.usable(now)
        facts = [
            {
                "key": f"sk-{key.public_id}-…{key.last4}",
                "name": key.name,
                "project": key.project.name,
                "state": _state_of(key, now),
                "routes": key.routes,
                "scopes": key.scopes,
                "addresses": key.cidrs,
                "priority": key.priority,
                "expires_at": key.expires_at,
                "last_used_at": key.last_used_at,
            }
            for key in keys
        ]
        if json:
            self.stdout.write(_json(facts))
            return
        if not facts:
            self.stdout.write("No key can be used; `manage.py key create NAME` makes one.")
            return
        rows = [
            [
                key.name,
                key.project.name,
                f"sk-{key.public_id}-…{key.last4}",
                _state_of(key, now),
                ", ".join(key.routes) or "all",
                f"{key.expires_at:%Y-%m-%d %H:%M}" if key.expires_at else "never",
                age(key.last_used_at, now),
            ]
            for key in keys
        ]
        self.stdout.write(table(["NAME", "PROJECT", "KEY", "STATE", "MODELS", "EXPIRES", "LAST USED"], rows))

    def revoke(self, *, key: str, **_: Any) -> None:
        found = find_key(key)
        if found.revoked_at is not None:
            self.stdout.write(f"{found} was revoked before.")
            return
        revoke_api_key(api_key=found, by=operator())
        self.stdout.write(f"Revoked {found}; it is refused within a second.")


def find_key(text: str) -> ApiKey:
    if match := re.match(r"sk-([0-9A-Za-z]{12})(?:-|\Z)", text):
        keys = list(ApiKey.objects.filter(public_id=match[1]))
    else:
        keys = list(ApiKey.objects.filter(name=text, revoked_at__isnull=True))
        keys = keys or list(ApiKey.objects.filter(public_id=text))
    if not keys:
        raise CommandError("There is no such key; `manage.py key list` shows them.")
    if len(keys) > 1:
        shown = ", ".join(f"sk-{key.public_id}" for key in keys)
        raise CommandError(f"{len(keys)} keys are called {text}; name one of {shown}.")
    return keys[0]


def _sentence(error: InvalidInput) -> str:
    names = {"cidrs": "--addresses", "routes": "--routes", "scopes": "--scopes", "overlap": "--overlap"}
    return f"{names.get(error.field, error.field)}: {error.message}"


def _lifetime(option: str, text: str) -> timedelta:
    if text == "0":
        return timedelta(0)
    match = _LIFETIME.fullmatch(text)
    if match is None:
        raise CommandError(f"{option} {text}: write 90min, 12h, 30d, 8w or 0.")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _moment(text: str) -> datetime:
    now = timezone.now()
    try:
        if _LIFETIME.fullmatch(text):
            return now + _lifetime("--expires", text)
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError) as error:
        raise CommandError(
            f"--expires {text}: write 90min, 12h, 30d, 8w or a date such as 2030-12-31."
        ) from error
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if moment <= now:
        raise CommandError(f"--expires {text} is over already.")
    return moment


def _state_of(key: ApiKey, now: datetime) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "usable" if key.usable(now) else "expired"


def _json(facts: object) -> str:
    return json.dumps(facts, indent=2, default=str, ensure_ascii=False)
