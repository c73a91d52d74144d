"""Is this folder a model that can be loaded without running anything it brings along?

Only headers are read, so a check costs milliseconds whatever the size of the weights. It finds
missing and cut-off files; a flipped byte inside the weights is found by `cache.verify`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from inference.protocol import Cause
from inference.sources.headers import Gguf, read_gguf, read_gguf_counts, read_safetensors
from inference.sources.headers import missing as missing
from inference.sources.headers import short as short
from inference.sources.source import SourceError

CODE_FORMATS = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
"""Suffixes of weight formats that are, or may be, pickles."""

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"}
    | {"vocab.json", "vocab.txt"}
)

_LARGEST_JSON = 256 * 1024 * 1024


def check_folder(folder: Path) -> Path | None:
    """Return None when `folder` can be loaded as it is, or the one GGUF file to convert.

    Raises SourceError: MISSING_FILE for what is not there or damaged, UNSAFE_FORMAT for what could
    run code, BAD_ARGUMENT where a person has to choose. Messages name files, never folders.
    """
    try:
        if not folder.is_dir():
            raise missing("The model's folder does not exist on this node.")
        names = {entry.name for entry in folder.iterdir() if entry.is_file()}
    except OSError:
        raise missing("The model's folder cannot be read.") from None
    suffixes = {Path(name).suffix.lower() for name in names}
    refuse_code(folder, names)
    if WEIGHTS not in names and INDEX not in names:
        ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
        if len(ggufs) > 1:
            raise SourceError(
                Cause.BAD_ARGUMENT,
                f"The folder holds {len(ggufs)} .gguf files; keep the one to serve in a folder of its own.",
            )
        if ggufs:
            check_gguf_start(folder / ggufs[0])
            return folder / ggufs[0]
        if suffixes & CODE_FORMATS:
            raise SourceError(
                Cause.UNSAFE_FORMAT,
                "The weights are only there in a format that can carry code "
                f"({', '.join(sorted(suffixes & CODE_FORMATS))}); safetensors or GGUF is needed.",
            )
        raise missing(f"The model's folder has no {WEIGHTS}, no {INDEX} and no .gguf file.")
    if "config.json" not in names:
        raise missing("The model's folder has no config.json.")
    if not names & TOKENIZER_FILES:
        raise missing("The model's folder has no tokenizer (tokenizer.json or another known file).")
    if "tokenizer.json" in names:
        read_object(folder / "tokenizer.json")
    if INDEX in names:
        _check_shards(folder)
    else:
        check_safetensors(folder / WEIGHTS)
    return None


_SETTINGS = frozenset(
    {"config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"}
    | {"preprocessor_config.json", "video_preprocessor_config.json", "image_processor_config.json"}
)
"""Files that transformers looks into for the names of classes to import."""

_NAMES_CODE = frozenset({"auto_map", "model_file"})
_KERNELS = frozenset({"attn_implementation", "_attn_implementation", "_attn_implementation_internal"})
"""They may name a repository, whose code is then fetched and run."""


def refuse_code(folder: Path, names: Iterable[str]) -> None:
    """Refuse a model that says, or shows, that it comes with code of its own, or wants some of others."""
    for name in sorted(names):
        if Path(name).suffix.lower() in {".py", ".pyc", ".so"}:
            raise SourceError(
                Cause.UNSAFE_FORMAT, f"The model needs remote code: its folder holds {short(name)}."
            )
        if name in _SETTINGS and (key := _key_of_code(read_object(folder / name))):
            raise SourceError(Cause.UNSAFE_FORMAT, f"The model needs remote code: {key} is set in {name}.")


def _key_of_code(settings: dict[str, Any]) -> str:
    """The first key, at whatever depth, that names code; "" for none."""
    within: list[Any] = [settings]
    while within:
        one = within.pop()
        if isinstance(one, list):
            within += one
        elif isinstance(one, dict):
            for key, value in one.items():
                if key in _NAMES_CODE or (key in _KERNELS and "/" in str(value)):
                    return str(key)
            within += one.values()
    return ""


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top is an object."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise missing(f"{path.name} is damaged: it is larger than any such file.")
        value = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise missing(f"{path.name} is damaged: it is not JSON.") from None
    except OSError:
        raise missing(f"{path.name} cannot be read.") from None
    if not isinstance(value, dict):
        raise missing(f"{path.name} is damaged: it is not a JSON object.")
    return value


def check_safetensors(path: Path) -> frozenset[str]:
    """Check one file's header against its size and return the names of its tensors."""
    return frozenset(tensor.name for tensor in read_safetensors(path))


def _check_shards(folder: Path) -> None:
    weights = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise missing(f"{INDEX} is damaged: it has no weight_map.")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weights.items():
        # A plain name: an index must not reach outside the model's folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise SourceError(Cause.UNSAFE_FORMAT, f"{INDEX} names a file that is no safetensors shard.")
        shards.setdefault(shard, set()).add(tensor)
    for shard, tensors in sorted(shards.items()):
        if not (folder / shard).is_file():
            raise missing(f"{short(shard)} is missing; {INDEX} lists it.")
        if absent := tensors - check_safetensors(folder / shard):
            raise missing(f"{short(shard)} is damaged: it lacks {len(absent)} of its tensors.")


def check_gguf_start(path: Path) -> None:
    """Check magic, version and counts only: fit for every start."""
    read_gguf_counts(path)


def check_gguf(path: Path) -> Gguf:
    """Read the whole header (some 50 ms): all tensors must lie within the file, and be of types that can
    be converted."""
    header = read_gguf(path)
    if header.undecodable:
        raise SourceError(
            Cause.BAD_ARGUMENT,
            f"This GGUF model cannot be converted: tensors of type {', '.join(header.undecodable)} cannot be "
            "read here. Use one in another quantisation.",
        )
    return header
