"""Workers are killed under streams of a real model: each goes on elsewhere with what it would have said."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import time
from pathlib import Path

import openai
import psutil
import pytest

from tests.e2e.conftest import Roundhouse, Worker, eventually
from tests.engines.tiny_model import make_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.full, pytest.mark.timeout(900)]

SUBJECTS = "trains bees bridges tides comets bread clocks whales"
QUESTIONS = tuple(
    f"{ask} {subject}."
    for subject in SUBJECTS.split()
    for ask in ("Tell a story about", "Explain to a child all about", "Write a letter about", "Praise")
)


@dataclasses.dataclass(frozen=True)
class Plan:
    name: str
    streams: int
    """At once."""
    tokens: int
    """Of each answer."""
    hits: int
    """Streams that have begun and not ended when their worker dies."""
    within: float
    """Seconds from when all have begun until the kill, at most."""


RANDOM = Plan("random", streams=24, tokens=300, hits=160, within=0.4)
"""A tiny model that writes halves of characters, and what no tokenizer would make of its text."""
REAL = Plan("real", streams=8, tokens=48, hits=40, within=1.0)
"""The model of the first start. Its text is tokenized otherwise than it was generated at one place in 65."""


@dataclasses.dataclass
class Told:
    """What the client of one stream has had."""

    question: str
    request_id: str = ""
    text: str = ""
    finish_reason: str | None = None
    tokens: int | None = None

    @property
    def open(self) -> bool:
        return bool(self.text) and self.finish_reason is None


def ready(roundhouse: Roundhouse, name: str) -> list[Worker]:
    rows = roundhouse.rows(
        "SELECT w.id, w.epoch, w.state, w.pid, w.engine_pid, w.url FROM registry_worker w "
        "JOIN registry_deployment d ON d.id = w.deployment_id WHERE d.name = %s AND w.state = 'ready'",
        name,
    )
    return [worker for worker in (Worker(*row) for row in rows) if psutil.pid_exists(worker.engine_pid)]


async def ask(client: openai.AsyncOpenAI, plan: Plan, told: Told, seed: int) -> Told:
    """`seed` makes another request of the same question, which is no poison because workers died before; at
    temperature 0 it changes nothing."""
    async with client.chat.completions.with_streaming_response.create(
        model=plan.name,
        messages=[{"role": "user", "content": told.question}],
        max_tokens=plan.tokens,
        temperature=0,
        seed=seed,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    ) as raw:
        told.request_id = raw.headers["x-request-id"]
        async for chunk in await raw.parse():
            if chunk.usage:
                told.tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                told.text += choice.delta.content or ""
                told.finish_reason = choice.finish_reason or told.finish_reason
    return told


async def round_of(roundhouse: Roundhouse, plan: Plan, seed: int) -> tuple[list[Told], set[str]]:
    """Ask everything at once and kill a worker meanwhile. What was told, and the ids of the streams that were
    open then."""
    told = [Told(question) for question in QUESTIONS[: plan.streams]]
    async with roundhouse.async_client(max_retries=0, timeout=120) as client:
        asked = [asyncio.create_task(ask(client, plan, each, seed)) for each in told]
        victim = random.choice(ready(roundhouse, plan.name))
        while not all(each.text for each in told):
            await asyncio.sleep(0.005)
            assert not all(task.done() for task in asked), "they ended before all had begun"
        await asyncio.sleep(random.uniform(0, plan.within))
        open_ = {each.request_id for each in told if each.open}
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.engine_pid, signal.SIGKILL)
        await asyncio.gather(*asked)
    return told, open_


def again(roundhouse: Roundhouse, plan: Plan) -> None:
    """Wait until both workers serve; that one was killed is not held against them."""
    roundhouse.manage(
        *("shell", "-v0", "-c"),
        "from registry.actions.deployments import retry_deployment\n"
        "from registry.models import Deployment\n"
        f"retry_deployment(deployment=Deployment.objects.get(name={plan.name!r}), by='test')",
    )
    eventually(lambda: len(ready(roundhouse, plan.name)) == 2, seconds=90, what="both serve")


@pytest.mark.parametrize("plan", [RANDOM, REAL], ids=lambda plan: plan.name)
def test_streams_whose_workers_are_killed_say_what_they_would_have_said(
    roundhouse: Roundhouse, tmp_path: Path, plan: Plan
):
    model = roundhouse.credentials["chat_model"]
    if plan is RANDOM:
        model = "tiny"
        roundhouse.manage("model", "add", model, "--source", str(make_tiny_llama(tmp_path / "tiny")))
    roundhouse.manage(
        *("deploy", plan.name, "--model", model, "--engine", "transformers", "--policy", "round_robin"),
        *("--replicas", "2", "--slots", str(plan.streams), "--argument", "dtype=float32", "--wait"),
    )
    try:
        eventually(lambda: roundhouse.answers(plan.name), seconds=10, what="it answers")

        async def unbroken() -> dict[str, str]:
            async with roundhouse.async_client(timeout=120) as client:
                asked = [ask(client, plan, Told(question), 0) for question in QUESTIONS[: plan.streams]]
                return {told.question: told.text for told in await asyncio.gather(*asked)}

        expected = asyncio.run(unbroken())
        began, hits, kills, answered = time.monotonic(), 0, 0, 0
        while hits < plan.hits:
            again(roundhouse, plan)
            told, open_ = asyncio.run(round_of(roundhouse, plan, kills + 1))
            kills, answered = kills + 1, answered + len(told)
            for each in told:
                assert (each.finish_reason, each.tokens) == ("length", plan.tokens), each
                assert each.text == expected[each.question], each.question
            rows = eventually(
                lambda told=told: (
                    len(found := events(roundhouse, [each.request_id for each in told])) == len(told)
                    and found
                ),
                seconds=20,
                what="each is in the ledger once",
            )
            assert {outcome for _, _, outcome, _ in rows} == {"ok"}
            assert {tokens for _, _, _, tokens in rows} == {plan.tokens}
            # Those that a second worker was asked for; the others were on the one that lived.
            hits += sum(request_id in open_ and attempts > 1 for request_id, attempts, _, _ in rows)
        took = time.monotonic() - began
        print(f"{plan.name}: {kills} kills hit {hits} open streams of {answered} in {took:.0f} s")
    finally:
        roundhouse.manage("scale", plan.name, "0")


def events(roundhouse: Roundhouse, ids: list[str]) -> list[tuple[str, int, str, int]]:
    marks = ", ".join(["%s"] * len(ids))
    return roundhouse.rows(  # type: ignore[return-value]
        "SELECT request_id, attempts, outcome, completion_tokens FROM registry_usageevent "
        f"WHERE request_id IN ({marks})",
        *ids,
    )
