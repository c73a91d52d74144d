"""How likely a prompt's own tokens are. Continuous batching computes of a prompt no more than the scores
after its last token, so this is a pass of its own: piece by piece, each between two steps of the batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from inference.engines.base import EngineError
from inference.engines.transformers.likely import Likely, likeliest

PIECE = 128
"""Tokens of one pass: other streams wait for it, and each has scores for the whole vocabulary."""


class Scoring:
    """`pause` holds the batching thread up: the model is one thread's at a time."""

    def __init__(self, model: Any, pause: Callable[[], AbstractContextManager[None]]) -> None:
        self._model = model
        self._pause = pause
        self._one = asyncio.Lock()
        """Each prompt has its keys and values in memory that nobody planned: one prompt at a time."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")

    async def likely(self, prompt: list[int], top: int) -> list[Likely | None]:
        """What is said of each token, `top` alternatives with it; nothing of the first one. Raises
        EngineError when the model cannot."""
        found: list[Likely | None] = [None]
        loop = asyncio.get_running_loop()
        async with self._one:
            cache = DynamicCache(config=self._model.config)
            for start in range(0, len(prompt) - 1, PIECE):
                piece, following = prompt[start : start + PIECE], prompt[start + 1 : start + 1 + PIECE]
                try:
                    found += await loop.run_in_executor(
                        self._thread, self._score, cache, piece[: len(following)], following, top
                    )
                except RuntimeError as error:  # memory ran out, or the batching thread has ended
                    raise EngineError("The engine failed to read the prompt.") from error
        return found

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _score(self, cache: DynamicCache, piece: list[int], following: list[int], top: int) -> list[Likely]:
        with self._pause(), torch.no_grad():
            device = self._model.device
            out = self._model(
                input_ids=torch.tensor([piece], device=device), past_key_values=cache, use_cache=True
            )
            logprobs = out.logits[0].float().log_softmax(-1)
            chosen = torch.tensor(following, device=device)
            ranks = (logprobs >= logprobs.gather(-1, chosen.unsqueeze(-1))).sum(-1).tolist()
            likely = likeliest(logprobs, chosen, [top] * len(following))
            return [replace(one, rank=rank) for one, rank in zip(likely, ranks, strict=True)]
