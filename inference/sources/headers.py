"""The headers of weight files, in plain Python: what is in a file, and whether it can be true.

Native code reads the files afterwards and trusts what they say. So every count, length and offset is
checked here first, against the file's size and against each other. Files may be hostile: whatever their
bytes, a function here returns or raises SourceError, in memory and time that the bounds below limit.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import msgspec

from inference.protocol import Cause
from inference.sources.source import SourceError

_Header = TypeVar("_Header")

LARGEST_HEADER = 100 * 1024 * 1024
"""Of a safetensors file; its own library has the same bound."""
_LARGEST_GGUF_HEADER = 512 * 1024 * 1024
_LARGEST_COUNT = 1_000_000
"""Tensors, or values, of a GGUF file."""
_LARGEST_STRING = 64 * 1024 * 1024
_LARGEST_LIST = 16_000_000
"""Strings or lists in a list of a GGUF file: vocabularies have less than a million."""
_LARGEST_ALIGNMENT = 1 << 20
_LARGEST_NAME = 1024
_DIMENSIONS = 4
"""Of a GGUF tensor at most."""
_MOST_DIMENSIONS = 64
"""Of a safetensors tensor, as in PyTorch: the product of a million numbers takes hours."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a weight file."""

    name: str
    kind: str
    """As the format calls it: `BF16`, `I32`, `Q4_K`."""
    shape: tuple[int, ...]
    """In the order of PyTorch: rows first."""
    bytes: int
    """In the file."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Gguf:
    """What a GGUF file says of itself."""

    tensors: list[Tensor]
    values: dict[str, str | int | float | bool]
    """Its plain values; of lists, only how long they are."""

    @property
    def elements(self) -> int:
        """Of all tensors together: two bytes each once converted."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def undecodable(self) -> list[str]:
        """The kinds of its tensors that cannot be converted, in alphabetical order."""
        return sorted({tensor.kind for tensor in self.tensors} - DECODABLE)


def missing(detail: str) -> SourceError:
    return SourceError(Cause.MISSING_FILE, detail)


def short(name: str) -> str:
    """A file name, or another word from a file, fit for a sentence."""
    printable = "".join(char if char.isprintable() else "?" for char in name)
    return printable if len(printable) <= 80 else f"{printable[:77]}..."


# -- safetensors

BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8},
    **{"F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **{"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32},
    **{"U64": 64, "I64": 64, "F64": 64, "C64": 64},
}
"""Width of an element, by the names of safetensors."""

_Size = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[list[_Size], msgspec.Meta(max_length=_MOST_DIMENSIONS)]
    data_offsets: tuple[_Size, _Size]


_entries = msgspec.json.Decoder(dict[str, msgspec.Raw])
_entry = msgspec.json.Decoder(_Entry)
_metadata = msgspec.json.Decoder(dict[str, str] | None)


def read_safetensors(path: Path) -> list[Tensor]:
    """The tensors of one file. Raises SourceError when they and the file do not agree."""
    return _of_file(path, safetensors_of)


def safetensors_of(file: IO[bytes], size: int, name: str) -> list[Tensor]:
    """See `read_safetensors`; `size` is the file's."""
    damaged = f"{name} is damaged"
    start = file.read(8)
    if len(start) < 8:
        raise missing(f"{damaged}: it is too short.")
    (length,) = struct.unpack("<Q", start)
    if not 2 <= length <= min(LARGEST_HEADER, size - 8):
        raise missing(f"{damaged}: its header does not fit the file.")
    header = file.read(length)
    if not header.startswith(b"{"):
        raise missing(f"{damaged}: its header is not a JSON object.")
    tensors: list[tuple[int, int, Tensor]] = []
    try:
        entries = _entries.decode(header)
        _metadata.decode(entries.pop("__metadata__", b"null"))
        for key, raw in entries.items():
            entry = _entry.decode(raw)
            begin, end = entry.data_offsets
            tensors.append((begin, end, Tensor(key, entry.dtype, tuple(entry.shape), end - begin)))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise missing(f"{damaged}: its header is not one of tensors.") from None
    if not tensors:
        raise missing(f"{damaged}: it holds no tensors.")
    # Without gaps and overlaps, each as long as its shape says: no tensor can reach beyond its own bytes.
    place = 0
    for begin, end, tensor in sorted(tensors, key=lambda one: one[:2]):
        bits = BITS.get(tensor.kind)
        if bits is None:
            raise missing(f"{damaged}: {short(tensor.kind)} is no type of safetensors.")
        if begin != place or tensor.elements * bits != (end - begin) * 8:
            raise missing(f"{damaged}: the offsets of {short(tensor.name)} are impossible.")
        place = end
    if place != size - 8 - length:
        raise missing(f"{damaged}: it should have {8 + length + place} bytes and has {size}.")
    return [tensor for _, _, tensor in tensors]


# -- GGUF

# llama.cpp's types by number: name, elements of a block, bytes of a block.
_GGML = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8)},
    **{24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8)},
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24)},
    **{8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110)},
    **{12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292)},
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98)},
    **{19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82)},
    **{23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66)},
    **{39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18)},
}

DECODABLE = frozenset(
    {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    | {"IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_S", "IQ3_XXS", "IQ4_NL", "IQ4_XS"}
    | {"MXFP4", "NVFP4", "TQ1_0", "TQ2_0"}
)
"""What the package gguf turns into numbers; a test compares this list with it."""

# GGUF's value types: how each plain one is packed, then the two that have a length.
_PACKED = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"} | {
    10: "<Q",
    11: "<q",
    12: "<d",
}
_WIDTHS = {kind: struct.calcsize(form) for kind, form in _PACKED.items()}
_STRING, _ARRAY = 8, 9
_NESTED = 4


def read_gguf_counts(path: Path) -> tuple[int, int]:
    """How many tensors and values there are, by magic and version of a GGUF file that can be read here."""
    try:
        with path.open("rb") as file:
            return _counts_of(file, short(path.name))
    except OSError:
        raise missing(f"{short(path.name)} cannot be read.") from None


def read_gguf(path: Path) -> Gguf:
    """The whole header (some 50 ms). Raises SourceError unless all tensors lie within the file."""
    return _of_file(path, gguf_of)


def gguf_of(file: IO[bytes], size: int, name: str) -> Gguf:
    """See `read_gguf`; `size` is the file's."""
    damaged = f"{name} is damaged"
    count, pairs = _counts_of(file, name)
    values: dict[str, Any] = {}
    tensors: list[Tensor] = []
    last, end = 0, min(size, _LARGEST_GGUF_HEADER)
    try:
        for _ in range(pairs):
            key = _string(file, end, _LARGEST_NAME)
            values[key] = _value(file, end, _unpack(file, "<I"))
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _LARGEST_ALIGNMENT:
            raise missing(f"{damaged}: its alignment is impossible.")
        for _ in range(count):
            tensor, offset = _tensor(file, end, damaged)
            if offset % alignment:
                raise missing(f"{damaged}: the offset of {short(tensor.name)} is impossible.")
            tensors.append(tensor)
            last = max(last, offset + tensor.bytes)
        start = -(-file.tell() // alignment) * alignment
    except (struct.error, ValueError, OverflowError):
        raise missing(f"{damaged}: it ends too early.") from None
    if start + last > size:
        raise missing(f"{damaged}: it ends too early.")
    if len({tensor.name for tensor in tensors}) != count:
        raise missing(f"{damaged}: two of its tensors have one name.")
    return Gguf(tensors, values)


def _counts_of(file: IO[bytes], name: str) -> tuple[int, int]:
    start = file.read(24)
    if len(start) < 24 or start[:4] != b"GGUF":
        raise missing(f"{name} is damaged: it does not start as a GGUF file.")
    version, tensors, pairs = struct.unpack("<IQQ", start[4:])
    if version not in (2, 3):
        raise missing(f"{name} is of a GGUF version that is not known here, or damaged.")
    if not 0 < tensors <= _LARGEST_COUNT or not 0 < pairs <= _LARGEST_COUNT:
        raise missing(f"{name} is damaged: its counts are impossible.")
    return tensors, pairs


def _tensor(file: IO[bytes], end: int, damaged: str) -> tuple[Tensor, int]:
    name = _string(file, end, _LARGEST_NAME)
    dimensions = _unpack(file, "<I")
    if not 1 <= dimensions <= _DIMENSIONS:
        raise missing(f"{damaged}: {short(name)} has {dimensions} dimensions.")
    shape = [_unpack(file, "<Q") for _ in range(dimensions)]
    number, offset = _unpack(file, "<I"), _unpack(file, "<Q")
    if number not in _GGML:
        raise SourceError(
            Cause.BAD_ARGUMENT,
            f"The GGUF file has a tensor of type number {number}, which is not known here.",
        )
    kind, block, width = _GGML[number]
    if shape[0] % block:
        raise missing(f"{damaged}: the shape of {short(name)} is impossible.")
    found = Tensor(name, kind, tuple(reversed(shape)), math.prod(shape) // block * width)
    return found, offset


def _value(file: IO[bytes], end: int, kind: int, depth: int = 0) -> str | int | float | bool:
    """A plain value; of a list, its length."""
    if kind in _PACKED:
        (value,) = struct.unpack(_PACKED[kind], file.read(_WIDTHS[kind]))
        plain: int | float | bool = value
        return plain
    if kind == _STRING:
        return _string(file, end, _LARGEST_STRING)
    if kind != _ARRAY or depth == _NESTED:
        raise ValueError("an unknown value type")
    inner, count = _unpack(file, "<I"), _unpack(file, "<Q")
    if file.tell() > end:
        raise ValueError("a list beyond the header")
    if inner in _WIDTHS:
        _skip(file, end, _WIDTHS[inner] * count)
    elif inner == _STRING and count <= _LARGEST_LIST:
        for _ in range(count):
            _skip(file, end, _unpack(file, "<Q"))
    elif inner == _ARRAY and count <= _LARGEST_COUNT:
        for _ in range(count):
            _value(file, end, inner, depth + 1)
    else:
        raise ValueError("an unknown or impossible list")
    return count


def _unpack(file: IO[bytes], form: str) -> int:
    (value,) = struct.unpack(form, file.read(struct.calcsize(form)))
    return int(value)


def _string(file: IO[bytes], end: int, most: int) -> str:
    length = _unpack(file, "<Q")
    if length > min(end - file.tell(), most):
        raise ValueError("a string beyond the header")
    content = file.read(length)
    if len(content) < length:
        raise ValueError("a string beyond the header")
    return content.decode("utf-8", "replace")


def _skip(file: IO[bytes], end: int, length: int) -> None:
    if length > end - file.tell():
        raise ValueError("a value beyond the header")
    file.seek(length, 1)


def _of_file(path: Path, read: Callable[[IO[bytes], int, str], _Header]) -> _Header:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return read(file, size, short(path.name))
    except OSError:
        raise missing(f"{short(path.name)} cannot be read.") from None
