"""`manage.py deploy`: wish for workers of a model, or change that wish."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from config.waiting import add_wait_argument, wait_until_ready
from config.words import operator, sentence_of
from registry.actions.deployments import save_deployment
from registry.actions.routes import note_route_change
from registry.models import Deployment, LanguageModel, Route, RouteTarget
from registry.states import EngineName, Policy


class Command(BaseCommand):
    help = (
        "Deploy a model: its workers are started on nodes that can take them, and clients reach them under "
        "the route. For a deployment that exists, changes what is given and leaves the rest; a changed "
        "engine, argument or slot count replaces its workers one by one."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="The deployment's name.")
        parser.add_argument("--model", help="The language model (`manage.py model list`).")
        parser.add_argument("--engine", choices=list(EngineName.values), help="Default: transformers.")
        parser.add_argument("--replicas", type=int, help="Workers to run at once (default: 1).")
        parser.add_argument("--slots", type=int, help="Requests that one worker takes at once (default: 32).")
        parser.add_argument("--policy", choices=list(Policy.values), help="How a worker is chosen.")
        for option, what in (
            (
                "--argument",
                "An engine argument, such as dtype=float32; dtype= removes it. Repeatable.",
            ),
            (
                "--environment",
                "A variable of the workers, such as OMP_NUM_THREADS=8. May be repeated.",
            ),
            ("--label", "Only nodes that carry this label, such as gpu=h100. May be repeated."),
        ):
            parser.add_argument(option, action="append", default=[], metavar="NAME=VALUE", help=what)
        route = parser.add_mutually_exclusive_group()
        route.add_argument("--route", help='What clients send as "model" (default: the deployment\'s name).')
        route.add_argument("--no-route", action="store_true", help="Make none: no client reaches it yet.")
        add_wait_argument(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        name = options["name"]
        with transaction.atomic():
            deployment, is_new = self._wish(name, options)
            try:
                save_deployment(deployment=deployment, by=operator())
            except ValidationError as error:
                raise CommandError(sentence_of(error)) from error
            route = options["route"] or (name if is_new and not options["no_route"] else None)
            if route:
                _point(route, deployment)
        revision = deployment.revision.number if deployment.revision else 0
        self.stdout.write(
            f"{'Deployed' if is_new else 'Changed'} {name}: {deployment.replicas} replica(s) of "
            f"{deployment.language_model}, revision {revision}" + (f", route {route}." if route else ".")
        )
        wait_until_ready(deployment, options["wait"], self.stderr.write, self.stdout.write)

    def _wish(self, name: str, options: dict[str, Any]) -> tuple[Deployment, bool]:
        deployment = Deployment.objects.select_related("language_model", "revision").filter(name=name).first()
        is_new = deployment is None
        if deployment is None:
            if not options["model"]:
                raise CommandError("Which model? Give --model; `manage.py model list` shows them.")
            deployment = Deployment(name=name)
        if options["model"]:
            deployment.language_model = _model(options["model"])
        for field in ("engine", "replicas", "slots", "policy"):
            if options[field] is not None:
                setattr(deployment, field, options[field])
        deployment.arguments = _changed(deployment.arguments, "--argument", options["argument"])
        deployment.environment = _changed(
            deployment.environment, "--environment", options["environment"], plain=True
        )
        deployment.node_labels = _changed(deployment.node_labels, "--label", options["label"], plain=True)
        return deployment, is_new


def _model(name: str) -> LanguageModel:
    model = LanguageModel.objects.filter(name=name).first()
    if model is None:
        known = ", ".join(LanguageModel.objects.values_list("name", flat=True)[:20]) or "none"
        raise CommandError(f"There is no model {name}; known: {known}.")
    return model


def _changed(before: dict[str, Any], option: str, texts: list[str], *, plain: bool = False) -> dict[str, Any]:
    """`before` with NAME=VALUE pairs set, and those of NAME= taken out.

    Unless `plain`, a value that is JSON (a number, true, null) is taken as such.
    """
    pairs = dict(before)
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise CommandError(f"{option} {text}: write NAME=VALUE, or NAME= to take it out.")
        if not value:
            pairs.pop(name, None)
            continue
        pairs[name] = value
        if not plain:
            with contextlib.suppress(ValueError):
                read = json.loads(value)
                # Infinities are no JSON, and no database takes them.
                json.dumps(read, allow_nan=False)
                pairs[name] = read
    return pairs


def _point(name: str, deployment: Deployment) -> None:
    """Let the route lead to the deployment, beside others that it leads to already."""
    route = Route.objects.filter(name=name).first()
    if route is None:
        route = Route(name=name)
        try:
            route.full_clean()
        except ValidationError as error:
            raise CommandError(sentence_of(error)) from error
        route.save()
        note_route_change(route=route, what="created", by=operator())
    _, added = RouteTarget.objects.get_or_create(route=route, deployment=deployment)
    if added:
        note_route_change(route=route, what="changed", by=operator())
