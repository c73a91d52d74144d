"""A gateway's request as the server behind understands it: its own name of the model, and only fields that
it knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from inference.engines.base import BadRequest
from inference.engines.upstream.presets import Preset

BYTES_PER_TOKEN = 4
"""Where nobody says how many tokens a text has."""
_PER_MESSAGE = 4

_SAMPLED = frozenset({"max_tokens", "stream"})
_ALWAYS: dict[str, frozenset[str]] = {
    "/v1/chat/completions": _SAMPLED | {"messages"},
    "/v1/completions": _SAMPLED | {"prompt", "echo"},
    "/v1/embeddings": frozenset({"input", "encoding_format"}),
    "/v1/rerank": frozenset({"query", "documents", "top_n", "return_documents"}),
    "/v1/score": frozenset({"text_1", "text_2"}),
    "/tokenize": frozenset({"prompt", "messages", "tools", "add_special_tokens", "return_token_strs"})
    | {"add_generation_prompt", "continue_final_message", "chat_template_kwargs"},
    "/detokenize": frozenset({"tokens"}),
}
PATHS = tuple(_ALWAYS)
GENERATING = frozenset({"/v1/chat/completions", "/v1/completions"})
TOKENIZING = frozenset({"/tokenize", "/detokenize"})
"""They cost nothing."""

_EVERY = {"include_usage": True, "continuous_usage_stats": True}
_LAST = {"include_usage": True}

_decode = msgspec.json.Decoder(dict[str, Any]).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    body: bytes
    model: str | None
    """What the client called the model."""
    streamed: bool
    prompts: int
    samples: int
    """Answers to each prompt."""
    prompt_tokens: int
    """Estimated."""


def prepare(path: str, body: bytes, *, model: str, capabilities: Iterable[str], preset: Preset) -> Prepared:
    """The request for the server. Raises BadRequest for what is no JSON object."""
    try:
        asked = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRequest("The body is no JSON object.") from None
    allowed = _ALWAYS[path] | frozenset(capabilities)
    told = {name: value for name, value in asked.items() if name in allowed}
    if asked.get("top_k") == 1 and "top_k" not in told and "temperature" in told:
        told["temperature"] = 0  # what a gateway says so, because some engines refuse it with `n`
    streamed = told.get("stream") is True
    if streamed and preset.usage != "none":
        told["stream_options"] = _EVERY if preset.usage == "every" else _LAST
    for name, theirs in preset.renamed.items():
        if name in told and path in GENERATING:
            told[theirs] = told.pop(name)
    if preset.strict_tools:
        for tool in _objects(told.get("tools")):
            if isinstance(function := tool.get("function"), dict):
                function["strict"] = True
    told["model"] = model
    samples = told.get("n")
    return Prepared(
        body=msgspec.json.encode(told),
        model=asked["model"] if isinstance(asked.get("model"), str) else None,
        streamed=streamed,
        prompts=_prompts(told.get("prompt")),
        samples=samples if isinstance(samples, int) and samples > 0 else 1,
        prompt_tokens=0 if path in TOKENIZING else sum(map(estimated, _texts(told))),
    )


def estimated(text: str | list[Any]) -> int:
    """Tokens of a text, or of a list of tokens."""
    if isinstance(text, str):
        return -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)
    return len(text)


def _prompts(prompt: Any) -> int:
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return len(prompt) if several else 1


def _texts(told: dict[str, Any]) -> Iterable[str | list[Any]]:
    """What of a request is read by the model."""
    for message in _objects(told.get("messages")):
        yield [None] * _PER_MESSAGE
        content = message.get("content")
        if isinstance(content, str):
            yield content
        else:
            yield from (part["text"] for part in _objects(content) if isinstance(part.get("text"), str))
        if calls := message.get("tool_calls"):
            yield msgspec.json.encode(calls).decode()
    if tools := told.get("tools"):
        yield msgspec.json.encode(tools).decode()
    for name in ("prompt", "input", "query", "documents", "text_1", "text_2"):
        yield from _flat(told.get(name))


def _flat(given: Any) -> Iterable[str | list[Any]]:
    if isinstance(given, str):
        yield given
    elif isinstance(given, list):
        if given and isinstance(given[0], int):
            yield given
        else:
            for one in given:
                yield from _flat(one["text"] if isinstance(one, dict) and "text" in one else one)


def _objects(given: Any) -> list[dict[str, Any]]:
    return [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
