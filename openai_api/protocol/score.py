"""`POST /v1/score`: how alike two texts are, or how well one answers the other."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from openai_api import limits
from openai_api.errors import InvalidRequest
from openai_api.parsing import missing
from openai_api.protocol.call import PAIR_TOKENS, Call, Kept, Size, empty_string

Texts = str | Annotated[list[str], msgspec.Meta(min_length=1, max_length=limits.RERANK_DOCUMENTS)] | None


class ScoreRequest(Call, kw_only=True):
    """`POST /v1/score`. Each side has several names; one text on the left goes with every one on the
    right, else both sides are equally many."""

    text_1: Texts = None
    queries: Texts = None
    data_1: Texts = None
    text_2: Texts = None
    documents: Texts = None
    items: Texts = None
    data_2: Texts = None
    truncate_prompt_tokens: Kept | None = None

    def check(self) -> None:
        Call.check(self)
        left_name, left = self._given(_LEFT)
        right_name, right = self._given(_RIGHT)
        if len(left) not in (1, len(right)):
            raise InvalidRequest(
                f"Invalid '{left_name}': {len(left)} texts do not go with the {len(right)} of "
                f"'{right_name}'. Give one, or as many.",
                param=left_name,
                code="invalid_value",
            )

    def size(self, forwarded_bytes: int) -> Size:
        left, right = self._given(_LEFT)[1], self._given(_RIGHT)[1]
        # One text on the left is read once more with each on the right.
        again = max(len(text.encode()) for text in left)
        return Size(forwarded_bytes + len(right) * (again + PAIR_TOKENS), len(right))

    def forwarded(self, needs: frozenset[str]) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "text_1": self._given(_LEFT)[1],
            "text_2": self._given(_RIGHT)[1],
        }
        if self.truncate_prompt_tokens is not None:
            body["truncate_prompt_tokens"] = self.truncate_prompt_tokens
        return msgspec.json.encode(body)

    def _given(self, names: tuple[str, ...]) -> tuple[str, list[str]]:
        """The name that was used, and its texts."""
        used = [name for name in names if getattr(self, name) is not None]
        if not used:
            raise missing(names[0])
        if len(used) > 1:
            raise InvalidRequest(
                f"'{used[1]}' is another name of '{used[0]}': give one of them.",
                param=used[1],
                code="invalid_value",
            )
        name, given = used[0], getattr(self, used[0])
        if not given or "" in (given if isinstance(given, list) else ()):
            raise empty_string(name)
        return name, [given] if isinstance(given, str) else given


_LEFT = ("text_1", "queries", "data_1")
_RIGHT = ("text_2", "documents", "items", "data_2")
