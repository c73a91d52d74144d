"""What the commands tell of a language model: its files here, what they need, and how far its copies are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
from django.conf import settings
from django.db.models import QuerySet

from config.printing import amount_of_bytes
from inference.sizing import Facts, fit_in_words, folder_here, read_facts, users_that_fit
from inference.words import progress_in_words
from registry import chat_templates
from registry.models import LanguageModel, ModelCopy, Node
from registry.states import COPY_UNDER_WAY, NodeState


def template_in_words(model: LanguageModel, facts: Facts | None) -> str:
    """Which chat template it has, or which one of the library fits where it has none."""
    if model.chat_template:
        known = chat_templates.name_of(model.chat_template)
        return f"{known}, of the library" if known else f"given, {len(model.chat_template)} characters"
    if facts is None or facts.has_chat_template:
        return "the model's own"
    if not facts.writes_text:
        return "none: it writes no text"
    fits = chat_templates.suggested(model.name, model.source)
    return "none: it completes text but does not chat" + (f"; {fits} fits its name" if fits else "")


def facts_of(name: str, source: str, **loaded: Any) -> Facts | None:
    """What the files on this machine say; None without any. Raises SourceError."""
    folder = folder_here(name, source, Path(settings.ROUNDHOUSE_CACHE))
    return read_facts(folder, **loaded) if folder is not None else None


def facts_told(facts: Facts) -> dict[str, Any]:
    """The same for JSON; amounts are bytes."""
    return {
        "folder": str(facts.folder),
        "size_bytes": facts.size_bytes,
        "architecture": facts.architecture,
        "parameters": facts.parameters,
        "has_chat_template": facts.has_chat_template,
        "license": facts.licence,
        "weight_bytes": facts.need.weights,
        "cache_bytes_per_token": facts.need.cache_per_token,
        "overhead_bytes": facts.need.overhead,
    }


def places_told(facts: Facts) -> list[dict[str, Any]]:
    """How many users fit into the free main memory of this machine, and of each node that is online."""
    memory = psutil.virtual_memory()
    nodes: QuerySet[Node] = Node.objects.filter(state=NodeState.ONLINE)
    places = [("this machine", memory.available, memory.total)]
    places += [(f"node {node.name}", node.memory_free_bytes, node.memory_bytes) for node in nodes]
    return [
        {
            "where": f"{where} ({amount_of_bytes(free)} of {amount_of_bytes(whole)} free)",
            "memory_free_bytes": free,
            "users": users_that_fit(facts, free),
            "in_words": fit_in_words(facts, free),
        }
        for where, free, whole in places
    ]


def count_in_words(number: int) -> str:
    """`134.5 million`."""
    for unit, size in ((" billion", 1e9), (" million", 1e6)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def copy_told(copy: ModelCopy) -> dict[str, Any]:
    """A copy on a node; `progress` is None when nothing is under way."""
    told: dict[str, Any] = {
        "node": copy.node.name,
        "state": str(copy.state),
        "size_bytes": copy.size_bytes,
        "detail": copy.detail,
        "progress": None,
    }
    if copy.state in COPY_UNDER_WAY:
        told["progress"] = copy.progress()
        words = progress_in_words(**told["progress"]) or str(copy.state)
    else:
        words = f"{copy.state}, {amount_of_bytes(copy.size_bytes)}" if copy.size_bytes else str(copy.state)
    return {**told, "in_words": words}


def row_of(fact: dict[str, Any]) -> list[object]:
    """Of the table of all models."""
    return [
        fact["name"],
        amount_of_bytes(fact["size_bytes"]) if fact["size_bytes"] else "",
        fact["context_length"],
        ", ".join(fact["deployments"]),
        "; ".join(
            f"{copy['node']}: {copy['in_words'] if copy['progress'] else copy['state']}"
            for copy in fact["copies"]
        ),
        fact["source"],
    ]
