"""Language models."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest

from registry.actions.language_models import (
    add_language_model,
    change_language_model,
    delete_language_model,
)
from registry.admin.common import DeletesByAction, by, timeline
from registry.models import LanguageModel

SOURCES = (
    "An absolute folder on the nodes; hub:ORG/NAME@COMMIT or modelscope:ORG/NAME@COMMIT, with the 40 "
    "hexadecimal digits of a commit; package:NAME==VERSION#sha256=HEX, a Python package that carries "
    "weights; or upstream, for a model that another server has."
)


@admin.register(LanguageModel)
class LanguageModelAdmin(DeletesByAction):
    list_display = ["name", "source", "context_length", "created_at"]
    search_fields = ["name", "source"]
    fields = ["name", "source", "chat_template", "context_length", "created_at", "events"]

    def get_readonly_fields(self, request: HttpRequest, obj: LanguageModel | None = None) -> list[str]:
        always = ["context_length", "created_at", "events"]
        # Routes, ledgers and caches know it by its name.
        return always if obj is None else ["name", *always]

    def get_form(self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any) -> Any:
        return super().get_form(request, obj, change, help_texts={"source": SOURCES}, **kwargs)

    @admin.display(description="timeline")
    def events(self, obj: LanguageModel) -> str:
        return timeline(obj)

    def save_model(self, request: HttpRequest, obj: LanguageModel, form: Any, change: bool) -> None:
        if change:
            change_language_model(language_model=obj, by=by(request))
            return
        added = add_language_model(
            name=obj.name, source=obj.source, chat_template=obj.chat_template, by=by(request)
        )
        obj.pk = added.pk
        obj.refresh_from_db()

    def delete_by_action(self, obj: LanguageModel, who: str) -> None:
        delete_language_model(language_model=obj, by=who)
