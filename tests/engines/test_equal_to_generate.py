"""Issue 6: in float32, greedy answers are those of `model.generate`, token for token, on 50 prompts; alone
and in a batch of 16."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.engines.test_sampling import ids_of
from tests.engines.test_transformers_engine import GREEDY, Reference, folder, reference, serving, smollm2

__all__ = ["folder", "reference", "smollm2"]  # fixtures

THINGS = (
    *(
        "a train",
        "the moon",
        "bread 🍞",
        "an old clock",
        "Tokyo",
        "rust",
        "¿qué tal?",
        "snow",
        "鉄道",
        "a letter",
    ),
)
QUESTIONS = (
    "What is {}?",
    "Write one sentence about {}.",
    "{}",
    "List three words that go with {}: 1.",
    "In the year 1900 somebody asked me, at length and more than once, and not for the first time, of {}.",
)
PROMPTS = [question.format(thing) for question in QUESTIONS for thing in THINGS]


async def check(folder: Path, reference: Reference, tokens: int) -> None:
    wanted = [reference.ids(prompt, tokens) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in wanted}) > 40
    async with serving(folder, slots=16) as engine:
        alone = [await ids_of(engine, prompt, max_tokens=tokens, **GREEDY) for prompt in PROMPTS]
        together = await asyncio.gather(
            *[ids_of(engine, prompt, max_tokens=tokens, **GREEDY) for prompt in PROMPTS]
        )
    assert alone == wanted
    assert together == wanted


async def test_fifty_greedy_answers_equal_generate(folder: Path, reference: Reference) -> None:
    assert len(set(PROMPTS)) == 50
    await check(folder, reference, 16)


@pytest.mark.full
@pytest.mark.model
async def test_fifty_greedy_answers_of_a_real_model_equal_generate(smollm2: Path) -> None:
    await check(smollm2, Reference(smollm2), 12)
