"""Texts and token ids to pieces that fit the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inference.engines.base import BadRequest

DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Under which of these names a model keeps the words that it wants before a document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One input, as the model reads it."""

    ids: list[int]
    kinds: list[int]
    """Which text of a pair each token is of."""
    truncated: bool = False
    prompt_tokens: int = 0
    """Leading tokens that the model's pooling leaves out."""


class Tokens:
    """Makes pieces. Nothing of it changes, so any thread may ask."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        limit: int,
        prompts: Mapping[str, str],
        default_prompt: str,
        marks_prompts: bool,
    ) -> None:
        self.limit = limit
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json brings settings of its own along, often of the model's training.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._vocabulary = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._special = frozenset(tokenizer.all_special_ids)
        self._pad = tokenizer.pad_token_id or 0
        self._pads_left = tokenizer.padding_side == "left"
        self._with_kinds = "token_type_ids" in tokenizer.model_input_names
        self._default_prompt = default_prompt
        self._query_prompt = prompts.get("query") or default_prompt
        self._document_prompt = next(
            (prompts[name] for name in DOCUMENT_PROMPTS if prompts.get(name)), default_prompt
        )
        self._marks_prompts = marks_prompts

    def input(self, given: str | list[int], *, param: str, keep: int | None) -> Piece:
        """An input of `/v1/embeddings`. `keep`: cut it to so many tokens; None: refuse beyond the limit."""
        if isinstance(given, list):
            given = self._spelled(given, param)
        return self._single(given, self._default_prompt, param, keep)

    def query(self, text: str, *, param: str, keep: int | None) -> Piece:
        return self._single(text, self._query_prompt, param, keep)

    def document(self, text: str, *, param: str, keep: int | None) -> Piece:
        return self._single(text, self._document_prompt, param, keep)

    def pair(self, query: str, document: str, *, param: str, keep: int | None) -> Piece:
        """A query and a document as a cross-encoder reads them; the longer of them is cut first."""
        whole = self._backend.encode(query, document)
        frame = self._backend.num_special_tokens_to_add(True)
        most = self._most(keep, frame)
        if len(whole.ids) <= most:
            return Piece(ids=whole.ids, kinds=whole.type_ids)
        self._refuse(len(whole.ids), param, keep)
        first = self._backend.encode(query, add_special_tokens=False)
        second = self._backend.encode(document, add_special_tokens=False)
        lengths = longest_first(len(first.ids), len(second.ids), most - frame)
        first.truncate(lengths[0])
        second.truncate(lengths[1])
        cut = self._backend.post_process(first, second)
        return Piece(ids=cut.ids, kinds=cut.type_ids, truncated=True)

    def beginning(self, text: str, count: int) -> str:
        """The text of its first `count` tokens; the very same one when it has no more."""
        whole = self._backend.encode(text, add_special_tokens=False)
        if len(whole.ids) <= count:
            return text
        return text[: max(end for _, end in whole.offsets[:count])]

    def of_text(self, text: str, *, special: bool) -> list[tuple[int, str]]:
        """A text's tokens as they stand: ids, and how each is spelled."""
        whole = self._backend.encode(text, add_special_tokens=special)
        return list(zip(whole.ids, whole.tokens, strict=True))

    def text_of(self, ids: list[int], *, param: str) -> str:
        """The text of token ids, special ones included."""
        self._check(ids, param)
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def batch(self, pieces: Sequence[Piece]) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
        """What the model is given: one padded row per piece."""
        longest = max(len(piece.ids) for piece in pieces)
        ids = np.full((len(pieces), longest), self._pad, dtype=np.int64)
        mask = np.zeros((len(pieces), longest), dtype=np.int64)
        kinds = np.zeros((len(pieces), longest), dtype=np.int64)
        for row, piece in enumerate(pieces):
            count = len(piece.ids)
            place = slice(longest - count, longest) if self._pads_left else slice(0, count)
            ids[row, place] = piece.ids
            mask[row, place] = 1
            kinds[row, place] = piece.kinds
        rows = {"input_ids": ids, "attention_mask": mask}
        return rows | {"token_type_ids": kinds} if self._with_kinds else rows

    def packed(
        self, pieces: Sequence[Piece], first_position: int
    ) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
        """What a model that needs no padding is given: all pieces in one row, and where each ends."""
        lengths = [len(piece.ids) for piece in pieces]
        rows = {
            "input_ids": np.array([[token for piece in pieces for token in piece.ids]], dtype=np.int64),
            "position_ids": np.concatenate([np.arange(length) for length in lengths])[None] + first_position,
            "cu_seq_lens_q": np.cumsum([0, *lengths]),
        }
        if self._with_kinds:
            kinds = [kind for piece in pieces for kind in piece.kinds]
            rows["token_type_ids"] = np.array([kinds], dtype=np.int64)
        return rows

    def _single(self, text: str, prompt: str, param: str, keep: int | None) -> Piece:
        frame = self._backend.num_special_tokens_to_add(False)
        most = self._most(keep, frame)
        whole = self._backend.encode(prompt + text)
        truncated = len(whole.ids) > most
        if truncated:
            self._refuse(len(whole.ids), param, keep)
            whole = self._backend.encode(prompt + text, add_special_tokens=False)
            whole.truncate(most - frame)
            whole = self._backend.post_process(whole)
        return Piece(
            ids=whole.ids,
            kinds=whole.type_ids,
            truncated=truncated,
            prompt_tokens=min(self._prompt_tokens(prompt), len(whole.ids)) if self._marks_prompts else 0,
        )

    def _prompt_tokens(self, prompt: str) -> int:
        """How many leading tokens are the prompt's, counted as sentence-transformers counts them."""
        if not prompt:
            return 0
        ids = self._backend.encode(prompt).ids
        return len(ids) - 1 if ids[-1] in self._special else len(ids)

    def _most(self, keep: int | None, frame: int) -> int:
        if keep is None or keep == -1:
            return self.limit
        if keep <= frame:
            raise BadRequest(
                f"'truncate_prompt_tokens' must be -1 or above {frame}: that many tokens frame every input.",
                param="truncate_prompt_tokens",
                code="invalid_value",
            )
        return min(self.limit, keep)

    def _refuse(self, count: int, param: str, keep: int | None) -> None:
        if keep is None:
            raise BadRequest(
                f"This model's maximum context length is {self.limit} tokens. "
                f"However, your input resulted in {count} tokens. "
                "Please reduce the length of the input, or set truncate_prompt_tokens to -1 to have it cut.",
                param=param,
                code="context_length_exceeded",
            )

    def _spelled(self, ids: list[int], param: str) -> str:
        """The text of token ids: the model's own frame goes around it once more."""
        self._check(ids, param)
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        if not text:
            raise BadRequest("The tokens hold no text.", param=param, code="invalid_value")
        return text

    def _check(self, ids: list[int], param: str) -> None:
        for at, token in enumerate(ids):
            if not 0 <= token < self._vocabulary:
                raise BadRequest(
                    f"{param}[{at}] is {token}; this model has the tokens 0 to {self._vocabulary - 1}.",
                    param=param,
                    code="invalid_value",
                )


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of a pair cut to `room`: the longer one gives, then both to half."""
    if first + second <= room:
        return first, second
    shorter, longer = sorted((first, second))
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter = room // 2
        longer = shorter + room % 2
    return (shorter, longer) if first <= second else (longer, shorter)
