"""Tokens and their probabilities as OpenAI's two formats tell them."""

from __future__ import annotations

from typing import Any

from inference.engines.base import Token


def of_chat(tokens: tuple[Token, ...] | list[Token]) -> dict[str, Any]:
    return {
        "content": [
            {**_entry(token), "top_logprobs": [_entry(one) for one in token.top]} for token in tokens
        ],
        "refusal": None,
    }


def _entry(token: Token) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}


def of_text(tokens: tuple[Token, ...] | list[Token], offset: int) -> dict[str, Any]:
    """`offset`: where in the choice's text they begin."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [None if token.logprob is None else _by_text(token) for token in tokens],
        "text_offset": offsets,
    }


def _by_text(token: Token) -> dict[str, float | None]:
    """The token and its alternatives. One that is no whole character has no text to be told by: its bytes
    are, as OpenAI writes them."""
    told = {token.text: token.logprob}
    for one in token.top:
        if one.id != token.id:
            whole = one.raw == one.text.encode(errors="replace")
            told.setdefault(one.text if whole else _written(one.raw), one.logprob)
    return told


def _written(raw: bytes) -> str:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
