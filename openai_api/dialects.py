"""What engines that are not ours say, in the words that clients read."""

from __future__ import annotations

from typing import Protocol


class Dialect(Protocol):
    """Both methods raise msgspec.DecodeError for what is no JSON."""

    def whole(self, answer: bytes) -> bytes:
        """A whole answer."""

    def event(self, event: bytes) -> bytes:
        """One event, `b"data: …"` without its line end; `usage` comes last."""


def dialect_of(engine: str, asked: str) -> Dialect | None:
    """How workers of this engine answer at this path; None: as clients expect it."""
    return None
