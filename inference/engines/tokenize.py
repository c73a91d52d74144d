"""Texts to token ids and back, as vLLM's `/tokenize` and `/detokenize` have it."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from inference.engines.base import BadRequest, Engine
from inference.engines.chat import (
    ChatMessage,
    TemplateValues,
    decode,
    plain_messages,
    refuse_unsupported,
    template_fields,
    template_of,
)
from inference.engines.tools import Tool


class TokenizeRequest(msgspec.Struct):
    """A prompt or messages."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=100_000)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateValues | None = None
    return_token_strs: bool | None = None
    tools: Annotated[list[Tool], msgspec.Meta(max_length=1024)] | None = None


class DetokenizeRequest(msgspec.Struct):
    tokens: list[Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]]


_decode_tokenize = msgspec.json.Decoder(TokenizeRequest).decode
_decode_detokenize = msgspec.json.Decoder(DetokenizeRequest).decode


async def tokenize(engine: Engine, body: bytes) -> bytes:
    """The answer to a body. Raises BadRequest."""
    asked = decode(body, _decode_tokenize)
    if (asked.prompt is None) == (asked.messages is None):
        raise BadRequest(
            "Give either 'prompt' or 'messages'.", param="prompt", code="missing_required_parameter"
        )
    if asked.messages is not None:
        refuse_unsupported(engine.capabilities, **template_fields(asked))
    # A chat template writes the special tokens itself.
    special = asked.prompt is not None if asked.add_special_tokens is None else asked.add_special_tokens
    tokens = await engine.tokenize(
        plain_messages(asked.messages) if asked.messages is not None else asked.prompt or "",
        special_tokens=special,
        template=template_of(asked),
        tools=[msgspec.to_builtins(tool) for tool in asked.tools] if asked.tools else None,
    )
    return tokens_answer(asked, tokens, engine.context_length)


def tokens_answer(asked: TokenizeRequest, tokens: list[tuple[int, str]], limit: int) -> bytes:
    """`tokens`: ids, and how each is spelled; `limit`: most tokens that the model takes."""
    answer: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": limit,
        "tokens": [token for token, _ in tokens],
        "token_strs": [said for _, said in tokens] if asked.return_token_strs else None,
    }
    return msgspec.json.encode(answer)


async def detokenize(engine: Engine, body: bytes) -> bytes:
    """The answer to a body. Raises BadRequest."""
    asked = decode(body, _decode_detokenize)
    return msgspec.json.encode({"prompt": await engine.detokenize(asked.tokens)})
