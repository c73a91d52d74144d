"""Issue 6: whatever requests ask, and however they end, the `transformers` engine goes on as before."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import random
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from inference.engines.base import BadRequest, GenerationRequest, Sampling
from inference.engines.transformers.engine import TransformersEngine
from inference.engines.transformers.sampling import Row
from tests.engines.test_sampling import ids_of
from tests.engines.test_transformers_engine import GREEDY, Reference, folder, reference, serving, until

__all__ = ["folder", "reference"]  # fixtures

VOCABULARY = 258
ODD: list[Any] = [
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    -1e308,
    1e-320,
    -0.0,
    2**70,
    -(2**70),
    True,
    "7",
    None,
    (),
]


def some(rng: random.Random) -> Sampling:
    """Values of all kinds: most of them within bounds, some at the edge, some that nobody should send."""

    def one(*usual: Any) -> Any:
        return rng.choice(ODD) if rng.random() < 0.03 else rng.choice(usual)

    def token() -> Any:
        return one(rng.randrange(VOCABULARY), rng.randrange(VOCABULARY), 0, VOCABULARY - 1)

    fields: dict[str, Any] = {
        "temperature": one(0, 0.0, 0.3, 1.0, 2.0, 100.0),
        "top_p": one(0.0, 1e-9, 0.5, 0.999, 1.0),
        "top_k": one(0, 1, 2, 50, VOCABULARY, 2**31 - 1),
        "min_p": one(0.0, 1e-9, 0.1, 1.0),
        "presence_penalty": one(-2.0, 0.0, 0.5, 2.0),
        "frequency_penalty": one(-2.0, 0.0, 0.5, 2.0),
        "repetition_penalty": one(1e-9, 0.5, 1.0, 1.3, 10.0),
        "logit_bias": one({}, {token(): one(-100.0, 100.0) for _ in range(rng.randrange(20))}),
        "seed": one(None, 0, -1, 2**63 - 1, rng.getrandbits(63)),
        "stop": one((), ("a",), ("\N{REPLACEMENT CHARACTER}", "xyz")),
        "include_stop": rng.random() < 0.3,
        "stop_token_ids": one((), tuple(token() for _ in range(rng.randrange(10)))),
        "ignore_eos": rng.random() < 0.5,
        "min_tokens": one(0, 1, 3, 100),
        "bad_words": one((), ("a", " b", "cd", "<|im_end|>"), tuple("abcdefgh")),
        "allowed_token_ids": one(None, None, tuple(token() for _ in range(rng.randrange(1, 9)))),
    }
    asked = rng.sample(sorted(fields), rng.randrange(len(fields) + 1))
    return Sampling(max_tokens=one(1, 2, 4), **{name: fields[name] for name in asked})


@pytest.mark.full
async def test_a_thousand_random_sets_of_parameters_leave_the_engine_alive(
    folder: Path, reference: Reference
) -> None:
    rng = random.Random(6)
    outcomes: Counter[str] = Counter()
    waiting = iter(range(1000))

    async def client(engine: TransformersEngine) -> None:
        for number in waiting:
            prompt: Any = rng.choice(["one", "two " * 9, [5, 6, 7], [rng.randrange(VOCABULARY)] * 30])
            request = GenerationRequest(
                request_id=str(number),
                prompt=prompt,
                echo=rng.random() < 0.1,
                top_logprobs=rng.choice([None, None, 0, 1, 20, 10**6]),
                token_ids=rng.random() < 0.3,
                sample=rng.randrange(3),
                sampling=some(rng),
            )
            try:
                got = [delta async for delta in engine.generate(request)]
            except BadRequest:
                outcomes["refused"] += 1
            else:
                assert got[-1].finish_reason in ("stop", "length")
                outcomes["answered"] += 1

    async with serving(folder, slots=16) as engine:
        await asyncio.gather(*[client(engine) for _ in range(24)])
        assert engine.healthy()
        assert outcomes.total() == 1000
        assert outcomes["answered"] > 400
        assert outcomes["refused"] > 100
        assert await ids_of(engine, "still well", max_tokens=20, **GREEDY) == reference.ids("still well", 20)
        await until(lambda: engine.load_report().running == 0)
        assert engine.load_report().kv_use == 0


def resident() -> int:
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def rows_alive() -> int:
    gc.collect()
    return sum(type(one) is Row for one in gc.get_objects())


@pytest.mark.full
async def test_a_thousand_aborted_requests_leave_nothing_behind(folder: Path, reference: Reference) -> None:
    rng = random.Random(7)
    extras: list[dict[str, Any]] = [
        {},
        {"seed": 1, "top_p": 0.9},
        {"presence_penalty": 1.0, "repetition_penalty": 1.1},
        {"logit_bias": {5: 1.0}, "min_tokens": 400, "bad_words": ("a",)},
    ]

    async def abort(engine: TransformersEngine, number: int) -> None:
        request = GenerationRequest(
            request_id=str(number),
            prompt=[rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 300))],
            top_logprobs=rng.choice([None, 3]),
            sampling=Sampling(ignore_eos=True, **rng.choice(extras)),
        )
        after = rng.randrange(-1, 4)
        if after < 0:  # at once, or somewhere on its way
            task = asyncio.create_task(_drain(engine, request))
            await asyncio.sleep(rng.random() / 50)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return
        async with aclosing(engine.generate(request)) as stream:
            for _ in range(after):
                await anext(stream)

    async def abort_many(engine: TransformersEngine, count: int) -> None:
        numbers = iter(range(count))

        async def client() -> None:
            for number in numbers:
                await abort(engine, number)

        await asyncio.gather(*[client() for _ in range(24)])
        await until(lambda: engine.load_report().running == 0)

    async with serving(folder, slots=16) as engine:
        await abort_many(engine, 300)  # what is allocated once is there
        gc.collect()
        before = resident()
        await abort_many(engine, 1000)
        assert rows_alive() <= 2 * 16
        assert resident() - before < 8 * 1024 * 1024
        report = engine.load_report()
        assert (report.running, report.waiting, report.kv_use) == (0, 0, 0.0)
        batcher = engine._serving.batcher  # type: ignore[union-attr]
        assert not batcher._tickets
        cache = batcher._manager.batch_processor.cache
        assert all(not allocator.block_table for allocator in cache.cache_allocators.values())
        assert await ids_of(engine, "still well", max_tokens=20, **GREEDY) == reference.ids("still well", 20)


async def _drain(engine: TransformersEngine, request: GenerationRequest) -> None:
    async for _ in engine.generate(request):
        pass
