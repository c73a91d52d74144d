"""What engines that are not ours say, in the words that clients read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from inference.errors import WorkerRefused

_DATA = b"data: "
_PROMPTS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
_OF_PROMPTS = frozenset({"input_text", "input_tokens", "prompt_token_ids"})
"""vLLM's own words for what came of a prompt."""
_decode = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.encode


class Dialect(Protocol):
    """Of one answer: it may remember what it has read. Both methods raise msgspec.DecodeError for what is
    no JSON object."""

    def whole(self, answer: bytes) -> bytes:
        """A whole answer."""

    def event(self, event: bytes) -> bytes:
        """One event, `b"data: …"` without its line end; `choices` and then `usage` come last."""


def dialect_of(engine: str, asked: str, model: str | None = None, samples: int = 1) -> Dialect | None:
    """How a worker of this engine answers at this path; None: as clients expect it. `model` is the name
    that the client asked for, and is then told in the answer; `samples` the answers to each prompt."""
    if engine == "vllm" and (choice := _CHOICES.get(asked)) is not None:
        return _Vllm(choice, model, samples)
    return None


def field_meant(refusal: WorkerRefused, asked: str) -> str | None:
    """The client's field that an engine refused at this path."""
    prompt = _PROMPTS.get(asked)
    if refusal.param in _OF_PROMPTS:
        return prompt
    return refusal.param or (prompt if "out of vocabulary" in refusal.message else None)


def for_model(body: bytes, model: str) -> bytes:
    """The same request to another model of the worker."""
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return _encode({**fields, "model": model})


class _Vllm:
    """vLLM says null where others say nothing, its own model name, and a stream's usage per choice."""

    def __init__(
        self, choice: Callable[[dict[str, Any]], dict[str, Any]], model: str | None, samples: int
    ) -> None:
        self._choice = choice
        self._model = model
        self._samples = samples
        self._counted: dict[int, int] = {}
        self._prompts: dict[int, int] = {}

    def whole(self, answer: bytes) -> bytes:
        return _encode(self._told(_decode(answer)))

    def event(self, event: bytes) -> bytes:
        chunk = _decode(event[len(_DATA) :])
        if chunk.get("error"):
            return _DATA + _encode({"error": chunk["error"]})  # its first key: that is how it is known
        if chunk.get("usage") and (choices := _objects(chunk.get("choices"))):
            chunk["usage"] = self._so_far(choices[0].get("index", 0), chunk["usage"])
        return _DATA + _encode(self._told(chunk))

    def _told(self, answer: dict[str, Any]) -> dict[str, Any]:
        usage = answer.pop("usage", None)
        choices = [self._choice(choice) for choice in _objects(answer.pop("choices", None))]
        told = {name: value for name, value in answer.items() if value is not None}
        if self._model is not None:
            told["model"] = self._model
        told["choices"] = choices
        if usage is not None:
            told["usage"] = _usage(usage)
        return told

    def _so_far(self, index: int, usage: dict[str, Any]) -> dict[str, Any]:
        """What all choices have cost, where vLLM says what this one and its prompt have. A prompt counts
        from its first token on, once for all its choices."""
        self._counted[index] = usage.get("completion_tokens") or 0
        self._prompts[index // self._samples] = usage.get("prompt_tokens") or 0
        return usage | {
            "prompt_tokens": sum(self._prompts.values()),
            "completion_tokens": sum(self._counted.values()),
        }


def _objects(given: Any) -> list[dict[str, Any]]:
    return [one for one in given or () if isinstance(one, dict)]


_CHOICE = ("index", "message", "delta", "text", "logprobs", "finish_reason")
"""Keys of a choice that are there even when they are null."""


def _chat_choice(choice: dict[str, Any]) -> dict[str, Any]:
    told = _text_choice(choice)
    if "message" in told:
        message = _said(told["message"])
        if message.get("tool_calls") and not message.get("content"):
            message["content"] = None
        told["message"] = {
            **{"role": "assistant", "content": None, "refusal": None, "annotations": []},
            **message,
        }
    if "delta" in told:
        delta = _said(told["delta"])
        # The first one names the role.
        told["delta"] = {"role": None, "content": "", "refusal": None, **delta} if "role" in delta else delta
    if told.get("logprobs"):
        told["logprobs"] = {"refusal": None, **told["logprobs"]}
    return told


def _text_choice(choice: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in choice.items() if value is not None or name in _CHOICE}


def _said(given: dict[str, Any]) -> dict[str, Any]:
    """A message or delta without what it does not say."""
    said = {name: value for name, value in given.items() if value is not None and value != []}
    if reasoning := said.pop("reasoning", None) or said.get("reasoning_content"):
        # Some clients read the one, some the other.
        said["reasoning"] = said["reasoning_content"] = reasoning
    if calls := _objects(said.get("tool_calls")):
        said["tool_calls"] = [_call(call) for call in calls]
    return said


def _call(call: dict[str, Any]) -> dict[str, Any]:
    if not call.get("id"):  # goes on with one that was begun
        return call
    told = {**call, "id": "call_" + str(call["id"]).removeprefix("chatcmpl-tool-").removeprefix("call_")}
    told["function"] = {"arguments": "", **(call.get("function") or {})}
    return told


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """In the order and the words of our own engines."""
    prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    told = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    if (of_prompt := usage.get("prompt_tokens_details")) is None:  # in mid-stream
        return told
    of_completion = usage.get("completion_tokens_details") or {}
    return {
        **told,
        "prompt_tokens_details": {"cached_tokens": of_prompt.get("cached_tokens") or 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": of_completion.get("reasoning_tokens") or 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


_CHOICES = {"/v1/chat/completions": _chat_choice, "/v1/completions": _text_choice}
