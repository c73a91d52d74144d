"""Token ids to text as they come: never half a character, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

HALF = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are not (yet) a whole character."""

MAX_PENDING = 64
"""Tokens kept back for a character that does not end: so many are no character, but noise."""


class Detokenizer:
    """Text of a growing list of tokens; the pieces joined equal the text of the whole list."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        # The last tokens that gave text, then those that did not yet. A token is decoded together
        # with what precedes it, because its text depends on that (spaces, bytes of one character).
        self._window: list[int] = []
        self._context = 0
        self._sent = ""

    def push(self, token: int) -> str:
        """The text that became certain with this token; often one word, "" while a character is open."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(HALF):
            if len(self._window) - self._context < MAX_PENDING:
                return ""
            # Only the very end can still change.
            piece = text[len(self._sent) : -1]
            self._window = self._window[-8:]
            self._context = 0
            self._sent = self._decode(self._window)[:-1]
            return piece
        piece = text[len(self._sent) :]
        if piece:
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._sent = self._decode(self._window)
        elif len(self._window) - self._context >= MAX_PENDING:
            del self._window[self._context :]  # tokens without text, such as control tokens
        return piece

    def flush(self) -> str:
        """What is left when no more tokens come."""
        piece = self._decode(self._window)[len(self._sent) :]
        self._window, self._context, self._sent = [], 0, ""
        return piece


class StopFinder:
    """Passes text on up to the first stop string; keeps back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string was found (nothing comes after it)."""
        if not self._stops or not text:
            return text, False
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was kept back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a start of `stop`, but not all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
