"""Is this folder a model that can be loaded without running anything it brings along?

Only headers are read, so a check costs milliseconds whatever the size of the weights. It finds
missing and cut-off files; a flipped byte inside the weights is found by `cache.verify`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from inference.protocol import Cause
from inference.sources.source import SourceError

CODE_FORMATS = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
"""Suffixes of weight formats that are, or may be, pickles."""

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"}
    | {"vocab.json", "vocab.txt"}
)

_LARGEST_HEADER = 100 * 1024 * 1024
_LARGEST_COUNT = 1_000_000
_LARGEST_JSON = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What the start of a GGUF file says."""

    tensors: int
    elements: int
    """Of all tensors together: two bytes each once converted."""


def missing(detail: str) -> SourceError:
    return SourceError(Cause.MISSING_FILE, detail)


def check_folder(folder: Path) -> Path | None:
    """Return None when `folder` can be loaded as it is, or the one GGUF file to convert.

    Raises SourceError: MISSING_FILE for what is not there or damaged, UNSAFE_FORMAT for what could
    run code, BAD_ARGUMENT where a person has to choose. Messages name files, never folders.
    """
    if not folder.is_dir():
        raise missing("The model's folder does not exist on this node.")
    names = {entry.name for entry in folder.iterdir() if entry.is_file()}
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


def refuse_code(folder: Path, names: Iterable[str]) -> None:
    """Refuse a model that says, or shows, that it comes with Python code of its own."""
    for name in sorted(names):
        if Path(name).suffix.lower() in {".py", ".pyc", ".so"}:
            raise SourceError(
                Cause.UNSAFE_FORMAT, f"The model needs remote code: its folder holds {short(name)}."
            )
        if name in {"config.json", "tokenizer_config.json"} and "auto_map" in read_object(folder / name):
            raise SourceError(Cause.UNSAFE_FORMAT, f"The model needs remote code: auto_map is set in {name}.")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top is an object."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise missing(f"{path.name} is damaged: it is larger than any such file.")
        value = msgspec.json.decode(path.read_bytes())
    except msgspec.DecodeError:
        raise missing(f"{path.name} is damaged: it is not JSON.") from None
    except OSError:
        raise missing(f"{path.name} cannot be read.") from None
    if not isinstance(value, dict):
        raise missing(f"{path.name} is damaged: it is not a JSON object.")
    return value


def check_safetensors(path: Path) -> frozenset[str]:
    """Check one file's header against its size and return the names of its tensors."""
    damaged = f"{short(path.name)} is damaged"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise missing(f"{damaged}: it is too short.")
            (length,) = struct.unpack("<Q", start)
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise missing(f"{damaged}: its header does not fit the file.")
            header = msgspec.json.decode(file.read(length))
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise missing(f"{damaged}: its header is not JSON.") from None
    except OSError:
        raise missing(f"{short(path.name)} cannot be read.") from None
    if not isinstance(header, dict):
        raise missing(f"{damaged}: its header is not a JSON object.")
    header.pop("__metadata__", None)
    end_of_data = 0
    for tensor in header.values():
        match tensor:
            case {"dtype": str(), "shape": list(), "data_offsets": [int(begin), int(end)]}:
                if not 0 <= begin <= end:
                    raise missing(f"{damaged}: a tensor has impossible offsets.")
                end_of_data = max(end_of_data, end)
            case _:
                raise missing(f"{damaged}: a tensor has no offsets.")
    if not header:
        raise missing(f"{damaged}: it holds no tensors.")
    if end_of_data != size - 8 - length:
        raise missing(f"{damaged}: it should have {8 + length + end_of_data} bytes and has {size}.")
    return frozenset(header)


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
    try:
        with path.open("rb") as file:
            _read_gguf_counts(path.name, file)
    except OSError:
        raise missing(f"{short(path.name)} cannot be read.") from None


def check_gguf(path: Path) -> GgufHeader:
    """Read the whole header (some 50 ms) and check that all tensors lie within the file."""
    damaged = missing(f"{short(path.name)} is damaged: it ends too early.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            tensors, pairs = _read_gguf_counts(path.name, file)
            alignment = 32
            for _ in range(pairs):
                key = _read_string(file, size)
                kind = _unpack(file, "<I")
                if key == b"general.alignment" and kind == _UINT32:
                    alignment = _unpack(file, "<I")
                else:
                    _skip_value(file, kind, size)
            elements = last = 0
            for _ in range(tensors):
                _read_string(file, size)
                dimensions = _unpack(file, "<I")
                if dimensions > 8:
                    raise missing(f"{short(path.name)} is damaged: a tensor has {dimensions} dimensions.")
                shape = [_unpack(file, "<Q") for _ in range(dimensions)]
                elements += math.prod(shape)
                kind, offset = _unpack(file, "<I"), _unpack(file, "<Q")
                last = max(last, offset + _tensor_bytes(kind, math.prod(shape)))
            start_of_data = -(-file.tell() // max(alignment, 1)) * max(alignment, 1)
    except (struct.error, ValueError):
        raise damaged from None
    except OSError:
        raise missing(f"{short(path.name)} cannot be read.") from None
    if start_of_data + last > size:
        raise damaged
    return GgufHeader(tensors=tensors, elements=elements)


# GGUF's value types: width in bytes of the plain ones, then the two that have a length.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9


def _read_gguf_counts(name: str, file: IO[bytes]) -> tuple[int, int]:
    start = file.read(24)
    if len(start) < 24 or start[:4] != b"GGUF":
        raise missing(f"{short(name)} is damaged: it does not start as a GGUF file.")
    version, tensors, pairs = struct.unpack("<IQQ", start[4:])
    if version not in (2, 3):
        raise missing(f"{short(name)} is of a GGUF version that is not known here, or damaged.")
    if not 0 < tensors <= _LARGEST_COUNT or not 0 < pairs <= _LARGEST_COUNT:
        raise missing(f"{short(name)} is damaged: its counts are impossible.")
    return tensors, pairs


def _unpack(file: IO[bytes], form: str) -> int:
    (value,) = struct.unpack(form, file.read(struct.calcsize(form)))
    return int(value)


def _read_string(file: IO[bytes], size: int) -> bytes:
    length = _unpack(file, "<Q")
    if length > size:
        raise ValueError("a string longer than the file")
    return file.read(length)


def _skip_value(file: IO[bytes], kind: int, size: int, depth: int = 0) -> None:
    if kind in _WIDTHS:
        file.seek(_WIDTHS[kind], 1)
    elif kind == _STRING:
        _read_string(file, size)
    elif kind == _ARRAY and depth < 4:
        inner, count = _unpack(file, "<I"), _unpack(file, "<Q")
        if count > size:
            raise ValueError("an array longer than the file")
        if inner in _WIDTHS:
            file.seek(_WIDTHS[inner] * count, 1)
        else:
            for _ in range(count):
                _skip_value(file, inner, size, depth + 1)
    else:
        raise ValueError("an unknown value type")


def _tensor_bytes(kind: int, elements: int) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # numpy: only when converting

    block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return int(elements // block * width)


def short(name: str) -> str:
    """A file name fit for a sentence."""
    printable = "".join(char if char.isprintable() else "?" for char in name)
    return printable if len(printable) <= 80 else f"{printable[:77]}..."
