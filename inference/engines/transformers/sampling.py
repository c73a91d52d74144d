"""How each request of a batch chooses its next token.

Continuous batching takes one list of logits processors for all requests and one answer to "sample
or not". We say "not": it then takes the largest score. A greedy request leaves its scores as they
are, so it gets exactly what `model.generate` gives; a sampled one gets its own noise added (the
Gumbel trick: the largest of `log p + noise` is a draw from `p`). Sorting, the dear part, is done
only for rows that asked for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

KEY = "choice"
"""Under this name a request carries its `Choice` to the batching thread."""

NUCLEUS = 1024
"""top_p looks at so many of the likeliest tokens first; only a flatter row is sorted whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Checked values only: one bad value here would end the batching thread for everybody."""

    temperature: float
    """0: greedy."""
    top_p: float
    """1: off."""
    top_k: int
    """0: off."""


GREEDY = Choice(temperature=0.0, top_p=1.0, top_k=0)


class Sampler:
    """Stands in for transformers' `ContinuousBatchingLogitsProcessorList` (same members)."""

    tensors_required = 0
    do_processing = True

    def __init__(self) -> None:
        self._choices: list[Choice] = []

    def fill_defaults(self, storage: torch.Tensor) -> None:
        """Nothing is stored on the device."""

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """`Choice` is checked before it is sent."""

    def prepare_tensor_args(
        self, requests_in_batch: Sequence[Any], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        """Called before each step: remember who the rows of the next `__call__` are."""
        self._choices = [
            request.state.logit_processor_kwargs.get(KEY, GREEDY)
            for request in requests_in_batch
            if request.has_new_token
        ]
        return arg_storage

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, args: torch.Tensor) -> torch.Tensor:
        return choose(scores, self._choices)


def choose(scores: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    """Scores whose largest value in row i is the token that `choices[i]` asked for.

    There may be more rows than choices: requests whose prompt is not read to its end yet.
    """
    rows = [i for i, choice in enumerate(choices) if choice.temperature > 0]
    if not rows:
        return scores
    picked = [choices[i] for i in rows]
    index = torch.tensor(rows, device=scores.device)
    some = scores[index] / _column([choice.temperature for choice in picked], scores)
    some = _keep_top_k(some, picked)
    some = _keep_top_p(some, picked)
    # Below 2^-25 the float32 source of the noise has no more detail; a zero would beat every score.
    noise = torch.empty_like(some).exponential_().clamp_min_(2.0**-25).log_()
    scores[index] = some - noise
    return scores


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)


def _keep_top_k(scores: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    size = scores.shape[-1]
    rows = [i for i, choice in enumerate(choices) if 0 < choice.top_k < size]
    if not rows:
        return scores
    ks = [choices[i].top_k for i in rows]
    index = torch.tensor(rows, device=scores.device)
    some = scores[index]
    best = torch.topk(some, max(ks), dim=-1).values
    least = best.gather(-1, torch.tensor(ks, device=scores.device).unsqueeze(-1) - 1)
    scores[index] = some.masked_fill(some < least, -torch.inf)
    return scores


def _keep_top_p(scores: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    rows = [i for i, choice in enumerate(choices) if choice.top_p < 1]
    if not rows:
        return scores
    index = torch.tensor(rows, device=scores.device)
    some = scores[index]
    total = some.logsumexp(dim=-1, keepdim=True)
    wanted = _column([choices[i].top_p for i in rows], scores)
    best = torch.topk(some, min(NUCLEUS, some.shape[-1]), dim=-1).values
    if bool(((best - total).exp().sum(-1, keepdim=True) < wanted).any()):
        best = some.sort(dim=-1, descending=True).values
    mass = (best - total).exp().cumsum(-1)
    # A token stays while those likelier than it have not reached the wanted mass: always the first.
    stays = (mass - (best - total).exp() < wanted).sum(-1, keepdim=True).clamp_min(1)
    least = best.gather(-1, stays - 1)
    scores[index] = some.masked_fill(some < least, -torch.inf)
    return scores
