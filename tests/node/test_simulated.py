"""The simulated engine, asked directly."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from inference.engines import ENGINES, create_engine
from inference.engines.base import (
    BadRequest,
    Delta,
    Engine,
    EngineError,
    EngineSpec,
    GenerationRequest,
    LoadError,
    Sampling,
)
from inference.engines.stops import StopStrings
from inference.protocol import Cause, Progress
from tests.node.engine_tools import until


def make_engine(**arguments: Any) -> Engine:
    return create_engine("simulated", EngineSpec(model_path=None, slots=4, arguments=arguments))


def ask(engine: Engine, content: str, **sampling: Any) -> AsyncGenerator[Delta, None]:
    request = GenerationRequest(
        request_id="r", messages=[{"role": "user", "content": content}], sampling=Sampling(**sampling)
    )
    return cast(AsyncGenerator[Delta, None], engine.generate(request))


async def answer(engine: Engine, content: str, **sampling: Any) -> list[Delta]:
    return [delta async for delta in ask(engine, content, **sampling)]


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def test_the_same_question_gets_the_same_answer_from_every_replica() -> None:
    first, second = await answer(make_engine(), "Hello there"), await answer(make_engine(), "Hello there")
    other = await answer(make_engine(), "Hello then")
    assert text(first) == text(second) != text(other)
    assert len(first) == 16
    assert [delta.finish_reason for delta in first] == [None] * 15 + ["stop"]
    assert [delta.completion_tokens for delta in first] == list(range(1, 17))
    assert {delta.prompt_tokens for delta in first} == {2}


async def test_max_tokens_ends_an_answer_for_its_length() -> None:
    deltas = await answer(make_engine(), "hi", max_tokens=5)
    assert len(deltas) == 5
    assert deltas[-1].finish_reason == "length"
    assert text(await answer(make_engine(), "hi")).startswith(text(deltas))


async def test_ignore_eos_goes_on_to_max_tokens() -> None:
    deltas = await answer(make_engine(), "hi", max_tokens=40, ignore_eos=True)
    assert len(deltas) == 40
    assert deltas[-1].finish_reason == "length"


async def test_a_stop_string_across_tokens_ends_the_answer_before_it() -> None:
    engine = make_engine(text="one two three four")
    deltas = await answer(engine, "hi", stop=("o thr",))
    assert text(deltas) == "one tw"
    assert [delta.stop for delta in deltas] == [None] * (len(deltas) - 1) + ["o thr"]
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].completion_tokens == 3
    assert engine.load_report().tokens == 3


def test_text_held_for_a_stop_string_is_given_back() -> None:
    stops = StopStrings(("END", "\n\n"))
    assert [stops.feed(piece) for piece in ("a EN", "T", "\n", "x\n")] == ["a ", "ENT", "", "\nx"]
    assert stops.flush() == "\n"
    assert stops.met is None


def test_the_stop_string_that_ended_a_text_is_told() -> None:
    for given, text, met in (
        (("b", "a"), "xab", "a"),
        (("abc", "ab"), "xabc", "abc"),
        (("ab", "abc"), "xabc", "ab"),
    ):
        stops = StopStrings(given)
        assert (stops.feed(text), stops.met) == ("x", met)
        assert (stops.feed("more"), stops.flush()) == ("", "")


async def test_the_pace_is_kept_without_drift() -> None:
    # The machine may pause in one of them; drift would be in all.
    for _ in range(3):
        started = time.monotonic()
        deltas = await answer(make_engine(tokens_per_second=50), "!tokens 10")
        took = time.monotonic() - started
        assert len(deltas) == 10
        assert took >= 0.2
        if took < 0.4:
            break
    assert took < 0.4


async def test_a_given_text_is_the_answer() -> None:
    assert text(await answer(make_engine(text=" a  b\nc "), "hi")) == " a  b\nc"


async def test_a_word_is_said_as_often_as_there_are_tokens() -> None:
    assert text(await answer(make_engine(), "!say nonce-1 !tokens 3")) == "nonce-1 nonce-1 nonce-1"


async def test_a_prompt_longer_than_the_context_is_refused() -> None:
    engine = make_engine(context_length=4)
    with pytest.raises(BadRequest) as refused:
        await answer(engine, "one two three four")
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "messages"
    assert [delta.finish_reason for delta in await answer(engine, "one two")] == [None, "length"]
    assert engine.load_report().running == 0


async def test_closing_an_answer_frees_it_at_once() -> None:
    engine = make_engine(token_seconds=0.01)
    deltas = ask(engine, "!tokens 1000")
    await anext(deltas)
    assert engine.load_report().running == 1
    await deltas.aclose()
    assert engine.load_report().running == 0
    assert engine.load_report().tokens == 1


async def test_a_hang_stops_every_request_while_it_lasts() -> None:
    engine = make_engine(token_seconds=0.001)
    steady = ask(engine, "!tokens 10000")
    hanging = asyncio.ensure_future(answer(engine, "!hang 1"))
    await until(lambda: engine.load_report().running == 1, "the request runs")

    async def still() -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(moving), 0.05)
        return not moving.done()

    moving = asyncio.ensure_future(anext(steady))
    for _ in range(100):
        if await still():
            break
        moving = asyncio.ensure_future(anext(steady))
    steps = engine.load_report().steps
    assert await still()
    assert engine.load_report().steps == steps
    assert engine.load_report().running == 2
    hanging.cancel()
    await asyncio.wait_for(moving, 2)
    await steady.aclose()
    assert engine.load_report().steps > steps


async def test_faults_come_after_the_tokens_asked_for() -> None:
    engine = make_engine()
    cut = await answer(engine, "!cut 3")
    assert [delta.finish_reason for delta in cut] == [None] * 3
    failing = ask(engine, "!error 2")
    assert [(await anext(failing)).completion_tokens for _ in range(2)] == [1, 2]
    with pytest.raises(EngineError):
        await anext(failing)
    assert engine.healthy()
    with pytest.raises(EngineError):
        await answer(engine, "!sick")
    assert not engine.healthy()


async def test_commands_are_only_read_at_the_start_of_a_message() -> None:
    assert len(await answer(make_engine(), "please do not !crash or !cut")) == 16


async def test_loading_takes_its_time_and_reports_progress() -> None:
    engine, seen = make_engine(load_seconds=0.1), list[Progress]()
    started = time.monotonic()
    await engine.load(seen.append)
    assert time.monotonic() - started >= 0.09
    assert seen[-1].done == seen[-1].total > 0


async def test_loading_fails_with_the_cause_asked_for() -> None:
    with pytest.raises(LoadError) as failed:
        await make_engine(fail_load="missing_file").load(lambda progress: None)
    assert failed.value.cause is Cause.MISSING_FILE


@pytest.mark.parametrize(
    "arguments",
    [{"pace": 1}, {"tokens": 0}, {"token_seconds": "x"}, {"token_seconds": 1, "tokens_per_second": 1}],
)
def test_a_wrong_argument_is_refused_by_name(arguments: dict[str, Any]) -> None:
    with pytest.raises(LoadError) as failed:
        make_engine(**arguments)
    assert failed.value.cause is Cause.BAD_ARGUMENT
    assert next(iter(arguments)) in failed.value.detail


def test_an_unknown_engine_is_refused_and_the_known_ones_named() -> None:
    with pytest.raises(LoadError) as failed:
        create_engine("vroom", EngineSpec(model_path=None, slots=1))
    assert failed.value.cause is Cause.BAD_ARGUMENT
    assert all(name in failed.value.detail for name in ENGINES)
