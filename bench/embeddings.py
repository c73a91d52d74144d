"""Sixty-four clients that ask for the vector of one text each, against the library's own best batch.

The library gets all texts at once, in a process that does nothing else; ours come one by one through the
gateway. Both in turn, on the same texts.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.load import OK, Target
from bench.rows import Row
from bench.stage import Stage, stage

CLIENTS = 64
TEXTS = 512
WORDS = (5, 40)
ROUNDS = 3
WORDS_THERE_ARE = (
    *("the", "engine", "of", "a", "train", "runs", "on", "rails", "between", "two", "stations", "while"),
    *("people", "read", "their", "books", "and", "look", "at", "mountains", "rivers", "old", "bridges"),
)


def texts() -> list[str]:
    source = random.Random(3)
    return [" ".join(source.choices(WORDS_THERE_ARE, k=source.randint(*WORDS))) for _ in range(TEXTS)]


def rows() -> list[Row]:
    found: dict[str, list[float]] = {"through": [], "direct": [], "library": []}
    with stage(models=True) as bench, library(bench.model_folder(embedding_model(bench))) as library_pace:
        bench.scale(embedding_model(bench), 1)
        ways = {
            "through": lambda: asyncio.run(ours(bench, direct=False)),
            "direct": lambda: asyncio.run(ours(bench, direct=True)),
            "library": library_pace,
        }
        for way in ways.values():
            way()
        for _ in range(ROUNDS):
            for name, way in ways.items():
                found[name].append(way())
    through, direct, alone = (statistics.median(found[name]) for name in ways)
    return [
        Row("sentence-transformers' own batches, texts per second", alone),
        Row(f"{CLIENTS} single requests at a time, straight to the worker", direct),
        Row(f"{CLIENTS} single requests at a time, through the gateway", through),
        Row("straight ÷ own batches", direct / alone, bar=0.9, at_least=True),
        Row("through ÷ own batches", through / alone, bar=0.9, at_least=True),
    ]


def embedding_model(bench: Stage) -> str:
    return str(bench.roundhouse.credentials["embedding_model"])


async def ours(bench: Stage, *, direct: bool) -> float:
    """Texts per second of `CLIENTS` that ask for one at a time."""
    name = embedding_model(bench)
    url, key = bench.port_of(name) if direct else (bench.base_url, bench.key)

    def target(text: str) -> Target:
        question: dict[str, object] = {"model": name, "input": text, "encoding_format": "base64"}
        return Target(url, key, question, path="/embeddings")

    left = [target(text) for text in texts()]

    async def client() -> None:
        async with left[0].connected() as connection:
            while left:
                connection.target = left.pop()
                seen = await connection.ask()
                if seen.status != OK:
                    raise RuntimeError(seen.head.decode())

    began = time.monotonic()
    await asyncio.gather(*[client() for _ in range(CLIENTS)])
    return TEXTS / (time.monotonic() - began)


@contextmanager
def library(model: Path) -> Iterator[Callable[[], float]]:
    """sentence-transformers in a process of its own; yields what measures its texts per second."""
    with subprocess.Popen(
        [sys.executable, "-m", "bench.embeddings", str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def measured() -> float:
            print("go", file=process.stdin, flush=True)
            return float(process.stdout.readline())  # type: ignore[union-attr]

        try:
            yield measured
        finally:
            process.stdin.close()


def main() -> None:
    """For each line of stdin: encode all texts, with the batch that is fastest; print how many a second."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(sys.argv[1], device="cpu")
    given = texts()

    def pace(batch: int) -> float:
        began = time.monotonic()
        model.encode(given, batch_size=batch, show_progress_bar=False)
        return len(given) / (time.monotonic() - began)

    best = max((32, 64), key=pace)
    for _ in sys.stdin:
        print(pace(best), flush=True)


if __name__ == "__main__":
    main()
