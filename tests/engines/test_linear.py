"""Packed linear layers give what plain ones give."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from inference.engines.transformers.linear import PackedLinear, pack_in
from tests.engines.test_transformers_engine import ask, deltas, folder, serving

__all__ = ["folder"]  # a fixture

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor does not compute in bfloat16"
)

TOKENS = torch.tensor([[1, 5, 9, 2, 7, 7, 3]])


def scores(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()  # type: ignore[no-any-return]


def test_a_packed_model_scores_as_a_plain_one(folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert pack_in(packed)
    plain_ones = [name for name, module in packed.named_modules() if type(module) is torch.nn.Linear]
    assert plain_ones == ["lm_head"]  # whose weights are those of the embedding
    torch.testing.assert_close(scores(packed), scores(plain), atol=0.02, rtol=0.02)


def test_layers_that_read_one_input_keep_their_biases_and_their_order() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(16, 8)
            self.k_proj = torch.nn.Linear(16, 4, bias=False)
            self.v_proj = torch.nn.Linear(16, 4)
            self.embedding = torch.nn.Embedding(4, 16)
            self.device, self.dtype = torch.device("cpu"), torch.bfloat16

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.embedding

    module = Attention().bfloat16()
    one, other = torch.randn(2, 3, 16).bfloat16()
    names = ("q_proj", "k_proj", "v_proj")
    with torch.no_grad():
        wanted = [[getattr(module, name)(given) for name in names] for given in (one, other)]
        assert pack_in(module)
        found = [[getattr(module, name)(given) for name in names] for given in (one, other)]
        # Not all of them are asked each time, nor in this order.
        mixed = [module.q_proj(one), module.v_proj(other), module.k_proj(one)]
    assert all(isinstance(getattr(module, name), PackedLinear) for name in names)
    torch.testing.assert_close(found, wanted, atol=0.01, rtol=0.01)
    torch.testing.assert_close(mixed, [wanted[0][0], wanted[1][2], wanted[0][1]], atol=0.01, rtol=0.01)


def test_float32_is_left_alone(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not pack_in(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


async def test_an_engine_answers_a_full_batch_in_bfloat16(folder: Path) -> None:
    async with serving(folder, slots=4, dtype="bfloat16") as engine:
        asked = [ask("packed " * (i + 1), max_tokens=12, ignore_eos=True) for i in range(4)]
        answered = await asyncio.gather(*[deltas(engine, one) for one in asked])
    assert [one[-1].completion_tokens for one in answered] == [12] * 4
