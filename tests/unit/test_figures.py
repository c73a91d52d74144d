"""F22: figures of a worker that cannot be."""

from __future__ import annotations

import pytest

from registry.figures import TOKENS_WITHOUT_TEXT, oddity


@pytest.mark.parametrize(
    ("completion_tokens", "characters", "most_tokens", "flag"),
    [
        (0, 0, 16, ""),
        (16, 40, 16, ""),
        (17, 40, 16, "more tokens than were asked for"),
        (TOKENS_WITHOUT_TEXT, 0, None, ""),
        (TOKENS_WITHOUT_TEXT + 1, 0, None, "more tokens than characters"),
        (10 + TOKENS_WITHOUT_TEXT + 1, 10, 500, "more tokens than characters"),
        (10**9, None, None, ""),
        (10**9, None, 500, "more tokens than were asked for"),
    ],
)
def test_figures_that_cannot_be_are_named(
    completion_tokens: int, characters: int | None, most_tokens: int | None, flag: str
) -> None:
    found = oddity(completion_tokens=completion_tokens, characters=characters, most_tokens=most_tokens)
    assert found == flag
