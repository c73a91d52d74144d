"""Workers are killed under streams of a real model: each goes on elsewhere with what it would have said."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal

import openai
import pytest

from tests.e2e.conftest import Roundhouse, Worker, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.full, pytest.mark.timeout(1800)]

HITS = 150
"""Streams that have begun and not ended when their worker dies."""
NAME = "continued"
TOKENS = 48
QUESTIONS = (
    "Tell a story about a train.",
    "Explain photosynthesis to a child.",
    "Describe the sea at night.",
    "Why is the sky blue?",
    "Write a letter to a friend.",
    "How do bees find flowers?",
    "What does a bridge builder do?",
    "Give advice to a young cook.",
)


def ready(roundhouse: Roundhouse) -> list[Worker]:
    rows = roundhouse.rows(
        "SELECT w.id, w.epoch, w.state, w.pid, w.engine_pid, w.url FROM registry_worker w "
        "JOIN registry_deployment d ON d.id = w.deployment_id WHERE d.name = %s AND w.state = 'ready'",
        NAME,
    )
    return [Worker(*row) for row in rows]


async def ask(client: openai.AsyncOpenAI, question: str, begun: set[str]) -> str:
    said = ""
    async for chunk in await client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": question}],
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
    ):
        said += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        if said:
            begun.add(question)
    begun.discard(question)
    return said


async def round_of(roundhouse: Roundhouse, expected: dict[str, str]) -> tuple[int, int, list[str]]:
    """Ask everything at once and kill a worker meanwhile: how many streams that hit, how many texts came
    whole, and those that differ."""
    begun: set[str] = set()
    async with roundhouse.async_client(max_retries=0, timeout=120) as client:
        asked = [asyncio.create_task(ask(client, question, begun)) for question in QUESTIONS]
        while len(begun) < len(QUESTIONS):
            await asyncio.sleep(0.01)
            assert not all(task.done() for task in asked)
        await asyncio.sleep(random.uniform(0, 2))
        victim = random.choice(await asyncio.to_thread(ready, roundhouse))
        hit = min(len(begun), await asyncio.to_thread(roundhouse.running, victim))
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.engine_pid, signal.SIGKILL)
        texts = await asyncio.gather(*asked)
    differing = [
        f"{text!r} instead of {expected[question]!r}"
        for question, text in zip(QUESTIONS, texts, strict=True)
        if text != expected[question]
    ]
    return hit, len(texts), differing


def test_streams_whose_workers_are_killed_say_what_they_would_have_said(roundhouse: Roundhouse):
    roundhouse.manage(
        *("deploy", NAME, "--model", roundhouse.credentials["chat_model"], "--engine", "transformers"),
        *("--replicas", "2", "--slots", "8", "--argument", "dtype=float32", "--wait"),
    )
    try:
        eventually(lambda: roundhouse.answers(NAME), seconds=10, what="it answers")

        async def unbroken() -> dict[str, str]:
            async with roundhouse.async_client(timeout=120) as client:
                return {question: await ask(client, question, set()) for question in QUESTIONS}

        expected = asyncio.run(unbroken())
        hits = answered = 0
        differing: list[str] = []
        while hits < HITS:
            roundhouse.manage(
                *("shell", "-v0", "-c"),
                "from registry.actions.deployments import retry_deployment\n"
                "from registry.models import Deployment\n"
                f"retry_deployment(deployment=Deployment.objects.get(name={NAME!r}), by='test')",
            )
            eventually(lambda: len(ready(roundhouse)) == 2, seconds=60, what="both serve")
            hit, whole, different = asyncio.run(round_of(roundhouse, expected))
            hits, answered, differing = hits + hit, answered + whole, differing + different
        print(f"{hits} streams hit, {answered} answered, {len(differing)} differ")
        assert differing == []
    finally:
        roundhouse.manage("scale", NAME, "0")
