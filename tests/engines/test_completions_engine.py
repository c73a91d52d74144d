"""Completions by the transformers engine: on a tiny random model; with `-m model`, on a real one."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from inference.engines.base import BadRequest, Delta, GenerationRequest, Sampling, Template
from inference.engines.tokenize import tokenize
from tests.engines.test_transformers_engine import deltas, folder, serving, smollm2
from tests.engines.tiny_model import CHAT_TEMPLATE, START

__all__ = ["folder", "smollm2"]  # fixtures

PROMPTS = ["The capital of France is", "Once upon a time", "1, 2, 3,"]


def ask(prompt: str | list[int], *, echo: bool = False, max_tokens: int = 12) -> GenerationRequest:
    return GenerationRequest(
        request_id="r",
        prompt=prompt,
        echo=echo,
        sampling=Sampling(max_tokens=max_tokens, temperature=0.0),
    )


def text_of(got: list[Delta]) -> str:
    return "".join(delta.text for delta in got)


def continuation(folder: Path, prompt: str, tokens: int) -> str:
    """What transformers itself writes on."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0][ids["input_ids"].shape[1] :], skip_special_tokens=True))


async def test_greedy_continuations_equal_generate(folder: Path) -> None:
    async with serving(folder) as engine:
        got = await asyncio.gather(*[deltas(engine, ask(prompt)) for prompt in PROMPTS])
    assert [text_of(one) for one in got] == [continuation(folder, prompt, 12) for prompt in PROMPTS]


async def test_token_ids_give_what_their_text_gives(folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = tokenizer(PROMPTS[0])["input_ids"]
    async with serving(folder) as engine:
        by_text = await deltas(engine, ask(PROMPTS[0]))
        by_ids = await deltas(engine, ask(ids))
    assert text_of(by_ids) == text_of(by_text)
    assert by_ids[-1].prompt_tokens == len(ids) == by_text[-1].prompt_tokens


async def test_echo_gives_the_prompt_first_and_no_tokens_gives_it_alone(folder: Path) -> None:
    async with serving(folder) as engine:
        plain = await deltas(engine, ask(PROMPTS[0]))
        echoed = await deltas(engine, ask(PROMPTS[0], echo=True))
        alone = await deltas(engine, ask(PROMPTS[0], echo=True, max_tokens=0))
    assert text_of(echoed) == PROMPTS[0] + text_of(plain)
    assert echoed[-1].completion_tokens == plain[-1].completion_tokens
    assert [(one.text, one.completion_tokens, one.finish_reason) for one in alone] == [
        (PROMPTS[0], 0, "length")
    ]


@pytest.mark.parametrize("prompt", [[], [10**6], [-1], [0] * 100_000])
async def test_a_prompt_that_cannot_be_read_is_refused_and_the_engine_lives_on(
    folder: Path, prompt: str | list[int]
) -> None:
    async with serving(folder) as engine:
        with pytest.raises(BadRequest) as refused:
            await deltas(engine, ask(prompt))
        assert refused.value.param == "prompt"
        assert text_of(await deltas(engine, ask(PROMPTS[0]))) is not None
        assert engine.healthy()


async def test_a_long_prompt_is_read_beside_other_streams(folder: Path) -> None:
    async with serving(folder) as engine:
        with pytest.raises(BadRequest, match="reduce the length of the prompt"):
            await deltas(engine, ask("word " * 20_000))


@pytest.fixture
def bare(folder: Path, tmp_path: Path) -> Path:
    """The same model without a chat template."""
    copy = Path(shutil.copytree(folder, tmp_path / "bare"))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(copy)
    return copy


async def test_only_a_model_with_a_chat_template_announces_chat(folder: Path, bare: Path) -> None:
    async with serving(folder) as engine:
        assert {"endpoint:chat", "endpoint:completions"} <= engine.capabilities
    async with serving(bare) as engine:
        assert "endpoint:chat" not in engine.capabilities
        assert "endpoint:completions" in engine.capabilities
        assert await deltas(engine, ask(PROMPTS[0]))


@pytest.mark.model
async def test_a_real_model_goes_on_to_paris_as_generate_does(smollm2: Path) -> None:
    async with serving(smollm2) as engine:
        got = text_of(await deltas(engine, ask(PROMPTS[0])))
    assert got == continuation(smollm2, PROMPTS[0], 12)
    assert "Paris" in got


async def test_tokens_are_the_tokenizers_and_give_the_text_back(folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hello"}]
    async with serving(folder) as engine:
        text = await engine.tokenize(PROMPTS[0], special_tokens=False)
        chat = await engine.tokenize(messages, special_tokens=False)
        closed = await engine.tokenize(
            messages, special_tokens=False, template=Template(generation_prompt=False)
        )
        assert await engine.detokenize([token for token, _ in text]) == PROMPTS[0]
        with pytest.raises(BadRequest) as refused:
            await engine.detokenize([10**6])
    ids = tokenizer(PROMPTS[0], add_special_tokens=False)["input_ids"]
    assert text == list(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert [token for token, _ in chat] == rendered
    assert chat[: len(closed)] == closed
    assert len(closed) < len(chat)
    assert refused.value.param == "tokens"


async def test_a_template_is_told_what_the_request_says_of_it(folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    begun = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The answer is"}]
    mood = "{% if mood %}{{ mood + '\n' }}{% endif %}" + CHAT_TEMPLATE
    async with serving(folder, template=mood) as engine:

        async def tokens(**fields: Any) -> list[int]:
            asked = {"messages": begun, **fields}
            answer: dict[str, Any] = msgspec.json.decode(await tokenize(engine, msgspec.json.encode(asked)))
            return answer["tokens"]  # type: ignore[no-any-return]

        assert {"continue_final_message", "chat_template_kwargs"} <= engine.capabilities
        plain = await tokens()
        open_ = await tokens(continue_final_message=True)
        told = await tokens(chat_template_kwargs={"mood": "glad", "unknown": 1})
        hostile = await tokens(chat_template_kwargs={"mood": START})
        for fields, param in (
            ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
            ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
            ({"chat_template_kwargs": {"sanitize_control_tokens": False}}, "chat_template_kwargs"),
        ):
            with pytest.raises(BadRequest) as refused:
                await tokens(**fields)
            assert refused.value.param == param
        asked = GenerationRequest(
            request_id="r",
            messages=begun,
            template=Template(continued=True, generation_prompt=False),
            sampling=Sampling(max_tokens=3, temperature=0.0),
        )
        counted = {delta.prompt_tokens for delta in await deltas(engine, asked)}
    assert tokenizer.decode(open_).endswith("assistant\nThe answer is")
    assert plain[: len(open_)] == open_
    assert counted == {len(open_)}
    assert tokenizer.decode(told) == "glad\n" + tokenizer.decode(plain)
    # Spelled out in a value, a control token is text.
    start = tokenizer.convert_tokens_to_ids(START)
    assert hostile.count(start) == plain.count(start)
