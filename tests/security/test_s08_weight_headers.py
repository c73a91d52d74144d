"""S8: the headers of weight files are checked in plain Python before native code reads them. Whatever their
bytes, a file is taken or refused with its reason, soon and in little memory."""

from __future__ import annotations

import errno
import io
import json
import random
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors

from config.env import ROOT
from inference.engines.base import LoadError
from inference.engines.transformers.loading import check_folder as engine_checks
from inference.protocol import Cause
from inference.sources.check import check_folder, check_gguf, read_object
from inference.sources.headers import _GGML, DECODABLE, gguf_of, safetensors_of
from inference.sources.source import SourceError
from tests.engines.tiny_model import make_tiny_gguf, make_tiny_llama

BIG = 2**63


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama") / "model")


def packed(header: object, data: int = 8, *, length: int | None = None) -> bytes:
    """A safetensors file with this header and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def one(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def read_safetensors(content: bytes) -> int:
    return len(safetensors_of(io.BytesIO(content), len(content), "model.safetensors"))


def read_gguf(content: bytes) -> int:
    return len(gguf_of(io.BytesIO(content), len(content), "model.gguf").tensors)


SAFETENSORS: dict[str, bytes] = {
    "nothing": b"",
    "cut within its length": b"\x08\0\0",
    "a header of 2^63 bytes": packed(one(), length=BIG),
    "a header of 2^64 - 1 bytes": packed(one(), length=2**64 - 1),
    "a header longer than the file": packed(one(), length=10_000),
    "offsets of 2^63": packed(one(offsets=(BIG, BIG + 8))),
    "an end of 2^63": packed(one(offsets=(0, BIG))),
    "an end of 2^64": packed(one(offsets=(0, 2**64))),
    "a shape of 2^63": packed(one(shape=(BIG, 2))),
    "a shape whose product wraps around to 2": packed(one(shape=(2**33, 2**32, 1))),
    "a shape of 300,000 numbers": packed(one(shape=[BIG - 1] * 300_000)),
    "a negative shape": packed(one(shape=(-1, -2))),
    "a negative offset": packed(one(offsets=(-8, 0))),
    "offsets the wrong way round": packed(one(offsets=(8, 0))),
    "a shape of fractions": packed(one(shape=(2.0,))),
    "true and false for offsets": packed(one(dtype="U8", shape=(1,), offsets=(False, True)), 1),
    "three offsets": packed(one(offsets=(0, 8, 8))),
    "a type nobody knows": packed(one(dtype="F33")),
    "a type that is a number": packed(one(dtype=4)),
    "a shape that its bytes do not fit": packed(one(shape=(3,))),
    "one more field": packed({"t": {**one()["t"], "code": "x"}}),  # type: ignore[dict-item]
    "two tensors on the same bytes": packed({**one(), "u": one()["t"]}),
    "a gap between tensors": packed({**one(), "u": one(offsets=(9, 17))["t"]}, 17),
    "bytes after the last tensor": packed(one(), 9),
    "bytes missing": packed(one(), 7),
    "no tensors": packed({}),
    "metadata alone": packed({"__metadata__": {}}, 0),
    "metadata that is no text": packed({**one(), "__metadata__": {"a": 1}}),
    "a list": packed([1, 2, 3]),
    "no JSON": packed(b"{" + b"!" * 20),
    "no UTF-8": packed(b'{"\xff":1}'),
    "a header that begins with a space": packed(b" " + json.dumps(one()).encode()),
    "nested 100,000 deep": packed(b'{"t":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "metadata nested 100,000 deep": packed(b'{"__metadata__":' + b'{"a":' * 100_000 + b"}" * 100_001),
}


@pytest.mark.parametrize("what", SAFETENSORS)
def test_a_safetensors_file_whose_header_cannot_be_true_is_refused(what: str) -> None:
    with pytest.raises(SourceError, match="damaged") as refused:
        read_safetensors(SAFETENSORS[what])
    assert refused.value.cause is Cause.MISSING_FILE


def test_true_headers_are_taken() -> None:
    assert read_safetensors(packed(one())) == 1
    assert read_safetensors(packed(one(shape=(), offsets=(0, 4)), 4)) == 1
    assert read_safetensors(packed({**one(), "u": one(shape=(0,), offsets=(8, 8))["t"]})) == 2
    assert read_safetensors(packed({"__metadata__": {"format": "pt"}, **one(dtype="F4", shape=(16,))})) == 1


def at(content: bytes, place: int, form: str, value: int) -> bytes:
    return content[:place] + struct.pack(form, value) + content[place + struct.calcsize(form) :]


def tensors_start(content: bytes) -> int:
    """Where the list of tensors begins: with the length of the first one's name."""
    return content.index(b"token_embd.weight") - 8


def gguf_damages(good: bytes) -> dict[str, bytes]:
    start = tensors_start(good)
    dimensions = start + 8 + len(b"token_embd.weight")
    key = good.index(b"general.architecture")
    kind, offset = dimensions + 4 + 16, dimensions + 4 + 16 + 4
    listed = good.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4
    return {
        "nothing": b"",
        "another magic": b"GGML" + good[4:],
        "version 99": at(good, 4, "<I", 99),
        "the other byte order": at(good, 4, ">I", 3),
        "2^63 tensors": at(good, 8, "<Q", BIG),
        "2^63 values": at(good, 16, "<Q", BIG),
        "no tensors": at(good, 8, "<Q", 0),
        "more tensors than there are": at(good, 8, "<Q", 12),
        "a key of 2^63 bytes": at(good, key - 8, "<Q", BIG),
        "a value of an unknown type": at(good, key + 20, "<I", 99),
        "a text of 2^63 bytes": at(good, key + 24, "<Q", BIG),
        "a list of 2^63 texts": at(good, listed + 4, "<Q", BIG),
        "a list of an unknown type": at(good, listed, "<I", 99),
        "a list of 2^63 lists": at(at(good, listed, "<I", 9), listed + 4, "<Q", BIG),
        "a list of 2^63 numbers": at(at(good, listed, "<I", 4), listed + 4, "<Q", BIG),
        "a name of 2^63 bytes": at(good, start, "<Q", BIG),
        "no dimensions": at(good, dimensions, "<I", 0),
        "2^31 dimensions": at(good, dimensions, "<I", 2**31),
        "a row of 2^63": at(good, dimensions + 4, "<Q", BIG),
        "2^63 rows": at(good, dimensions + 12, "<Q", BIG),
        "a shape whose product wraps around": at(
            at(good, dimensions + 4, "<Q", 2**33), dimensions + 12, "<Q", 2**31
        ),
        "an offset of 2^63": at(good, offset, "<Q", BIG),
        "an offset between places": at(good, offset, "<Q", 1),
        "an offset beyond the file": at(good, offset, "<Q", len(good) // 32 * 32),
        "a type of blocks that rows do not fill": at(good, kind, "<I", 12),
        "two tensors of one name": good.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"),
        "cut in its header": good[:start],
        "cut in its weights": good[:-64],
    }


def test_a_gguf_file_whose_header_cannot_be_true_is_refused(gguf: bytes) -> None:
    assert read_gguf(gguf) == 11
    for what, content in gguf_damages(gguf).items():
        assert content != gguf, what
        with pytest.raises(SourceError, match=r"damaged|not known here") as refused:
            pytest.fail(f"taken: {what}, {read_gguf(content)} tensors")
        assert refused.value.cause in (Cause.MISSING_FILE, Cause.BAD_ARGUMENT), what


def test_no_more_of_a_gguf_file_is_read_than_a_header_may_have(
    gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a file of long texts, or of lists in lists, would take as much memory and time as it is long."""
    listed = struct.pack("<I", 9) + struct.pack("<IQ", 9, 50) + 50 * struct.pack("<IQ", 8, 0)
    text = struct.pack("<I", 8) + struct.pack("<Q", 400) + 400 * b"a"
    for value in (listed, text):
        pairs = b"".join(struct.pack("<Q", 1) + key + value for key in (b"a", b"b"))
        content = gguf[:16] + struct.pack("<Q", 2) + pairs + gguf[tensors_start(gguf) :]
        monkeypatch.setattr("inference.sources.headers._LARGEST_GGUF_HEADER", 24 + len(pairs) - 200)
        file = io.BytesIO(content)
        with pytest.raises(SourceError, match="ends too early"):
            gguf_of(file, len(content), "model.gguf")
        assert file.tell() < 24 + len(pairs)


def test_kinds_of_tensors_that_cannot_be_converted_are_named(gguf: bytes, tmp_path: Path) -> None:
    norm = gguf.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    path = tmp_path / "tiny.gguf"
    path.write_bytes(at(gguf, norm, "<I", 24))  # of one byte each: they lie within the file
    with pytest.raises(SourceError, match=r"type I8 ") as refused:
        check_gguf(path)
    assert refused.value.cause is Cause.BAD_ARGUMENT
    path.write_bytes(at(gguf, norm, "<I", 77))
    with pytest.raises(SourceError, match="type number 77"):
        check_gguf(path)


def test_our_table_of_types_is_that_of_the_package_which_converts() -> None:
    from gguf import quants
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(kind): (kind.name, *size) for kind, size in GGML_QUANT_SIZES.items()}
    assert sizes == _GGML
    assert {kind.name for kind in quants._type_traits} | {"F32", "F16"} == DECODABLE


# -- before native code


def test_the_engine_refuses_a_damaged_header_with_its_reason(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    engine_checks(folder)
    for what in ("offsets of 2^63", "a header of 2^63 bytes", "two tensors on the same bytes"):
        (folder / "model.safetensors").write_bytes(SAFETENSORS[what])
        with pytest.raises(LoadError, match="damaged") as refused:
            engine_checks(folder)
        assert refused.value.cause is Cause.MISSING_FILE
        assert str(tmp_path) not in refused.value.detail
        with pytest.raises(SourceError, match="damaged"):
            check_folder(folder)


@pytest.mark.parametrize("deep", [b"[" * 200_000, b'{"a":' * 200_000])
def test_a_config_nested_without_end_is_refused(tmp_path: Path, deep: bytes) -> None:
    (tmp_path / "config.json").write_bytes(deep)
    with pytest.raises(SourceError, match="damaged"):
        read_object(tmp_path / "config.json")


# -- fuzzing

NUMBERS = [0, 1, 2**31, 2**32 - 1, 2**32, BIG - 1, BIG, 2**64 - 1]


def mutated(rng: random.Random, good: bytes, within: int) -> bytes:
    """`good` with a few bytes or numbers of its first `within` changed, cut out, doubled or cut off."""
    content = bytearray(good)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(within)
        match rng.randrange(6):
            case 0:
                content[place] ^= 1 << rng.randrange(8)
            case 1:
                content[place] = rng.randrange(256)
            case 2:
                content[place : place + 8] = struct.pack("<Q", rng.choice(NUMBERS))
            case 3:
                content[place : place + 4] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
            case 4:
                del content[place : place + rng.randrange(1, 9)]
            case _:
                content[place:place] = content[place : place + rng.randrange(1, 40)]
        if len(content) <= within:
            break
    if rng.random() < 0.1:
        del content[rng.randrange(len(content)) :]
    return bytes(content)


def fuzz(read: Callable[[bytes], int], good: bytes, within: int, runs: int, *, seed: int) -> int:
    """How many were refused; anything but a refusal or an answer fails."""
    rng = random.Random(seed)
    refused = 0
    for _ in range(runs):
        content = mutated(rng, good, within)
        began = time.perf_counter()
        said = refusal(read, content)
        assert time.perf_counter() - began < 5
        if said is not None:
            refused += 1
            assert said.cause in (Cause.MISSING_FILE, Cause.BAD_ARGUMENT)
            assert len(said.detail) < 300
    return refused


def refusal(read: Callable[[bytes], int], content: bytes) -> SourceError | None:
    try:
        read(content)
    except SourceError as error:
        return error
    return None


def read_safetensors_twice(content: bytes) -> int:
    """What is taken here, its own library takes too: no other reading of the same bytes."""
    count = read_safetensors(content)
    assert len(safetensors.deserialize(content)) == count
    return count


def fuzz_both(gguf: bytes, runs: int, seed: int) -> None:
    tensors = {f"layer.{number}": one(offsets=(8 * number, 8 * number + 8))["t"] for number in range(6)}
    whole = packed({"__metadata__": {"format": "pt"}, **tensors}, 48)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = fuzz(read_safetensors_twice, whole, len(whole) - 48, runs // 2, seed=seed)
    assert refused > runs // 4
    # Its vocabulary is most of a GGUF's header, and of no interest: what is around it is.
    small = make_small(gguf)
    refused = fuzz(read_gguf, small, tensors_start(small) + 700, runs // 2, seed=seed)
    assert refused > runs // 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024


def make_small(gguf: bytes) -> bytes:
    """The same file with a vocabulary of two texts: its list is shortened, its padding made good."""
    place = gguf.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4
    end = gguf.index(b"tokenizer.ggml.token_type") - 8
    texts = struct.pack("<IQ", 8, 2) + 2 * (struct.pack("<Q", 1) + b"a")
    header_end = gguf.index(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight") + 4 + 16 + 4 + 8
    data = gguf[-(-header_end // 32) * 32 :]
    header = gguf[:place] + texts + gguf[end:header_end]
    small = header + bytes(-len(header) % 32) + data
    assert read_gguf(small) == 11
    return small


def test_twenty_thousand_mutated_headers_are_taken_or_refused(gguf: bytes) -> None:
    fuzz_both(gguf, 20_000, seed=8)


@pytest.mark.full
def test_a_million_mutated_headers_are_taken_or_refused(gguf: bytes) -> None:
    fuzz_both(gguf, 1_000_000, seed=9)


# -- what native code may use


CONVERSION = """
import os, sys
from inference.bounds import GIB, MEMORY, MEMORY_PER_CORE, hold_conversion

hold_conversion(int(sys.argv[1]))
for name in sys.argv[2:]:
    try:
        if name == "memory":
            bytes(MEMORY + MEMORY_PER_CORE * os.cpu_count() + GIB // 2)  # no page of it is touched
        else:
            with open(name, "wb") as file:
                file.truncate(600 * 1024**2)
    except (MemoryError, OSError) as error:
        print(type(error).__name__, getattr(error, "errno", None))
    else:
        print("done")
"""


@pytest.mark.parametrize(
    ("weights", "told"),
    [(1000, ["MemoryError None", f"OSError {errno.EFBIG}"]), (4 * 1024**3, ["done", "done"])],
)
def test_a_conversion_is_held_to_what_its_weights_need(tmp_path: Path, weights: int, told: list[str]) -> None:
    command = [sys.executable, "-c", CONVERSION, str(weights), "memory", str(tmp_path / "file")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == told, done.stderr
