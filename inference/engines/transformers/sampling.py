"""How each request of a batch chooses its next token.

Continuous batching takes one list of logits processors for all requests and one answer to "sample
or not". We say "not": it then takes the largest score. A greedy request leaves its scores as they
are, so it gets exactly what `model.generate` gives; for a sampled one we draw ourselves, one number
a row, and mark what was drawn. Sorting, the dear part, is done only for rows that asked for it, and
mostly of their likeliest tokens only.

The order is vLLM's: what the request forbids and adds (`adjusting`), temperature, min_p, top_k, top_p.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from inference.engines.base import EngineError
from inference.engines.transformers.adjusting import Adjusting
from inference.engines.transformers.chance import fresh, seeded
from inference.engines.transformers.likely import Likely, likeliest

logger = logging.getLogger("roundhouse.engine")

KEY = "row"
"""Under this name a request carries its `Row` to the batching thread."""

NUCLEUS = 1024
"""top_p looks at so many of the likeliest tokens first; only a flatter row is sorted whole."""


class Grammar(Protocol):
    """What form one request's text must have, followed token by token. Made for that request alone and
    called in the batching thread; what it raises fails that request only."""

    def fill_mask(self, logits_row: torch.Tensor) -> None:
        """Set the scores of tokens that may not come next to -inf, in place."""

    def accept(self, token: int) -> None:
        """Called once for each token of the answer, in order, before the mask of the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Checked values only: one bad value here would end the batching thread for everybody."""

    temperature: float
    """0: greedy."""
    top_p: float
    """1: off."""
    top_k: int
    """0: off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] | None = None
    """The only tokens that may come; None: all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """The last token of each may not come where the others just did."""
    min_tokens: int = 0
    """Before so many, none of `ends` comes."""
    ends: tuple[int, ...] = ()
    seed: int | None = None
    """None: every answer is drawn anew."""
    top_logprobs: int | None = None
    """Tell each token's logarithmic probability and those of so many likeliest ones; None: neither."""
    grammar: Grammar | None = None
    begun: int = 0
    """So many of the prompt's last tokens are the answer's first ones."""

    @property
    def adjusts(self) -> bool:
        """Whether scores are changed before one is drawn."""
        return (
            self.grammar is not None
            or self.allowed is not None
            or bool(self.logit_bias or self.bad_words or self.min_tokens)
            or (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)
        )


GREEDY = Choice(temperature=0.0, top_p=1.0, top_k=0)


class Row:
    """A request in the batching thread: its choice, and what goes with the tokens it has so far."""

    __slots__ = ("adjusting", "choice", "failed", "plain", "told")

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.adjusting = Adjusting(choice) if choice.adjusts else None
        drawn_by_seed = choice.seed is not None and choice.temperature > 0
        self.plain = self.adjusting is None and choice.top_logprobs is None and not drawn_by_seed
        self.failed = False
        self.told: list[Likely] = []
        """What was said of each token, when `top_logprobs` asks for it: written by the thread before it
        hands the token over."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Row:
        """The manager copies a request that has to make room and begins again with its tokens as a prompt.
        It is still this one."""
        return self


_GREEDY_ROW = Row(GREEDY)


@dataclass(slots=True)
class _Special:
    """A row of this step that needs more than `choose`."""

    at: int
    row: Row
    request_id: str
    prompt: list[int]
    generated: list[int]


class Sampler:
    """Stands in for transformers' `ContinuousBatchingLogitsProcessorList` (same members).

    `fail` is called, in the batching thread, with the id of a request that cannot go on, and why. The
    thread goes on with the others.
    """

    tensors_required = 0
    do_processing = True

    def __init__(self, fail: Callable[[str, EngineError], None]) -> None:
        self._fail = fail
        self._choices: list[Choice] = []
        self._special: list[_Special] = []

    def fill_defaults(self, storage: torch.Tensor) -> None:
        """Nothing is stored on the device."""

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """`Choice` is checked before it is sent."""

    def prepare_tensor_args(
        self, requests_in_batch: Sequence[Any], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        """Called before each step: remember who the rows of the next `__call__` are."""
        states = [request.state for request in requests_in_batch if request.has_new_token]
        rows: list[Row] = [state.logit_processor_kwargs.get(KEY, _GREEDY_ROW) for state in states]
        self._choices = [row.choice for row in rows]
        self._special = [
            _Special(at, row, states[at].request_id, *_tokens_of(states[at], row.choice.begun))
            for at, row in enumerate(rows)
            if not (row.plain or row.failed)
        ]
        return arg_storage

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, args: torch.Tensor) -> torch.Tensor:
        if not self._special:
            return choose(scores, self._choices)
        special, self._special = self._special, []
        telling = [one for one in special if one.row.choice.top_logprobs is not None]
        told = scores[[one.at for one in telling]].log_softmax(-1) if telling else None
        for one in special:
            if one.row.adjusting is not None:
                try:
                    one.row.adjusting.apply(scores[one.at], one.prompt, one.generated)
                except Exception as error:
                    self._failed(one, error)
        seeds = {one.at: (one.row.choice.seed, len(one.generated)) for one in special}
        numbers = {at: seeded(seed, place) for at, (seed, place) in seeds.items() if seed is not None}
        scores = choose(scores, self._choices, numbers)
        if told is not None:
            self._tell(telling, told, scores)
        return scores

    def _tell(self, telling: list[_Special], logprobs: torch.Tensor, scores: torch.Tensor) -> None:
        rows = [one.at for one in telling]
        chosen = scores[rows].argmax(-1)
        scores[rows, chosen] = torch.inf  # of equal scores, the manager takes this one too
        counts = [one.row.choice.top_logprobs or 0 for one in telling]
        for one, likely in zip(telling, likeliest(logprobs, chosen, counts), strict=True):
            # A token is told once, also when its request had to begin again.
            one.row.told[len(one.generated) :] = [likely]

    def _failed(self, one: _Special, error: Exception) -> None:
        one.row.failed = True
        if not isinstance(error, EngineError):
            # Where, but not its message: that may have what the client wrote.
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("A request failed in the sampler: %s\n%s", type(error).__name__, where)
            error = EngineError("The engine failed while it was answering.")
        self._fail(one.request_id, error)


def _tokens_of(state: Any, begun: int) -> tuple[list[int], list[int]]:
    """Prompt and answer so far. Those of a request that began again stand together as its prompt."""
    given = (state._true_initial_tokens or len(state.initial_tokens)) - begun
    return state.initial_tokens[:given], state.initial_tokens[given:] + state.generated_tokens


def choose(
    scores: torch.Tensor, choices: Sequence[Choice], numbers: Mapping[int, float] | None = None
) -> torch.Tensor:
    """Scores whose largest value in row i is the token that `choices[i]` asked for.

    There may be more rows than choices: requests whose prompt is not read to its end yet. Row i is drawn
    with `numbers[i]` (see `chance`), others with fresh ones.
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
            drawn_with = fresh(len(rows))
            if numbers:
                drawn_with = [numbers.get(row, number) for row, number in zip(rows, drawn_with, strict=True)]
            index = torch.tensor(rows, device=scores.device)
            heated = scores[index] / _column([choice.temperature for choice in picked], scores)
            if any(choice.min_p > 0 for choice in picked):
                heated = _without_unlikely(heated, picked)
            scores[index, draw(heated, picked, _column(drawn_with, scores))] = torch.inf
    return scores


def _without_unlikely(scores: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    """Only tokens at least `min_p` times as likely as the likeliest."""
    least = scores.amax(-1, keepdim=True) + _column([choice.min_p for choice in choices], scores).log()
    return scores.masked_fill(scores < least, -torch.inf)


def _draw(scores: torch.Tensor, choices: Sequence[Choice], numbers: torch.Tensor) -> torch.Tensor:
    """One column per row, with the probabilities that the scores mean."""
    heaped = scores.softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(heaped, numbers * heaped[:, -1:], right=True).squeeze(-1)
    # Beyond the last column are only rows that are no numbers, of a model that is broken.
    return drawn.clamp_max(scores.shape[-1] - 1)


def _draw_limited(scores: torch.Tensor, choices: Sequence[Choice], numbers: torch.Tensor) -> torch.Tensor:
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
    return tokens.gather(-1, _draw(best, choices, numbers).unsqueeze(-1)).squeeze(-1)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)
