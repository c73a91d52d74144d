"""Are a worker's figures possible? A worker that miscounts, or lies, is charged as it says, and flagged.

Roundhouse has no tokenizer of every model at hand; these bounds need none.
"""

from __future__ import annotations

TOKENS_WITHOUT_TEXT = 64
"""Generated tokens that may well show nothing: ends of turns, halves of characters, what a parser kept."""


def oddity(*, completion_tokens: int, characters: int | None, most_tokens: int | None) -> str:
    """What cannot be about an answer's figures, for `UsageEvent.flagged`; empty if it can.

    `characters` is what was sent of the answer (None: not counted, or some of it is hidden, such as reasoning
    or log probabilities); `most_tokens` is what was asked for at most, over all choices (None: nothing).
    """
    if most_tokens is not None and completion_tokens > most_tokens:
        return "more tokens than were asked for"
    # A token may be as short as one character, hardly ever shorter.
    if characters is not None and completion_tokens > characters + TOKENS_WITHOUT_TEXT:
        return "more tokens than characters"
    return ""
