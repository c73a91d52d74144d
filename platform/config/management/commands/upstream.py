"""`manage.py upstream`: other servers that speak the OpenAI API, as workers."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from config.waiting import add_wait_argument, wait_until_ready
from config.words import operator, sentence_of
from inference.engines.base import LoadError
from inference.engines.upstream.arguments import read_arguments
from inference.engines.upstream.presets import PRESETS
from registry.actions.deployments import deploy, save_deployment
from registry.actions.language_models import add_language_model
from registry.models import Deployment, LanguageModel, Route
from registry.states import EngineName
from registry.upstreams import MAX_KEY
from registry.validators import UPSTREAM_SOURCE

DEFAULT = "openai-compatible"


class Command(BaseCommand):
    help = (
        "Serve a model of another server that speaks the OpenAI API: its deployment, its model and its route "
        "in one go. The key is asked for, or read from a file; never write it into a command line."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        do = parser.add_subparsers(dest="do", required=True, metavar="add|key|presets")

        add = do.add_parser("add", help="Make the deployment, its model and its route.")
        add.add_argument("name", help="The deployment's name, and unless --route the route's.")
        add.add_argument("--url", required=True, help="Where its OpenAI API begins, with its /v1.")
        add.add_argument(
            "--preset",
            choices=list(PRESETS),
            default=DEFAULT,
            metavar="PRESET",
            help=f"What kind of server it is: `upstream presets` lists them (default: {DEFAULT}).",
        )
        add.add_argument("--model", help="What the server calls the model (default: its only one).")
        add.add_argument("--context-length", type=int, help="Where the server does not tell it.")
        add.add_argument(
            "--capability",
            action="append",
            metavar="NAME",
            help="What server and model honour, in place of the preset's list, such as endpoint:embeddings. "
            "May be repeated.",
        )
        add.add_argument("--timeout", type=float, help="Longest silence in seconds (default: 300).")
        add.add_argument("--slots", type=int, default=32, help="Requests at once (default: 32).")
        add.add_argument("--route", help='What clients send as "model" (default: the name).')
        _key_arguments(add)
        add_wait_argument(add)

        key = do.add_parser("key", help="Give the server's key, or another one; its workers are replaced.")
        key.add_argument("name", help="The deployment's name.")
        _key_arguments(key)

        do.add_parser("presets", help="The kinds of servers, and what to know of each.")

    def handle(self, *args: Any, **options: Any) -> None:
        getattr(self, options["do"])(**options)

    def add(self, *, name: str, **options: Any) -> None:
        chosen = {
            "url": options["url"],
            "preset": options["preset"],
            "model": options["model"],
            "context_length": options["context_length"],
            "capabilities": options["capability"],
            "timeout": options["timeout"],
        }
        arguments = {argument: value for argument, value in chosen.items() if value is not None}
        route = options["route"] or name
        try:
            read_arguments(arguments)
        except LoadError as error:
            raise CommandError(error.detail) from error
        if Deployment.objects.filter(name=name).exists():
            raise CommandError(f"There is a deployment {name} already: `manage.py deploy {name}` changes it.")
        if Route.objects.filter(name=route).exists():
            raise CommandError(f"There is a route {route} already; choose another with --route.")
        # Before the transaction, which locks SQLite: a person may take a while to answer.
        upstream_key = _key(options)
        try:
            with transaction.atomic():
                deployment = deploy(
                    name=name,
                    language_model=_model(name),
                    by=operator(),
                    route=route,
                    engine=EngineName.UPSTREAM,
                    arguments=arguments,
                    slots=options["slots"],
                    upstream_key=upstream_key,
                )
        except ValidationError as error:
            raise CommandError(sentence_of(error)) from error
        self.stdout.write(f"Deployed {name}: {arguments['url']} ({options['preset']}), route {route}.")
        wait_until_ready(deployment, options["wait"], self.stderr.write, self.stdout.write)

    def key(self, *, name: str, **options: Any) -> None:
        deployment = Deployment.objects.select_related("language_model", "revision").filter(name=name).first()
        if deployment is None:
            raise CommandError(f"There is no deployment {name}.")
        try:
            save_deployment(deployment=deployment, by=operator(), upstream_key=_key(options) or "")
        except ValidationError as error:
            raise CommandError(sentence_of(error)) from error
        self.stdout.write(f"{name}: {'the key is set' if deployment.upstream_key else 'it has no key now'}.")

    def presets(self, **_: Any) -> None:
        for name, preset in PRESETS.items():
            self.stdout.write(f"{name}: {preset.title}\n  {preset.url}\n  {preset.note}\n")


def _key_arguments(parser: Any) -> None:
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--key-file", metavar="FILE", help="Read the key from there; -: from standard input.")
    given.add_argument("--no-key", action="store_true", help="The server needs none.")


def _key(options: dict[str, Any]) -> str | None:
    """The key that was given; None without one."""
    if options["no_key"]:
        return None
    if options["key_file"] is None:
        if not sys.stdin.isatty():
            raise CommandError("Where is the key? Give --key-file FILE (- for standard input), or --no-key.")
        try:
            return getpass.getpass("Key of the server (empty: none): ").strip() or None
        except (EOFError, KeyboardInterrupt):
            raise CommandError("No key was given; nothing was changed.") from None
    try:
        if options["key_file"] == "-":
            text = sys.stdin.read(MAX_KEY + 2)
        else:
            with Path(options["key_file"]).open() as file:
                text = file.read(MAX_KEY + 2)
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--key-file {options['key_file']} cannot be read ({error}).") from error
    if not text.strip():
        raise CommandError(f"--key-file {options['key_file']} is empty.")
    return text.strip()


def _model(name: str) -> LanguageModel:
    """The one of this name, which must have no files, or a new one."""
    known = LanguageModel.objects.filter(name=name).first()
    if known is None:
        return add_language_model(name=name, source=UPSTREAM_SOURCE, by=operator())
    if known.source != UPSTREAM_SOURCE:
        raise CommandError(f"There is a model {name} with files of its own already; choose another name.")
    return known
