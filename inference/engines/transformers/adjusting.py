"""What one request changes of its scores before a token is drawn: what may not come, what is added and
what is taken off. In vLLM's order: form, allowed tokens, bad words, least length, bias, penalties."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from inference.engines.base import BadRequest

if TYPE_CHECKING:
    from inference.engines.transformers.sampling import Choice


class Adjusting:
    """Follows the tokens of one request. They are always given whole, so it does not matter how often a
    request had to begin again."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._begun = False
        self._taken = 0
        """Tokens of the answer that were followed."""
        # All of them have a value for each token; None: nothing asks for it.
        self._sums: torch.Tensor | None = None
        """The bias, and -inf of what is not allowed."""
        self._factors: torch.Tensor | None = None
        """The repetition penalty of tokens that were there before, 1 of others."""
        self._fines: torch.Tensor | None = None
        """Presence and frequency penalties of what was generated."""
        self._fined: set[int] = set()

    def apply(self, row: torch.Tensor, prompt: list[int], generated: list[int]) -> None:
        """Change the scores in place. Raises BadRequest when nothing is left to choose, and whatever the
        grammar raises."""
        if not self._begun:
            self._begin(row, prompt)
        for token in generated[self._taken :]:
            self._take(token)
        forbids = self._forbid(row, generated)
        if self._sums is not None:
            row += self._sums
        if self._factors is not None:
            row.copy_(torch.where(row > 0, row / self._factors, row * self._factors))
        if self._fines is not None:
            row -= self._fines
        if forbids and bool(row.amax() == -torch.inf):
            raise BadRequest("What this request forbids leaves no token to go on with.")

    def _begin(self, row: torch.Tensor, prompt: list[int]) -> None:
        choice, self._begun = self._choice, True
        if choice.allowed is not None:
            self._sums = torch.full_like(row, -torch.inf)
            self._sums[list(choice.allowed)] = 0.0
        if choice.logit_bias:
            if self._sums is None:
                self._sums = torch.zeros_like(row)
            tokens, values = zip(*choice.logit_bias, strict=True)
            self._sums[list(tokens)] += torch.tensor(values, dtype=row.dtype, device=row.device)
        if choice.repetition_penalty != 1:
            self._factors = torch.ones_like(row)
            self._factors[[token for token in set(prompt) if token < row.shape[-1]]] = (
                choice.repetition_penalty
            )
        if choice.presence_penalty or choice.frequency_penalty:
            self._fines = torch.zeros_like(row)

    def _take(self, token: int) -> None:
        choice = self._choice
        self._taken += 1
        if choice.grammar is not None:
            choice.grammar.accept(token)
        if self._factors is not None:
            self._factors[token] = choice.repetition_penalty
        if self._fines is not None:
            first = token not in self._fined
            self._fines[token] += choice.frequency_penalty + (choice.presence_penalty if first else 0.0)
            self._fined.add(token)

    def _forbid(self, row: torch.Tensor, generated: list[int]) -> bool:
        """Whether the request may have left nothing."""
        choice = self._choice
        if choice.grammar is not None:
            choice.grammar.fill_mask(row)
        too_short = len(generated) < choice.min_tokens
        if too_short:
            ends = list(choice.ends)
            before = row[ends]
            row[ends] = -torch.inf
            if choice.grammar is not None and bool(row.amax() == -torch.inf):
                row[ends] = before  # its form is whole: that ends it
        for word in choice.bad_words:
            begun = len(word) - 1
            if not begun or tuple(generated[-begun:]) == word[:-1]:
                row[word[-1]] = -torch.inf
        return choice.grammar is not None or choice.allowed is not None or too_short or bool(choice.bad_words)
