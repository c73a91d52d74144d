"""What a model on this machine is, what it needs, and how many people it can serve beside what else runs.

Reads headers only. No Django: commands and pages both ask here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from inference.engines.memory import (
    ITEM_BYTES,
    PROCESS_BYTES,
    STEP_BYTES,
    Estimate,
    cache_per_token,
    estimate,
)
from inference.sources import FolderSource, HubSource, SourceError, parse_source
from inference.sources.check import check_folder, read_object
from inference.sources.headers import read_gguf
from inference.sources.hub import look
from inference.sources.package import is_licence
from inference.sources.prepare import slot_of
from inference.words import amount_of_bytes

CONTEXTS = (2048, 8192, 32768)
"""Lengths of a conversation that are asked about, in tokens, beside the model's own."""
_WRITES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
_LONGEST_LICENCE_LINE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a model's folder says of itself."""

    folder: Path | None
    """None: it was only asked about, at its hub."""
    size_bytes: int
    architecture: str
    """As its configuration calls it; empty when that does not say."""
    context_length: int | None
    parameters: int
    has_chat_template: bool
    licence: str
    """The first line of its licence file; empty without one."""
    need: Estimate

    @property
    def writes_text(self) -> bool:
        """It generates, so each of its users needs a cache. Embedding models do not."""
        name = self.architecture
        # GGUF names an architecture (`llama`), not a class; a bare `BertModel` has no head that writes.
        return name.endswith(_WRITES) or not ("For" in name or name.endswith("Model"))


def folder_here(name: str, source: str, cache: Path) -> Path | None:
    """Where this machine has the model's files, whole or not; None when it has none.

    Raises SourceError for a source of a form that is not taken.
    """
    parsed = parse_source(source)
    folder = parsed.path if isinstance(parsed, FolderSource) else slot_of(name, parsed, cache).path
    return folder if os.path.isdir(folder) else None  # Path.is_dir raises where this process may not look


def read_facts(folder: Path, *, dtype: str = "auto", quantization: str | None = None) -> Facts:
    """Raises SourceError for a folder that could not be loaded."""
    gguf = check_folder(folder)
    files = [file for file in folder.iterdir() if file.is_file()]
    need = estimate(folder, dtype=dtype, quantization=quantization)
    if gguf is not None:
        values = read_gguf(gguf).values
        architecture = str(values.get("general.architecture", ""))
        has_template = "tokenizer.chat_template" in values
    else:
        architecture = _architecture(read_object(folder / "config.json"))
        has_template = _has_template(folder)
    return Facts(
        folder=folder,
        size_bytes=sum(file.stat().st_size for file in files),
        architecture=architecture,
        context_length=need.context_length,
        parameters=need.parameters,
        has_chat_template=has_template,
        licence=_licence(files),
        need=need,
    )


def ask_about(source: HubSource) -> Facts:
    """What a hub tells of a model that is not here: the weights count as they are stored there.

    Raises SourceError when the hub cannot be asked, or has no such model, or one that is never fetched.
    """
    told = look(source)
    config = told.config or {}
    per_token = cache_per_token(config, ITEM_BYTES["auto"])
    context = config.get("max_position_embeddings")
    need = Estimate(
        weights=told.size_bytes,
        cache_per_token=per_token,
        cache=0,
        overhead=STEP_BYTES + PROCESS_BYTES,
        parameters=0,
        context_length=context if isinstance(context, int) and context > 0 else None,
    )
    return Facts(
        folder=None,
        size_bytes=told.size_bytes,
        architecture=_architecture(config),
        context_length=need.context_length,
        parameters=0,
        has_chat_template=told.has_chat_template,
        licence=told.licence,
        need=need,
    )


def users_that_fit(facts: Facts, memory_bytes: int) -> dict[int, int]:
    """Context length -> how many users, each with that much of it, fit into so much free memory.

    Empty for a model that keeps no cache, or whose configuration does not tell how large one is.
    """
    if not facts.writes_text or not facts.need.cache_per_token:
        return {}
    tokens = facts.need.tokens_in(memory_bytes)
    own = facts.context_length
    lengths = {length for length in CONTEXTS if own is None or length < own} | ({own} if own else set())
    return {length: tokens // length for length in sorted(lengths)}


def needs_in_words(facts: Facts) -> str:
    """`269.1 MB for weights, 738.2 MB beside them, 23.0 kB of KV cache per token`."""
    need = facts.need
    weights = f"{amount_of_bytes(need.weights)} for weights, {amount_of_bytes(need.overhead)} beside them"
    if not facts.writes_text or not need.cache_per_token:
        return weights
    return f"{weights}, {amount_of_bytes(need.cache_per_token)} of KV cache per token"


def fit_in_words(facts: Facts, memory_bytes: int) -> str:
    """`12 users × 8,192 tokens, or 48 × 2,048`, the longest first; of an embedding model only `fits`."""
    if facts.need.weights + facts.need.overhead > memory_bytes:
        return "does not fit"
    users = users_that_fit(facts, memory_bytes)
    if not users:
        return "fits"
    fitting = [(length, count) for length, count in sorted(users.items(), reverse=True) if count]
    if not fitting:
        return f"the weights fit, but no conversation of {min(users):,} tokens beside them"
    (length, count), *others = fitting
    first = f"{count:,} user{'s' if count != 1 else ''} × {length:,} tokens"
    return ", or ".join([first, *(f"{count:,} × {length:,}" for length, count in others)])


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        return named[0][:100]
    return str(config.get("model_type", ""))[:100]


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return bool(read_object(folder / "tokenizer_config.json").get("chat_template"))
    except SourceError:
        return False  # it has no such file, or a damaged one


def _licence(files: Iterable[Path]) -> str:
    for file in sorted(files):
        if is_licence(PurePosixPath(file.name)):
            with file.open(encoding="utf-8", errors="replace") as text:
                for line in text:
                    if line.strip():
                        return line.strip()[:_LONGEST_LICENCE_LINE]
    return ""
