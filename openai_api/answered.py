"""Where an answer goes, as the request path sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Answered(Protocol):
    """A client's connection, a conversation in the chat, or an adapter that speaks another format and
    passes on to one of these."""

    @property
    def client_gone(self) -> bool:
        """Nobody waits for the answer any more."""

    async def send_json(self, status: int, payload: object) -> None:
        """The whole answer: JSON as bytes, or anything that msgspec encodes."""

    async def stream_start(self, prompt_tokens: int = 0) -> None:
        """The answer has begun, or is waited for so long already that the client is told so. `prompt_tokens`:
        what the prompt costs, where that is known by now."""

    async def stream_events(self, events: Sequence[bytes]) -> None:
        """Server-sent events that came together, each with the blank line that ends it; at least one."""

    async def stream_end(self, chunk: bytes = b"") -> None:
        """The last one: `data: [DONE]`, or `data: {"error": …}` of an answer that was cut."""
