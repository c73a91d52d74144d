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
        "top_logprobs": [
            None
            if token.logprob is None
            else {token.text: token.logprob} | {one.text: one.logprob for one in token.top}
            for token in tokens
        ],
        "text_offset": offsets,
    }
