"""The transformers engine with models that continuous batching cannot run: static batches, like answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from inference.engines.app import EngineApp
from inference.engines.base import Delta, EngineError, GenerationRequest, Sampling
from inference.engines.transformers.engine import TransformersEngine
from inference.engines.transformers.static import StaticBatcher
from tests.engines.test_endurance import resident, rows_alive
from tests.engines.test_transformers_engine import GREEDY, deltas, serving, until
from tests.engines.tiny_models import make_tiny_bloom, make_tiny_mamba, make_tiny_t5

MAKERS = {"t5": make_tiny_t5, "bloom": make_tiny_bloom, "mamba": make_tiny_mamba}
CONTEXT = {"t5": {}, "bloom": {"context_length": 256}, "mamba": {"context_length": 256}}
PROMPTS = ["one", "two three four " * 3, "x" * 40, "five", "y" * 100]
HOT = {"temperature": 5.0}


class Generating:
    """What `model.generate` gives, one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kind = AutoModelForSeq2SeqLM if folder.name == "t5" else AutoModelForCausalLM
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = kind.from_pretrained(folder, dtype=torch.float32)

    def ids(self, prompt: str, tokens: int, **options: Any) -> list[int]:
        given = torch.tensor([self.tokenizer(prompt).input_ids])
        out = self.model.generate(given, max_new_tokens=tokens, do_sample=False, **options)[0].tolist()
        return list(out[1 if self.folder.name == "t5" else given.shape[1] :])


@pytest.fixture(scope="module", params=sorted(MAKERS))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generating:
    return Generating(MAKERS[request.param](tmp_path_factory.mktemp("models") / request.param))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Generating:
    return Generating(make_tiny_t5(tmp_path_factory.mktemp("models") / "t5"))


@asynccontextmanager
async def static(folder: Path, *, slots: int = 4, **arguments: Any) -> AsyncIterator[TransformersEngine]:
    async with serving(folder, slots=slots, **{**CONTEXT[folder.name], **arguments}) as engine:
        assert isinstance(batcher_of(engine), StaticBatcher)
        yield engine


def batcher_of(engine: TransformersEngine) -> StaticBatcher:
    return engine._serving.batcher  # type: ignore[union-attr, return-value]


def ask(prompt: str, *, top: int | None = None, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id="r", prompt=prompt, token_ids=True, top_logprobs=top, sampling=Sampling(**sampling)
    )


def ids_of(answered: list[Delta]) -> list[int]:
    return [token.id for delta in answered if delta.detail for token in delta.detail.tokens]


async def answer(engine: TransformersEngine, prompt: str, **sampling: Any) -> list[int]:
    return ids_of(await deltas(engine, ask(prompt, **sampling)))


async def test_greedy_answers_equal_generate_alone_and_padded_in_a_batch(reference: Generating) -> None:
    wanted = [reference.ids(prompt, 16) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in wanted}) > len(PROMPTS) // 2
    async with static(reference.folder) as engine:
        alone = [await answer(engine, prompt, max_tokens=16, **GREEDY) for prompt in PROMPTS]
        steps = engine.load_report().steps
        together = await asyncio.gather(
            *[answer(engine, prompt, max_tokens=16, **GREEDY) for prompt in PROMPTS]
        )
        if reference.folder.name != "mamba":  # there only prompts of one length go together
            assert engine.load_report().steps - steps < sum(map(len, wanted))
    assert alone == wanted
    assert together == wanted


async def test_tokens_come_as_they_are_made_and_a_stop_string_ends_the_answer(t5: Generating) -> None:
    async with static(t5.folder) as engine:
        whole = await deltas(engine, ask("stop", max_tokens=40, ignore_eos=True, **GREEDY))
        counts = [delta.completion_tokens for delta in whole]
        assert counts == sorted(set(counts))
        assert counts[-1] == 40
        assert len(counts) > 10
        text = "".join(delta.text for delta in whole)
        stop = text[10:13]
        answered = await deltas(engine, ask("stop", max_tokens=40, ignore_eos=True, stop=(stop,), **GREEDY))
        assert "".join(delta.text for delta in answered) == text[: text.index(stop)]
        assert (answered[-1].finish_reason, answered[-1].stop) == ("stop", stop)
        await until(lambda: engine.load_report().running == 0, 1.0)


async def test_each_row_of_a_batch_is_chosen_as_its_request_asks(t5: Generating) -> None:
    plain = t5.ids("mixed", 20, eos_token_id=-1)
    async with static(t5.folder, slots=8) as engine:
        many = {"max_tokens": 20, "ignore_eos": True}
        banned = plain[0]
        got = await asyncio.gather(
            answer(engine, "mixed", **many, **GREEDY),
            answer(engine, "mixed", **many, **HOT, seed=7),
            answer(engine, "mixed", **many, **HOT, seed=7),
            answer(engine, "mixed", **many, **HOT, seed=8),
            answer(engine, "mixed", **many, **GREEDY, logit_bias={banned: -100.0}),
            answer(engine, "mixed", **many, **GREEDY, allowed_token_ids=(5, 6)),
            answer(engine, "mixed", max_tokens=3, **GREEDY, ignore_eos=True),
        )
        assert got[0] == plain
        assert got[1] == got[2] != got[3]
        assert banned not in got[4]
        assert set(got[5]) <= {5, 6}
        assert got[6] == plain[:3]
        told = await deltas(engine, ask("mixed", top=3, **many, **GREEDY))
        tokens = [token for delta in told if delta.detail for token in delta.detail.tokens]
        assert all(len(token.top) == 3 and token.top[0].id == token.id for token in tokens)


async def test_a_client_that_leaves_ends_its_batch_before_the_next_step(t5: Generating) -> None:
    async with static(t5.folder) as engine:
        async with aclosing(engine.generate(ask("leave", max_tokens=200, ignore_eos=True))) as stream:
            await anext(stream)
        await until(lambda: engine.load_report().running == 0, 1.0)
        await asyncio.sleep(0.1)
        steps = engine.load_report().steps
        assert steps < 60
        await asyncio.sleep(0.1)
        assert engine.load_report().steps == steps
        assert not batcher_of(engine)._requests


async def test_more_requests_than_slots_wait_and_one_cancelled_while_it_waits_is_never_begun(
    t5: Generating,
) -> None:
    async with static(t5.folder, slots=2) as engine:
        asked = [f"number {at}" for at in range(7)]
        tasks = [
            asyncio.create_task(answer(engine, prompt, max_tokens=30, ignore_eos=True, **GREEDY))
            for prompt in asked
        ]
        await until(lambda: engine.load_report().waiting >= 4)
        assert engine.load_report().running <= 2
        tasks[6].cancel()
        got = await asyncio.gather(*tasks[:6])
        assert got == [t5.ids(prompt, 30, eos_token_id=-1) for prompt in asked[:6]]
        await until(lambda: engine.load_report().running + engine.load_report().waiting == 0)
        assert not batcher_of(engine)._requests


async def test_a_batch_takes_no_more_than_memory_holds(t5: Generating) -> None:
    # 512 bytes per token: 64 tokens in all, so one request of more than half at a time.
    async with static(t5.folder, kv_cache_bytes=512 * 64) as engine:
        tasks = [
            asyncio.create_task(answer(engine, f"{at}", max_tokens=40, ignore_eos=True, **GREEDY))
            for at in range(2)
        ]
        await until(lambda: engine.load_report().running == 1)
        assert engine.load_report().waiting == 1
        got = await asyncio.gather(*tasks)
    assert got == [t5.ids(f"{at}", 40, eos_token_id=-1) for at in range(2)]


@pytest.mark.full
async def test_a_thousand_aborted_requests_leave_nothing_behind(t5: Generating) -> None:
    async def abort_many(engine: TransformersEngine, count: int) -> None:
        numbers = iter(range(count))

        async def client() -> None:
            for number in numbers:
                request = ask(f"{number} " * (number % 30 + 1), top=number % 3, ignore_eos=True)
                async with aclosing(engine.generate(request)) as stream:
                    for _ in range(number % 4):
                        await anext(stream)

        await asyncio.gather(*[client() for _ in range(16)])
        await until(lambda: engine.load_report().running + engine.load_report().waiting == 0)

    async with static(t5.folder, slots=8) as engine:
        await abort_many(engine, 300)  # what is allocated once is there
        before = resident()
        await abort_many(engine, 1000)
        assert rows_alive() <= 2 * 8
        assert resident() - before < 8 * 1024 * 1024
        assert not batcher_of(engine)._requests
        assert await answer(engine, "still well", max_tokens=9, **GREEDY) == t5.ids("still well", 9)


async def test_when_the_model_breaks_answers_fail_and_the_engine_is_not_healthy(t5: Generating) -> None:
    async with static(t5.folder) as engine:
        tasks = [asyncio.create_task(answer(engine, f"{at}", ignore_eos=True)) for at in range(6)]
        await until(lambda: engine.load_report().running > 0)

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("the device is gone")

        batcher_of(engine)._model.forward = broken
        for outcome in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5):
            assert isinstance(outcome, EngineError)
            assert "device" not in str(outcome)
        await until(lambda: not engine.healthy())


async def test_when_memory_runs_out_its_batch_fails_and_the_next_is_answered(t5: Generating) -> None:
    async with static(t5.folder) as engine:
        model = batcher_of(engine)._model
        whole = model.forward

        def full(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        model.forward = full
        with pytest.raises(EngineError):
            await answer(engine, "too much")
        model.forward = whole
        assert await answer(engine, "after", max_tokens=9, **GREEDY) == t5.ids("after", 9)


@asynccontextmanager
async def http(engine: TransformersEngine) -> AsyncIterator[httpx.AsyncClient]:
    app = EngineApp(engine, slots=4, served_name="m")
    app.ready = True
    transport = httpx.ASGITransport(app.asgi)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        yield client


async def test_a_t5_worker_answers_completions_and_refuses_by_name_what_it_cannot(t5: Generating) -> None:
    asked = {"prompt": "what is it", "max_tokens": 12, "temperature": 0}
    async with static(t5.folder) as engine, http(engine) as client:
        reply = await client.post("/v1/completions", json=asked)
        wanted = t5.tokenizer.decode(t5.ids("what is it", 12), skip_special_tokens=True)
        assert reply.json()["choices"][0]["text"] == wanted
        for field, value in (("echo", True), ("suffix", "x"), ("continue_token_ids", [5])):
            reply = await client.post("/v1/completions", json={**asked, field: value})
            assert reply.status_code == 400, (field, reply.text)
            assert reply.json()["error"]["param"] == field
        assert "endpoint:chat" not in engine.capabilities


async def test_a_t5_worker_with_a_template_chats_but_does_not_go_on_with_a_message(tmp_path: Path) -> None:
    async with static(make_tiny_t5(tmp_path / "t5", chat=True)) as engine, http(engine) as client:
        asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "ignore_eos": True}
        reply = await client.post("/v1/chat/completions", json=asked)
        assert reply.json()["usage"]["completion_tokens"] == 5
        asked["messages"] = [*asked["messages"], {"role": "assistant", "content": "y"}]  # type: ignore[misc]
        asked |= {"add_generation_prompt": False, "continue_final_message": True}
        reply = await client.post("/v1/chat/completions", json=asked)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "add_generation_prompt"
