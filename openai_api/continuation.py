"""Going on elsewhere with a stream whose worker died: from the text that the client has already.

The next worker gets the same request with that text as the beginning of the answer: as a last message to go
on with (`continue_final_message`), or at the end of a completion's prompt. Text that the first worker held
back, half a character or the beginning of a stop string, was never sent: the next one says it again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

FOLDED_EVENTS = 512
"""Events kept as they are. Taking one apart costs as much as sending it, and most streams need it never."""
_NOT_PLAIN = (
    *("tools", "functions", "response_format", "structured_outputs", "logprobs", "prompt_logprobs"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "suffix", "echo"),
    *("return_token_ids", "return_tokens_as_token_ids", "use_beam_search"),
)
"""Fields whose answers are more than text, or text that cannot be entered in the middle."""


_GOES_ON = frozenset({"continue_final_message"})


class GoingOn(NamedTuple):
    body: bytes
    """For the next worker."""
    tokens_left: int | None
    """0: the answer is whole, only its end is missing. None: no bound."""
    needs: frozenset[str] = frozenset()
    """What that worker must honour besides."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str = ""
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class Said:
    """What the client of one stream has been sent."""

    __slots__ = ("_events", "_plain", "_texts", "finished", "last", "tokens")

    def __init__(self) -> None:
        self.finished = False
        """It has been told why the answer ended."""
        self.last = b""
        """The newest event, once `continued` was asked."""
        self._events: list[bytes] = []
        self._texts: list[str] = []
        self._plain = True

    def add(self, event: bytes) -> None:
        """An event of the answer, as the worker sent it, without the blank line."""
        self._events.append(event)
        if len(self._events) >= FOLDED_EVENTS:
            self._fold()

    def _fold(self) -> None:
        events, self._events = self._events, []
        if events:
            self.last = events[-1]
        for event in events if self._plain else ():
            for choice in _decode_chunk(event[len(b"data: ") :]).choices:
                delta = choice.delta or _Delta()
                if delta.reasoning or delta.reasoning_content or delta.tool_calls:
                    self._plain = False
                self._texts.append(delta.content or choice.text)
                self.finished |= choice.finish_reason is not None

    def continued(self, body: bytes, *, tokens: int) -> GoingOn | None:
        """How to go on with the answer to the request `body` after `tokens` generated ones; None where
        nobody can."""
        self._fold()
        asked: dict[str, Any] = msgspec.json.decode(body)
        if not self._plain or any(asked.get(name) for name in _NOT_PLAIN) or (asked.get("n") or 1) > 1:
            return None
        text = "".join(self._texts)
        left: int | None = None
        if asked.get("max_tokens") is not None:
            left = asked["max_tokens"] = max(0, asked["max_tokens"] - tokens)
        if asked.get("min_tokens"):
            asked["min_tokens"] = max(0, asked["min_tokens"] - tokens)
        if not text:
            return GoingOn(msgspec.json.encode(asked), left)
        if "messages" not in asked:
            if not isinstance(asked.get("prompt"), str):
                return None
            asked["prompt"] += text
            return GoingOn(msgspec.json.encode(asked), left)
        messages = asked["messages"]
        if asked.get("continue_final_message"):
            if not isinstance(messages[-1].get("content"), str):
                return None
            messages[-1]["content"] += text
        else:
            messages.append({"role": "assistant", "content": text})
            asked |= {"continue_final_message": True, "add_generation_prompt": False}
        return GoingOn(msgspec.json.encode(asked), left, _GOES_ON)

    def ending(self, *, usage: bool) -> bytes:
        """The event that says the answer reached its length, in the manner of the newest one."""
        chunk = msgspec.json.decode(self.last[len(b"data: ") :])
        [choice] = chunk["choices"]
        choice["finish_reason"] = "length"
        if "delta" in choice:
            choice["delta"] = {}
        else:
            choice["text"] = ""
        chunk.pop("usage", None)
        if usage:
            chunk["usage"] = None
        return b"data: " + msgspec.json.encode(chunk)

    def usage(self, prompt_tokens: int, completion_tokens: int) -> bytes:
        """The event that tells what the whole answer cost."""
        chunk = msgspec.json.decode(self.last[len(b"data: ") :])
        chunk |= {"choices": [], "usage": usage_of(prompt_tokens, completion_tokens)}
        return b"data: " + msgspec.json.encode(chunk)


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def says_nothing(event: bytes) -> bool:
    """Is it a chat's first event, which has a role and no text? The client has had one."""
    try:
        choices = _decode_chunk(event[len(b"data: ") :]).choices
    except msgspec.DecodeError:
        return False
    return bool(choices) and all(
        choice.delta is not None
        and not (choice.delta.content or choice.delta.tool_calls or choice.delta.reasoning_content)
        and choice.finish_reason is None
        for choice in choices
    )
