"""Going on elsewhere with a stream whose worker died: from what the client has already.

Where the worker told the tokens of it (in the usage of each event, which is cut off for the client), and the
next one serves the same model and can (`continue_token_ids`), that one gets the same request and these
tokens: it goes on as if it had written them, with stop strings, half characters and thoughts as they stood.

Else the next worker gets the text as the beginning of the answer: as a last message to go on with
(`continue_final_message`), or at the end of a completion's prompt. Text that the first worker held back, half
a character or the beginning of a stop string, was never sent: the next one says it again.
"""

from __future__ import annotations

import re
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
_BY_TEXT = "continue_final_message"
_BY_TOKENS = "continue_token_ids"
_FINISH = re.compile(rb'"finish_reason": ?"')
"""Within a JSON string the quotes would be escaped, so this cannot be text."""


class GoingOn(NamedTuple):
    body: bytes | None
    """For the next worker, whoever it is; None: nobody can go on from the text."""
    tokens_left: int | None
    """0: the answer is whole, only its end is missing. None: no bound."""
    needs: frozenset[str] = frozenset()
    """What that worker must honour besides."""
    exact: bytes | None = None
    """For one that serves the same model and honours `continue_token_ids`."""

    def body_for(self, capabilities: frozenset[str], *, same_model: bool) -> bytes | None:
        """What to ask a worker; None: it cannot go on."""
        if self.exact is not None and same_model and _BY_TOKENS in capabilities:
            return self.exact
        return self.body


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None

    @property
    def thinks(self) -> bool:
        return bool(self.reasoning or self.reasoning_content)


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str = ""
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    token_ids: list[int] = []


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class Said:
    """What the client of one stream has been sent."""

    __slots__ = ("_calls", "_events", "_ids", "_texts", "_thinks", "finished", "last")

    def __init__(self) -> None:
        self.finished = False
        """It has been told why the answer ended."""
        self.last = b""
        """The newest event, once `continued` was asked."""
        self._events: list[bytes] = []
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._thinks = False
        self._calls = False

    def add(self, event: bytes) -> None:
        """An event of the answer, as the worker sent it, without the blank line."""
        self._events.append(event)
        if len(self._events) >= FOLDED_EVENTS:
            self._fold()

    def _fold(self) -> None:
        events, self._events = self._events, []
        if events:
            self.last = events[-1]
        for event in events if not self._calls else ():
            chunk = _decode_chunk(event[len(b"data: ") :])
            if chunk.usage is not None:
                self._ids += chunk.usage.token_ids
            for choice in chunk.choices:
                delta = choice.delta or _Delta()
                self._calls |= bool(delta.tool_calls)
                self._thinks |= delta.thinks
                self._texts.append(delta.content or choice.text)
                self.finished |= choice.finish_reason is not None

    def ends(self) -> bool:
        """Has it been told why the answer ended? Asks the newest events only, before all are taken apart."""
        if self.finished or any(_FINISH.search(event) for event in reversed(self._events)):
            return True
        self._fold()
        return self.finished

    def continued(self, body: bytes, *, tokens: int) -> GoingOn | None:
        """How to go on with the answer to the request `body` after `tokens` generated ones; None where
        nobody can."""
        self._fold()
        asked: dict[str, Any] = msgspec.json.decode(body)
        if self._calls or any(asked.get(name) for name in _NOT_PLAIN) or (asked.get("n") or 1) > 1:
            return None
        most = asked.get("max_tokens")
        left = None if most is None else max(0, most - tokens)
        if not tokens and not self._thinks and not any(self._texts):
            return GoingOn(body, left)
        exact = None
        if len(self._ids) == tokens:
            exact = msgspec.json.encode({**asked, _BY_TOKENS: self._ids})
        by_text = None if self._thinks else self._by_text(asked, tokens)
        if by_text is None:
            return None if exact is None else GoingOn(None, left, frozenset({_BY_TOKENS}), exact)
        needs = frozenset({_BY_TEXT}) if by_text.get(_BY_TEXT) else frozenset[str]()
        return GoingOn(msgspec.json.encode(by_text), left, needs, exact)

    def _by_text(self, asked: dict[str, Any], tokens: int) -> dict[str, Any] | None:
        """The request that begins with the text; None where nobody can go on with it."""
        text = "".join(self._texts)
        for bound in ("max_tokens", "min_tokens"):
            if asked.get(bound) is not None:
                asked[bound] = max(0, asked[bound] - tokens)
        if not text:
            return asked
        if "messages" not in asked:
            if not isinstance(asked.get("prompt"), str):
                return None
            asked["prompt"] += text
            return asked
        messages = asked["messages"]
        if asked.get(_BY_TEXT):
            if not isinstance(messages[-1].get("content"), str):
                return None
            messages[-1]["content"] += text
        else:
            messages.append({"role": "assistant", "content": text})
            asked |= {_BY_TEXT: True, "add_generation_prompt": False}
        return asked

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
        and not (choice.delta.content or choice.delta.tool_calls or choice.delta.thinks)
        and choice.finish_reason is None
        for choice in choices
    )
