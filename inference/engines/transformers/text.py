"""Token ids to text as they come, never half a character."""

from __future__ import annotations

from collections.abc import Callable

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
