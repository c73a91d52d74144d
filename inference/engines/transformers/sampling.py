"""How each request of a batch chooses its next token.

Continuous batching takes one list of logits processors for all requests and one answer to "sample
or not". We say "not": it then takes the largest score. A greedy request leaves its scores as they
are, so it gets exactly what `model.generate` gives; for a sampled one we draw ourselves (by the
Gumbel trick: the largest of `log p + noise` is a draw from `p`) and mark what was drawn. Sorting,
the dear part, is done only for rows that asked for it, and mostly of their likeliest tokens only.
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
    size = scores.shape[-1]
    free: list[int] = []
    limited: list[int] = []
    for row, choice in enumerate(choices):
        if choice.temperature > 0:
            (limited if choice.top_p < 1 or 0 < choice.top_k < size else free).append(row)
    for rows, draw in ((free, _draw), (limited, _draw_limited)):
        if rows:
            picked = [choices[row] for row in rows]
            index = torch.tensor(rows, device=scores.device)
            heated = scores[index] / _column([choice.temperature for choice in picked], scores)
            scores[index, draw(heated, picked)] = torch.inf
    return scores


def _draw(scores: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    """One column per row, with the probabilities that the scores mean."""
    # Below 2^-25 the float32 source of the noise has no more detail; a zero would beat every score.
    noise = torch.empty_like(scores).exponential_().clamp_min_(2.0**-25).log_()
    return (scores - noise).argmax(-1)


def _draw_limited(scores: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    """The same among the top_k likeliest, and of these the likeliest that together weigh top_p."""
    size = scores.shape[-1]
    has_k = _column([0 < choice.top_k < size for choice in choices], scores) > 0
    top_k = _column([choice.top_k if 0 < choice.top_k < size else size for choice in choices], scores)
    top_p = _column([choice.top_p if choice.top_p < 1 else 2.0 for choice in choices], scores)
    width = max(choice.top_k if 0 < choice.top_k < size else NUCLEUS for choice in choices)

    whole = scores.logsumexp(-1, keepdim=True)
    best, tokens = torch.topk(scores, min(width, size), dim=-1)
    short = (best - whole).exp().sum(-1, keepdim=True) < top_p
    if width < size and bool((short & ~has_k).any()):
        best, tokens = scores.sort(dim=-1, descending=True)
    place = torch.arange(best.shape[-1], device=scores.device)
    best = best.masked_fill(place >= top_k, -torch.inf)
    mass = (best - torch.where(has_k, best.logsumexp(-1, keepdim=True), whole)).exp()
    # A token stays while those likelier than it do not weigh top_p yet; the first one always.
    likelier = mass.cumsum(-1) - mass
    best = best.masked_fill((likelier >= top_p) & (place > 0), -torch.inf)
    return tokens.gather(-1, _draw(best, choices).unsqueeze(-1)).squeeze(-1)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)
