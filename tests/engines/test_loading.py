"""How the transformers engine brings weights in: quantised, split, offloaded, and what memory that takes."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.engines import create_engine
from inference.engines.base import EngineSpec, LoadError
from inference.engines.memory import cache_per_token, estimate
from inference.engines.transformers import placing
from inference.engines.transformers.arguments import Arguments
from inference.engines.transformers.batcher import Batcher
from inference.engines.transformers.engine import TransformersEngine
from inference.engines.transformers.static import StaticBatcher
from inference.protocol import Cause
from inference.sources.prepare import prepare
from inference.sources.source import FolderSource
from tests.engines.test_sampling import ids_of
from tests.engines.test_transformers_engine import (
    GREEDY,
    Reference,
    answer,
    folder,
    reference,
    serving,
    smollm2,
)
from tests.engines.tiny_model import make_tiny_gguf, make_tiny_tokenizer
from tests.engines.tiny_models import make_tiny_wide_llama

__all__ = ["folder", "reference", "smollm2"]  # fixtures

QUESTION = "What is the capital of Japan?"
LAYERS = 2
LINEAR = 7
"""Linear layers of one layer of a Llama; the head is one more."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wide_llama(tmp_path_factory.mktemp("wide") / "model")


def model_of(engine: TransformersEngine) -> Any:
    return engine._serving.batcher._manager.model  # type: ignore[union-attr]


def linear_of(model: Any) -> Counter[str]:
    return Counter(type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__)


def bytes_of_layers(model: Any) -> int:
    """Of the matrices that quantisation is about, with what it keeps beside them."""
    total = 0
    for name, module in model.named_modules():
        if "Linear" in type(module).__name__ and name != "lm_head":
            total += module.weight.numel() * module.weight.element_size()
            if hasattr(module.weight, "quant_state"):
                total += placing._scales(module.weight.quant_state)
    return total


# -- quantised


@pytest.mark.parametrize(
    ("quantization", "kind", "share"), [("8bit", "Linear8bitLt", 1 / 2), ("4bit", "Linear4bit", 1 / 4)]
)
async def test_a_quantised_model_has_layers_of_fewer_bytes_and_answers_in_a_batch(
    wide: Path, quantization: str, kind: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serving(wide, quantization=quantization, dtype="bfloat16", slots=4) as engine:
        assert isinstance(engine._serving.batcher, Batcher)  # type: ignore[union-attr]
        model = model_of(engine)
        assert linear_of(model) == {kind: LAYERS * LINEAR, "Linear": 1}
        head = model.lm_head.weight
        assert (type(head), head.dtype) == (torch.nn.Parameter, torch.bfloat16)
        layers = sum(
            module.in_features * module.out_features
            for name, module in model.named_modules()
            if "Linear" in type(module).__name__ and name != "lm_head"
        )
        # Scales of blocks: a 64th of the elements, and as many bytes again for each 256 of them at least.
        assert share <= bytes_of_layers(model) / (2 * layers) < share * 1.08
        placed = placing.places(model)
        expected = estimate(wide, dtype="bfloat16", quantization=quantization)
        assert placed == {"cpu": pytest.approx(expected.weights, rel=0.03)}
        assert expected.weights < estimate(wide, dtype="bfloat16").weights
        alone = [await ids_of(engine, f"{at}", max_tokens=8, **GREEDY) for at in range(3)]
        assert len({tuple(ids) for ids in alone}) == 3
    assert "event=memory" in caplog.text
    assert "MatMul8bitLt" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"quantization": "2bit"}, "quantization"),
        ({"quantization": "8bit", "offload": "disk"}, "offload"),
        ({"devices": 2}, "devices"),
        ({"devices": 0}, "devices"),
        ({"device_memory_bytes": 10**9}, "device_memory_bytes"),
        ({"cpu_memory_bytes": 10**9}, "cpu_memory_bytes"),
        ({"offload": "cpu"}, "offload"),
        ({"offload": "tape"}, "offload"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(folder: Path, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(LoadError, match=f"'{named}'") as refused:
        async with serving(folder, **arguments):
            pass
    assert refused.value.cause is Cause.BAD_ARGUMENT


@pytest.mark.full
@pytest.mark.model
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
async def test_a_quantised_real_model_knows_the_capital_of_japan(smollm2: Path, quantization: str) -> None:
    async with serving(smollm2, quantization=quantization, dtype="auto", slots=4) as engine:
        assert "Tokyo" in await answer(engine, QUESTION, max_tokens=24, **GREEDY)
        model = model_of(engine)
        assert linear_of(model)["Linear"] == 1
        assert model.lm_head.weight.dtype in (torch.bfloat16, torch.float32)
        expected = estimate(smollm2, dtype=str(model.dtype)[6:], quantization=quantization)
        assert sum(placing.places(model).values()) == pytest.approx(expected.weights, rel=0.02)


# -- checkpoints that come quantised


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def quantised_copy(folder: Path, to: Path, about: dict[str, Any]) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    return to


@pytest.mark.parametrize(
    ("about", "wanted"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "gptq.*(optimum|gptqmodel|GPU)"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, "awq.*(gptqmodel|GPU)"),
        ({"quant_method": "aqlm", "in_group_size": 8, "num_codebooks": 1}, "aqlm.*(aqlm|GPU)"),
    ],
)
async def test_a_checkpoint_of_a_kind_that_cannot_be_read_here_says_what_is_missing(
    folder: Path, tmp_path: Path, about: dict[str, Any], wanted: str
) -> None:
    if placing._is_there("gptqmodel") or torch.cuda.is_available():
        pytest.skip("what is missing elsewhere is here")
    quantised = quantised_copy(folder, tmp_path / "quantised", about)
    with pytest.raises(LoadError, match=f"(?i){wanted}") as refused:
        async with serving(quantised):
            pass
    assert refused.value.cause is Cause.BAD_ARGUMENT
    assert str(tmp_path) not in refused.value.detail


def test_a_quantised_checkpoint_that_is_too_large_for_a_gpu_is_not_told_to_need_one() -> None:
    config = SimpleNamespace(quantization_config={"quant_method": "gptq"})
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total capacity …")
    assert placing.cannot_read(config, full, torch.device("cuda", 0)) is None
    told = placing.cannot_read(config, RuntimeError("GPU is required"), torch.device("cpu"))
    assert told is not None
    assert "needs a GPU; the device here is cpu" in told.detail


async def test_a_checkpoint_that_bitsandbytes_quantised_is_read_as_it_is(wide: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        wide, quantization_config=options, device_map={"": "cpu"}, dtype=torch.float32
    )
    made = quantised_copy(wide, tmp_path / "made", {})
    model.save_pretrained(made)
    async with serving(made) as engine:
        assert linear_of(model_of(engine))["Linear4bit"] == LAYERS * LINEAR
        assert await ids_of(engine, "hello", max_tokens=8, **GREEDY)
    with pytest.raises(LoadError, match=r"'quantization'.*bitsandbytes"):
        async with serving(made, quantization="4bit"):
            pass


# -- GGUF


def test_an_estimate_of_a_gguf_is_of_what_it_becomes(tmp_path: Path) -> None:
    make_tiny_gguf(tmp_path / "tiny.gguf")
    found = estimate(tmp_path, dtype="bfloat16")
    assert (found.weights, found.context_length) == (2 * found.parameters, 256)
    assert found.cache_per_token == 2 * 1 * 32 * 2


@pytest.mark.full
async def test_a_gguf_answers_after_its_conversion(tmp_path: Path) -> None:
    make_tiny_gguf(tmp_path / "model" / "tiny.gguf")
    path = prepare("tiny", FolderSource(tmp_path / "model"), tmp_path / "cache", lambda report: None)
    before, after = estimate(tmp_path / "model"), estimate(path)
    assert before.cache_per_token == after.cache_per_token
    assert before.weights == pytest.approx(after.weights, rel=0.01)
    assert before.context_length == after.context_length == 256
    async with serving(path) as engine:
        assert await ids_of(engine, "hello", max_tokens=8, **GREEDY) == Reference(path).ids("hello", 8)


# -- split


@pytest.mark.parametrize("share", [0.5, 0.9])
async def test_weights_that_memory_has_no_room_for_are_read_from_disk_and_the_answers_are_the_same(
    folder: Path, reference: Reference, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before = files_of(folder)
    size = int(estimate(folder, dtype="float32").weights * share)
    async with serving(folder, offload="disk", cpu_memory_bytes=size) as engine:
        batcher = engine._serving.batcher  # type: ignore[union-attr]
        assert isinstance(batcher, StaticBatcher)
        placed = placing.places(batcher._model)
        assert placed["disk"] > 0
        assert placed.get("cpu", 0) <= size
        assert await ids_of(engine, "hello", max_tokens=12, **GREEDY) == reference.ids("hello", 12)
    assert "disk 0.00 GiB" in caplog.text
    assert files_of(folder) == before


@pytest.mark.parametrize(
    ("placed", "arguments", "fits"),
    [
        ({"cuda:0": 5, "cuda:1": 5}, {"devices": 2}, True),
        ({"cuda:0": 5, "disk": 5}, {"device_memory_bytes": 5}, False),
        ({"cuda:0": 5, "cpu": 5}, {"device_memory_bytes": 5}, False),
        ({"cuda:0": 5, "cpu": 5}, {"offload": "cpu"}, True),
        ({"cuda:0": 5, "cpu": 5, "disk": 5}, {"offload": "cpu"}, False),
        ({"cuda:0": 5, "cpu": 5, "disk": 5}, {"offload": "disk"}, True),
        ({"cpu": 5}, {}, True),
        ({"cpu": 5}, {"device": "cpu"}, True),
        ({"cpu": 5, "disk": 5}, {"device": "cpu", "offload": "disk"}, True),
    ],
)
def test_weights_that_went_where_nobody_let_them_are_refused(
    placed: dict[str, int], arguments: dict[str, Any], fits: bool
) -> None:
    if fits:
        placing.check_places(placed, Arguments(**arguments))
        return
    with pytest.raises(LoadError, match="do not fit") as refused:
        placing.check_places(placed, Arguments(**arguments))
    assert refused.value.cause is Cause.OUT_OF_MEMORY


def test_two_imaginary_devices_get_even_parts_and_none_more_than_its_cap() -> None:
    """As `from_pretrained` splits with the options that `placing` gives it, without the devices."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.integrations.accelerate import compute_module_sizes
    from transformers.modeling_utils import _get_device_map

    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=24,
                num_attention_heads=4,
            )
        )  # fmt: skip
    sizes, _ = compute_module_sizes(model)

    def parts(room: dict[int | str, int]) -> Counter[Any]:
        found: Counter[Any] = Counter()
        for module, place in _get_device_map(model, "balanced", room, None).items():
            found[place] += sizes[module]
        return found

    whole = sizes[""]
    even = parts({0: whole, 1: whole})
    assert set(even) == {0, 1}
    assert max(even.values()) < 0.6 * whole
    capped = parts({0: whole // 4, 1: whole, "cpu": 0})
    assert capped[0] <= whole // 4
    with_cpu = parts({0: whole // 4, 1: whole // 4, "cpu": whole})
    assert with_cpu["cpu"] > 0
    assert max(with_cpu[0], with_cpu[1]) <= whole // 4


# -- memory

MEASURE = """
import asyncio, json, logging, sys
from pathlib import Path
from inference.engines.memory import estimate
from inference.engines.base import EngineSpec
from inference.engines.transformers import placing
from inference.engines.transformers.engine import TransformersEngine

warm, folder, arguments = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

async def loaded(folder):
    engine = TransformersEngine(EngineSpec(model_path=folder, slots=4, arguments=arguments))
    await engine.load(lambda progress: None)
    return engine

async def main():
    await (await loaded(warm)).close()  # what any model needs is there
    before = resident()
    engine = await loaded(folder)
    cache = engine._serving.batcher._manager.batch_processor.cache.cache_tensor
    cache.fill_(0)  # the machine gives memory only when it is written
    print(json.dumps({"before": before, "after": resident(), "cache": cache.nbytes}))

asyncio.run(main())
"""


@pytest.mark.full
@pytest.mark.model
@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float32"},
        {"dtype": "bfloat16", "quantization": "8bit"},
        {"dtype": "bfloat16", "quantization": "4bit"},
    ],
    ids=lambda arguments: "-".join(arguments.values()),
)
def test_the_memory_shown_is_within_15_percent_of_what_a_process_takes(
    smollm2: Path, wide: Path, arguments: dict[str, Any]
) -> None:
    cache = 256 * 1024 * 1024
    options = json.dumps({"device": "cpu", "kv_cache_bytes": cache, **arguments})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(wide), str(smollm2), options],
        capture_output=True,
        check=True,
        text=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    expected = estimate(smollm2, kv_cache_bytes=measured["cache"], **arguments)
    print(arguments, measured, expected)
    assert measured["cache"] == pytest.approx(cache, rel=0.05)
    assert expected.total == pytest.approx(measured["after"], rel=0.15)


SMALL = {"vocab_size": 258, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {**SMALL, "intermediate_size": 128, "num_key_value_heads": 2, "num_local_experts": 4},
    "Qwen3Moe": {**SMALL, "moe_intermediate_size": 64, "num_key_value_heads": 2, "num_experts": 4},
    "Gemma2": {**SMALL, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16},
    "Qwen2": {**SMALL, "intermediate_size": 128, "num_key_value_heads": 2},
    "GPT2": {"vocab_size": 258, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "T5": {"vocab_size": 258, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    "Bloom": {"vocab_size": 258, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "GPTNeoX": {**SMALL, "intermediate_size": 128},
    "Phi": {**SMALL, "intermediate_size": 128},
}
HEADS = {"GPT2": "GPT2LMHeadModel", "T5": "T5ForConditionalGeneration"}


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_an_estimate_knows_which_layers_of_a_family_are_quantised(family: str, tmp_path: Path) -> None:
    import transformers
    from transformers import BitsAndBytesConfig

    make_tiny_tokenizer(tmp_path)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    kind = getattr(transformers, HEADS.get(family, f"{family}ForCausalLM"))
    kind(config).save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = kind.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=options, device_map={"": "cpu"}
    )
    expected = estimate(tmp_path, dtype="bfloat16", quantization="4bit")
    assert expected.weights == pytest.approx(sum(placing.places(model).values()), rel=0.01)


def test_the_cache_of_a_token_follows_from_what_configs_say() -> None:
    llama = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    assert cache_per_token(llama, 2) == 2 * 30 * 3 * 64 * 2
    gpt2 = {"n_layer": 12, "n_head": 12, "n_embd": 768}
    assert cache_per_token(gpt2, 4) == 2 * 12 * 768 * 4
    for impossible in (float("inf"), 1e300, 10**30, -1, float("nan"), "30"):
        assert cache_per_token(llama | {"num_hidden_layers": impossible}, 2) == 0
    nested = {"text_config": {**llama, "layer_types": ["linear_attention", "full_attention"] * 15}}
    assert cache_per_token(nested, 2) == 15 * 2 * 3 * 64 * 2
    latent = {
        **llama,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    assert cache_per_token(latent, 2) == 30 * 9 * (128 + 64 + 128) * 2
    assert cache_per_token({"model_type": "mamba", "hidden_size": 64}, 2) == 0


def test_an_estimate_counts_tied_weights_once_and_leaves_whole_numbers_alone(
    folder: Path, tmp_path: Path
) -> None:
    made = quantised_copy(folder, tmp_path / "made", {})
    config = json.loads((made / "config.json").read_text())
    del config["quantization_config"]
    (made / "config.json").write_text(json.dumps(config))
    tensors = load_file(made / "model.safetensors")
    plain = estimate(made, dtype="bfloat16")
    assert plain.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert plain.weights == 2 * plain.parameters
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file({**tensors, **head}, made / "model.safetensors")
    assert estimate(made, dtype="bfloat16").weights == plain.weights
    save_file({**tensors, "places": torch.zeros(10, dtype=torch.int64)}, made / "model.safetensors")
    assert estimate(made, dtype="bfloat16").weights == plain.weights + 80
    whole = estimate(made, dtype="bfloat16", tokens=100)
    assert whole.cache == 100 * whole.cache_per_token
    assert whole.tokens_in(whole.total) == 100
    assert whole.context_length == 512


def test_an_estimate_imports_no_torch() -> None:
    code = "import sys, inference.engines.memory; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_arguments_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    spec = EngineSpec(model_path=tmp_path / "none", slots=1, arguments={"quantization": 4})
    with pytest.raises(LoadError, match="quantization"):
        create_engine("transformers", spec)
