"""S7: a model that brings code, or names code elsewhere, is refused by preparation and by the engine, and the
code never runs; an engine connects to nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inference.engines.base import EngineSpec, LoadError
from inference.engines.transformers.engine import TransformersEngine
from inference.protocol import Cause
from inference.sources.prepare import prepare
from inference.sources.source import FolderSource, SourceError
from inference.worker.engine_process import engine_environment
from tests.engines.tiny_model import make_tiny_llama

MAPS = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": "own.T"}

TRIGGERS: dict[str, tuple[str, dict[str, Any]]] = {
    "a map in the config": ("config.json", {"auto_map": MAPS}),
    "a map to another repository": ("config.json", {"auto_map": {"AutoConfig": "other/repo--own.C"}}),
    "a map in the tokenizer's config": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": "own.T"}}),
    "a map in a processor's config": ("processor_config.json", {"auto_map": {"AutoProcessor": "own.P"}}),
    "a map in a part of the config": ("config.json", {"text_config": {"auto_map": MAPS}}),
    "a kernel from a repository": ("config.json", {"_attn_implementation_internal": "other/kernel"}),
    "the same by its public name": ("config.json", {"attn_implementation": "other/kernel@main:f"}),
    "the same in a part": ("config.json", {"text_config": {"_attn_implementation": "other/kernel"}}),
    "a file of a model's own": ("config.json", {"model_file": "own.py"}),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama") / "model")


def hostile(llama: Path, at: Path, *, name: str = "", said: dict[str, Any] | None = None) -> Path:
    """The model in `at/model`, whose file `name` also says this. With `name` a `.py`, the code itself."""
    folder = at / "model"
    folder.mkdir(parents=True)
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if name.endswith(".json"):
        path = folder / name
        about = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**about, **(said or {})}))
    elif name:
        (folder / name).write_text(f"open({str(at / 'canary')!r}, 'w')")
    return folder


async def is_refused(folder: Path, at: Path) -> None:
    with pytest.raises(SourceError, match=r"needs remote code|needs code") as unprepared:
        prepare("m", FolderSource(folder), at / "cache", lambda report: None)
    assert unprepared.value.cause is Cause.UNSAFE_FORMAT
    engine = TransformersEngine(EngineSpec(model_path=folder, slots=1, arguments={"device": "cpu"}))
    with pytest.raises(LoadError) as unloaded:
        await engine.load(lambda progress: None)
    assert unloaded.value.cause is Cause.UNSAFE_FORMAT
    assert not (at / "canary").exists()


@pytest.mark.parametrize("what", TRIGGERS)
async def test_a_config_that_names_code_is_refused(llama: Path, tmp_path: Path, what: str) -> None:
    name, said = TRIGGERS[what]
    await is_refused(hostile(llama, tmp_path, name=name, said=said), tmp_path)


@pytest.mark.parametrize("name", ["own.py", "modeling_llama.py", "own.pyc", "own.so", "OWN.PY"])
async def test_a_folder_that_holds_code_is_refused(llama: Path, tmp_path: Path, name: str) -> None:
    await is_refused(hostile(llama, tmp_path, name=name), tmp_path)


def test_an_honest_model_is_taken(llama: Path, tmp_path: Path) -> None:
    said = {"_attn_implementation": "sdpa", "attn_implementation": "flash_attention_2"}
    folder = hostile(llama, tmp_path, name="config.json", said=said)
    assert prepare("m", FolderSource(folder), tmp_path / "cache", lambda report: None) == folder


UNASSERTED = """
import sys
from pathlib import Path
from inference.sources.check import check_folder
from inference.sources.source import SourceError
assert False, "not seen under -O"
for folder in map(Path, sys.argv[1:]):
    try:
        check_folder(folder)
    except SourceError as error:
        print(error.cause)
    else:
        print("taken")
"""


def test_the_walls_stand_without_assertions(llama: Path, tmp_path: Path) -> None:
    folders = [
        hostile(llama, tmp_path / str(number), name=name, said=said)
        for number, (name, said) in enumerate(TRIGGERS.values())
    ]
    folders.append(hostile(llama, tmp_path / "code", name="own.py"))
    done = subprocess.run(
        [sys.executable, "-O", "-c", UNASSERTED, *map(str, folders)],
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.split() == [Cause.UNSAFE_FORMAT] * len(folders)


LISTENING = """
import asyncio, json, sys
from pathlib import Path
reached = []
def hear(event, about):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        reached.append(f"{event} {about[1:] if event == 'socket.connect' else about}")
sys.addaudithook(hear)
from inference.engines.base import EngineSpec, GenerationRequest, Sampling
from inference.engines.transformers.engine import TransformersEngine

async def main():
    arguments = {"device": "cpu", **json.loads(sys.argv[2])}
    engine = TransformersEngine(EngineSpec(model_path=Path(sys.argv[1]), slots=1, arguments=arguments))
    await engine.load(lambda progress: None)
    request = GenerationRequest(request_id="r", prompt="x", sampling=Sampling(max_tokens=2))
    async for _ in engine.generate(request):
        pass
    await engine.close()

asyncio.run(main())
print("\\n".join(reached))
"""


@pytest.mark.full
@pytest.mark.parametrize("arguments", [{}, {"quantization": "8bit"}], ids=["plain", "8bit"])
def test_an_engine_reaches_out_to_nothing(llama: Path, arguments: dict[str, str]) -> None:
    """It loads and answers; what it would connect to or look up is heard by the interpreter itself."""
    environment = engine_environment(os.environ, {}, "secret")
    assert environment["HF_HUB_OFFLINE"] == "1"
    done = subprocess.run(
        [sys.executable, "-c", LISTENING, str(llama), json.dumps(arguments)],
        capture_output=True,
        check=True,
        text=True,
        env=environment,
    )
    assert done.stdout.split() == []
