"""Where an answer goes, as the request path sees it."""

from __future__ import annotations

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

    async def stream_chunk(self, chunk: bytes) -> None:
        """One server-sent event, with the blank line that ends it."""

    async def stream_end(self, chunk: bytes = b"") -> None:
        """The last one: `data: [DONE]`, or `data: {"error": …}` of an answer that was cut."""
