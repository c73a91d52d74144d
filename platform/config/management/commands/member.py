"""`manage.py member`: who may do what in a project."""

from __future__ import annotations

import json
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError, CommandParser

from config.printing import table
from config.words import operator
from registry.actions.projects import remove_member, set_role
from registry.models import Membership, Project
from registry.rights import Role


class Command(BaseCommand):
    help = "Give people a role in a project, list who has one, and take it."

    def add_arguments(self, parser: CommandParser) -> None:
        do = parser.add_subparsers(dest="do", required=True, metavar="add|list|remove")

        add = do.add_parser("add", help="Give a person a role, instead of the one that they have.")
        _who(add)
        add.add_argument(
            "--role",
            default=Role.MEMBER.value,
            choices=Role.values,
            help="owner: any key of the project; member: keys of their own; viewer: sees keys "
            "(default: %(default)s).",
        )

        listing = do.add_parser("list", help="Who has a role.")
        listing.add_argument("project", nargs="?", help="In this project only.")
        listing.add_argument("--json", action="store_true", help="The same as JSON.")

        remove = do.add_parser("remove", help="Take a person's role; their keys there are refused at once.")
        _who(remove)

    def handle(self, *args: Any, **options: Any) -> None:
        getattr(self, options["do"])(**options)

    def add(self, *, project: str, user: str, role: str, **_: Any) -> None:
        where, who = _project(project), _person(user)
        set_role(project=where, user=who, role=role, by=operator())
        self.stdout.write(f"{who.get_username()} is {role} of {where}.")

    def list(self, *, project: str | None, json: bool, **_: Any) -> None:
        members = Membership.objects.select_related("project", "user").order_by(
            "project__name", "user__username"
        )
        if project is not None:
            members = members.filter(project=_project(project))
        facts = [
            {
                "project": member.project.name,
                "user": member.user.get_username(),
                "role": member.role,
                "active": member.user.is_active,
            }
            for member in members
        ]
        if json:
            self.stdout.write(_json(facts))
            return
        if not facts:
            self.stdout.write("Nobody has a role; `manage.py member add PROJECT USER` gives one.")
            return
        rows = [
            [one["project"], one["user"], one["role"], "yes" if one["active"] else "disabled"]
            for one in facts
        ]
        self.stdout.write(table(["PROJECT", "USER", "ROLE", "ACTIVE"], rows))

    def remove(self, *, project: str, user: str, **_: Any) -> None:
        where, who = _project(project), _person(user)
        if not where.memberships.filter(user=who).exists():
            raise CommandError(f"{who.get_username()} has no role in {where}.")
        remove_member(project=where, user=who, by=operator())
        self.stdout.write(
            f"{who.get_username()} has no role in {where} any more; their keys there are refused."
        )


def _who(parser: CommandParser) -> None:
    parser.add_argument("project", help="Its name.")
    parser.add_argument("user", help="The name with which they log in.")


def _project(name: str) -> Project:
    found = Project.objects.filter(name=name).first()
    if found is None:
        raise CommandError(
            f"There is no project {name}; the admin makes one, or `manage.py key create NAME --project …`."
        )
    return found


def _person(name: str) -> Any:
    found = get_user_model().objects.filter(username=name).first()
    if found is None:
        raise CommandError(f"There is no person {name}; the admin makes one, or `manage.py createsuperuser`.")
    return found


def _json(facts: object) -> str:
    return json.dumps(facts, indent=2, ensure_ascii=False)
