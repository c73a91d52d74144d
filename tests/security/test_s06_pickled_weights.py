"""S6: weights in a format that can carry code are refused before any loader sees them, and what they carry
never runs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import msgspec
import pytest

from inference.engines.base import EngineSpec, LoadError
from inference.engines.transformers.engine import TransformersEngine
from inference.protocol import Assignment, Cause, CopyPhase, CopyReport, ModelSpec, ProcessReport, Wish
from inference.sources.check import CODE_FORMATS
from inference.sources.prepare import prepare
from inference.sources.source import FolderSource, SourceError
from inference.worker.spec import WorkerSpec
from tests.engines.tiny_model import make_tiny_llama

FORMATS = {
    ".bin": "pytorch_model.bin",
    ".pt": "model.pt",
    ".pth": "consolidated.00.pth",
    ".pkl": "model.pkl",
    ".ckpt": "last.ckpt",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama") / "model")


def plain(canary: Path) -> bytes:
    """A pickle that creates the file `canary` when it is read."""
    return f"cbuiltins\nopen\n(S'{canary}'\nS'w'\ntR.".encode()


def zipped(canary: Path) -> bytes:
    """The same as `torch.save` packs it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", plain(canary))
        archive.writestr("archive/version", "3\n")
    return packed.getvalue()


def poisoned(llama: Path, to: Path, name: str, content: bytes, *, safe: bool = False) -> Path:
    """The model with these weights; with `safe`, beside its own."""
    to.mkdir()
    for path in llama.iterdir():
        if safe or path.suffix != ".safetensors":
            (to / path.name).write_bytes(path.read_bytes())
    (to / name).write_bytes(content)
    if name == "pytorch_model.bin":
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (to / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return to


def test_the_canary_sings_where_a_pickle_is_read(tmp_path: Path) -> None:
    canary, weights = tmp_path / "canary", tmp_path / "w"
    weights.write_bytes(plain(canary))
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(weights)], check=True)
    assert canary.exists()


@pytest.mark.parametrize("made", [plain, zipped], ids=["plain", "zipped"])
@pytest.mark.parametrize("suffix", FORMATS)
async def test_such_a_folder_is_refused_by_preparation_and_engine(
    llama: Path, tmp_path: Path, suffix: str, made: object
) -> None:
    assert suffix in CODE_FORMATS
    canary = tmp_path / "canary"
    content = made(canary)  # type: ignore[operator]
    folder = poisoned(llama, tmp_path / "model", FORMATS[suffix], content)
    reports: list[CopyReport] = []
    with pytest.raises(SourceError, match="can carry code") as unprepared:
        prepare("m", FolderSource(folder), tmp_path / "cache", reports.append)
    assert unprepared.value.cause is Cause.UNSAFE_FORMAT
    assert not any(report.phase is CopyPhase.READY for report in reports)
    engine = TransformersEngine(EngineSpec(model_path=folder, slots=1, arguments={"device": "cpu"}))
    with pytest.raises(LoadError, match="can carry code") as unloaded:
        await engine.load(lambda progress: None)
    assert unloaded.value.cause is Cause.UNSAFE_FORMAT
    assert not canary.exists()


async def test_beside_safetensors_it_is_never_read(llama: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = poisoned(llama, tmp_path / "model", "pytorch_model.bin", zipped(canary), safe=True)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(plain(canary))
    engine = TransformersEngine(EngineSpec(model_path=folder, slots=1, arguments={"device": "cpu"}))
    await engine.load(lambda progress: None)
    await engine.close()
    assert not canary.exists()


def end_of_worker(folder: Path, model: Path, engine: str = "transformers") -> ProcessReport:
    """How a whole worker ends, started as an agent starts one, with a gateway that is away."""
    folder.mkdir()
    assignment = Assignment(
        worker_id=1,
        epoch=1,
        name="w",
        wish=Wish.RUN,
        engine=engine,
        model=ModelSpec(id=1, name="m", source=str(model)),
        slots=1,
        secret="s" * 32,
        served_name="m",
        arguments={"device": "cpu"},
        environment={},
        drain_seconds=1.0,
    )
    spec = WorkerSpec(
        assignment=assignment, gateway_url="http://127.0.0.1:9", folder=str(folder), model_path=str(model)
    )
    (folder / "spec.json").write_bytes(msgspec.json.encode(spec))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DJANGO_")}
    began = time.monotonic()
    with open(folder / "worker.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "inference.worker", str(folder / "spec.json")],
            stdout=log,
            stderr=log,
            env=environment,
        )
        try:
            assert process.wait(120) == 1, (folder / "worker.log").read_text()
        finally:
            process.kill()
    assert time.monotonic() - began < 120
    return msgspec.json.decode((folder / "end.json").read_bytes(), type=ProcessReport)


def fails_as_unsafe(llama: Path, at: Path, suffix: str) -> None:
    canary = at / "canary"
    model = poisoned(llama, at / "model", FORMATS[suffix], plain(canary))
    end = end_of_worker(at / "worker", model)
    assert (end.cause, end.running) == (Cause.UNSAFE_FORMAT, False)
    assert str(at) not in end.detail
    assert not canary.exists()


def test_a_worker_of_such_a_model_fails_with_unsafe_format(llama: Path, tmp_path: Path) -> None:
    fails_as_unsafe(llama, tmp_path, ".bin")


@pytest.mark.full
@pytest.mark.parametrize("suffix", [suffix for suffix in FORMATS if suffix != ".bin"])
def test_so_does_one_of_every_other_format(llama: Path, tmp_path: Path, suffix: str) -> None:
    fails_as_unsafe(llama, tmp_path, suffix)
