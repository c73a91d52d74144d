"""How likely tokens were, by the model's own distribution: before temperature, penalties, bias and form,
as vLLM tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

LEAST = -9999.0
"""Told of what is impossible: JSON has no infinity."""


@dataclass(frozen=True, slots=True)
class Likely:
    """What is said of one chosen token."""

    logprob: float
    top: list[tuple[int, float]]
    """Ids of the likeliest tokens in its place and their logarithmic probabilities, likeliest first."""
    rank: int = 0
    """How many tokens were as likely or more, itself included; 0 where nobody counted."""


def likeliest(logprobs: torch.Tensor, chosen: torch.Tensor, counts: Sequence[int]) -> list[Likely]:
    """What is said of `chosen[i]`, beside `counts[i]` alternatives, by row i."""
    most = min(max(counts), logprobs.shape[-1])
    values, ids = logprobs.topk(most, dim=-1)
    of_chosen = logprobs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    told = zip(
        of_chosen.clamp_min(LEAST).tolist(), ids.tolist(), values.clamp_min(LEAST).tolist(), strict=True
    )
    return [
        Likely(logprob, list(zip(tokens[:count], likely[:count], strict=True)))
        for count, (logprob, tokens, likely) in zip(counts, told, strict=True)
    ]
