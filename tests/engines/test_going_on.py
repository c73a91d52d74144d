"""An answer that another engine has begun goes on token for token, from the ids that were told with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inference.engines.base import BadRequest, Delta, EngineSpec, GenerationRequest, Sampling
from inference.engines.transformers.engine import TransformersEngine
from tests.engines.tiny_model import make_tiny_llama

TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
async def engine(folder: Path) -> AsyncIterator[TransformersEngine]:
    arguments = {"device": "cpu", "dtype": "float32"}
    engine = TransformersEngine(EngineSpec(model_path=folder, slots=4, arguments=arguments))
    await engine.load(lambda progress: None)
    try:
        yield engine
    finally:
        await engine.close()


async def answer(engine: TransformersEngine, asked: GenerationRequest) -> list[Delta]:
    return [delta async for delta in engine.generate(asked)]


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize(
    ("form", "sampling"),
    [
        ("chat", {"stop": "of its own text"}),
        pytest.param("prompt", {}, marks=pytest.mark.full),
        pytest.param("prompt", {"temperature": 1.0, "seed": 7}, marks=pytest.mark.full),
        pytest.param(
            "chat",
            {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
            marks=pytest.mark.full,
        ),
        pytest.param("prompt", {"min_tokens": 12, "bad_words": ("e",)}, marks=pytest.mark.full),
    ],
    ids=["stop string", "greedy", "seeded", "penalties", "least length"],
)
async def test_it_says_what_it_would_have_said(
    engine: TransformersEngine, form: str, sampling: dict[str, Any]
) -> None:
    """The tiny model writes bytes, mostly halves of characters, that no tokenizer would make of its text."""
    about: dict[str, Any] = {"prompt": "A tale"}
    if form == "chat":
        about = {"messages": [{"role": "user", "content": "Tell a tale."}]}
    asked = GenerationRequest(
        request_id="r", sampling=Sampling(max_tokens=TOKENS, ignore_eos=True, temperature=0.0), **about
    )
    if "stop" in sampling:
        said = text(await answer(engine, asked))
        sampling = {**sampling, "stop": (said[-8:-4],)}
    asked = replace(asked, sampling=replace(asked.sampling, **sampling))
    whole = await answer(engine, asked)
    assert len(whole) > 5
    for after in range(1, len(whole)):
        ids = tuple(id_ for delta in whole[:after] for id_ in delta.ids)
        assert len(ids) == whole[after - 1].completion_tokens
        rest = await answer(engine, replace(asked, begun=ids))
        assert text(whole[:after]) + text(rest) == text(whole), after
        assert rest[-1].finish_reason == whole[-1].finish_reason
        assert rest[-1].stop == whole[-1].stop
        assert rest[-1].completion_tokens + len(ids) == whole[-1].completion_tokens
        assert rest[-1].prompt_tokens == whole[-1].prompt_tokens


@pytest.mark.full
async def test_of_a_whole_answer_only_the_end_is_told(engine: TransformersEngine) -> None:
    asked = GenerationRequest(
        request_id="r", prompt="A tale", sampling=Sampling(max_tokens=8, ignore_eos=True, temperature=0.0)
    )
    whole = await answer(engine, asked)
    ids = tuple(id_ for delta in whole for id_ in delta.ids)
    [end] = await answer(engine, replace(asked, begun=ids))
    assert (end.text, end.completion_tokens, end.finish_reason) == ("", 0, "length")
    ended = replace(asked, begun=(5, ids[0]), sampling=Sampling(stop_token_ids=(ids[0],)))
    [end] = await answer(engine, ended)
    assert (end.text, end.finish_reason, end.stop) == ("", "stop", ids[0])


@pytest.mark.full
async def test_ids_that_the_model_does_not_have_are_refused(engine: TransformersEngine) -> None:
    asked = GenerationRequest(request_id="r", prompt="A tale", sampling=Sampling(), begun=(10**6,))
    with pytest.raises(BadRequest) as refused:
        await answer(engine, asked)
    assert refused.value.param == "continue_token_ids"
