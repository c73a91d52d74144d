"""An engine's deltas as OpenAI's chat format: chunks, or one answer.

Chunks are put together from bytes made once per request; only the text is encoded per token. `usage`
is always a chunk's last key, without spaces, so that a gateway can cut it off without parsing.
"""

from __future__ import annotations

from typing import Any

import msgspec

from inference.engines.base import Delta, Detail, GenerationRequest, Tools
from inference.engines.chat import DONE, ChatRequest, StreamOptions
from inference.engines.logprobs import of_chat
from inference.engines.tool_forms import HERMES, Form
from inference.engines.tools import CallParser, CallPiece
from inference.engines.usage import Totals


class ChatChunks:
    """The events of one streamed answer."""

    def __init__(
        self,
        chat: ChatRequest,
        wanted: GenerationRequest,
        totals: Totals,
        *,
        request_id: str,
        model: str,
        created: int,
        form: Form = HERMES,
    ) -> None:
        options = chat.stream_options or StreamOptions()
        self._final_usage = bool(options.include_usage)
        self._continuous = bool(options.continuous_usage_stats)
        self._no_usage = b',"usage":null}\n\n' if self._final_usage else b"}\n\n"
        self._totals = totals
        self._wanted = wanted
        self._head = (
            b'data: {"id":'
            + msgspec.json.encode(f"chatcmpl-{request_id}")
            + b',"object":"chat.completion.chunk","created":%d,"model":' % created
            + msgspec.json.encode(model)
            + b',"choices":['
        )
        self._choices = [_Choice(self._head, at, wanted.tools, form) for at in range(totals.unfinished)]

    def step(self, at: int, delta: Delta) -> bytes:
        """What one more delta adds, counted; a choice's first one adds its role, the very last one the
        end."""
        choice, totals, detail = self._choices[at], self._totals, delta.detail
        event = b""
        if not choice.begun:
            choice.begun = True
            totals.begin(at, delta)
            event = self._role(choice, delta)
        totals.take(at, delta)
        if detail is not None or choice.calls is not None:
            event += self._detailed(choice, delta, detail or _NOTHING)
        elif delta.text or (self._continuous and delta.finish_reason is None):
            event += (
                choice.text
                + msgspec.json.encode(delta.text)
                + b'},"logprobs":null,"finish_reason":null}]'
                + (totals.tail() if self._continuous else self._no_usage)
            )
        if delta.finish_reason is not None:
            event += self._finish(choice, delta.finish_reason, delta.stop)
        return event

    def _role(self, choice: _Choice, delta: Delta) -> bytes:
        said = choice.delta + _ROLE + b',"logprobs":null,"finish_reason":null}]'
        if delta.detail is not None and delta.detail.prompt_token_ids is not None:
            said += b',"prompt_token_ids":' + msgspec.json.encode(delta.detail.prompt_token_ids)
        return said + self._tail()

    def _detailed(self, choice: _Choice, delta: Delta, detail: Detail) -> bytes:
        text, pieces = choice.read(delta.text, ended=delta.finish_reason is not None)
        events = b""
        if detail.reasoning:
            thought = {"reasoning": detail.reasoning, "reasoning_content": detail.reasoning}
            events += self._chunk(choice, thought)
        silent = self._continuous and delta.finish_reason is None and not (events or pieces)
        if text or detail.tokens or silent:
            events += self._chunk(choice, {"content": text}, detail)
        for piece in pieces:
            if piece.name:
                call = {"index": piece.index, **_call(piece.id, piece.name, "")}
                events += self._chunk(choice, {"tool_calls": [call]})
            more = {"index": piece.index, "function": {"arguments": piece.arguments}}
            events += self._chunk(choice, {"tool_calls": [more]})
        return events

    def _chunk(self, choice: _Choice, fields: dict[str, Any], detail: Detail | None = None) -> bytes:
        logprobs, ids = b"null", b""
        if detail is not None and detail.tokens:
            if self._wanted.top_logprobs is not None:
                logprobs = msgspec.json.encode(of_chat(detail.tokens))
            if self._wanted.token_ids:
                ids = b',"token_ids":' + msgspec.json.encode([token.id for token in detail.tokens])
        return (
            choice.delta
            + msgspec.json.encode(fields)
            + b',"logprobs":'
            + logprobs
            + b',"finish_reason":null'
            + ids
            + b"}]"
            + self._tail()
        )

    def _finish(self, choice: _Choice, reason: str, stop: str | int | None) -> bytes:
        """The last chunk of the choice; after the last choice the usage if it was asked for, and the end."""
        last = (
            choice.delta
            + b'{},"logprobs":null,"finish_reason":'
            + msgspec.json.encode(choice.reason(reason))
            + stopped_by(stop)
            + b"}]"
            + self._tail()
        )
        if self._totals.unfinished:
            return last
        if self._final_usage:
            last += self._head + b'],"usage":' + msgspec.json.encode(self._totals.usage()) + b"}\n\n"
        return last + DONE

    def _tail(self) -> bytes:
        return self._totals.tail() if self._continuous else self._no_usage


class WholeChat:
    """One answer that is not streamed."""

    def __init__(
        self,
        wanted: GenerationRequest,
        totals: Totals,
        *,
        request_id: str,
        model: str,
        created: int,
        form: Form = HERMES,
    ) -> None:
        self._wanted = wanted
        self._form = form
        self._totals = totals
        self._answer: dict[str, Any] = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion",
            "created": created,
            "model": model,
        }
        self._deltas: list[list[Delta]] = [[] for _ in range(totals.unfinished)]

    def step(self, at: int, delta: Delta) -> None:
        self._totals.take(at, delta)
        self._deltas[at].append(delta)

    def body(self) -> bytes:
        choices = [self._choice(at, deltas) for at, deltas in enumerate(self._deltas)]
        answer = {**self._answer, "choices": choices, "usage": self._totals.usage()}
        if self._wanted.token_ids:
            answer["prompt_token_ids"] = next(
                (d.detail.prompt_token_ids for d in self._deltas[0] if d.detail is not None), None
            )
        details = [delta.detail for delta in self._deltas[0] if delta.detail is not None]
        scored = next((detail.prompt_logprobs for detail in details if detail.prompt_logprobs), None)
        if scored is not None:
            answer["prompt_logprobs"] = scored
        return msgspec.json.encode(answer)

    def _choice(self, at: int, deltas: list[Delta]) -> dict[str, Any]:
        choice = _Choice(b"", at, self._wanted.tools, self._form)
        details = [delta.detail for delta in deltas if delta.detail is not None]
        reason = deltas[-1].finish_reason or ""
        content, pieces = choice.read("".join(delta.text for delta in deltas), ended=True)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if pieces and not content.strip() else content,
            "refusal": None,
            "annotations": [],
        }
        if reasoning := "".join(detail.reasoning for detail in details):
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if pieces:
            message["tool_calls"] = _whole_calls(pieces)
        told: dict[str, Any] = {
            "index": at,
            "message": message,
            "logprobs": None,
            "finish_reason": choice.reason(reason),
        }
        if deltas[-1].stop is not None:
            told["stop_reason"] = deltas[-1].stop
        tokens = [token for detail in details for token in detail.tokens]
        if self._wanted.top_logprobs is not None:
            told["logprobs"] = of_chat(tokens)
        if self._wanted.token_ids:
            told["token_ids"] = [token.id for token in tokens]
        return told


def stopped_by(stop: str | int | None) -> bytes:
    """The end of a chunk's choice: which stop string or token ended it, as vLLM tells it, where one did."""
    return b"" if stop is None else b',"stop_reason":' + msgspec.json.encode(stop)


_NOTHING = Detail()
_ROLE = b'{"role":"assistant","content":"","refusal":null}'


class _Choice:
    """One choice on its way."""

    def __init__(self, head: bytes, at: int, tools: Tools | None, form: Form) -> None:
        self.delta = head + b'{"index":%d,"delta":' % at
        self.text = self.delta + b'{"content":'
        self.begun = False
        self._named = tools is not None and tools.named is not None
        self.calls = None if tools is None else CallParser(tools, form)

    def read(self, text: str, *, ended: bool) -> tuple[str, list[CallPiece]]:
        """What of the next text is for the reader, and what is of calls."""
        if self.calls is None:
            return text, []
        text, pieces = self.calls.feed(text)
        if ended:
            rest, last = self.calls.flush()
            text, pieces = text + rest, pieces + last
        return text, pieces

    def reason(self, reason: str) -> str:
        """Why it ended, as clients are told. A function that had to be called is no news: `stop`."""
        called = self.calls is not None and self.calls.calls > 0
        return "tool_calls" if called and reason == "stop" and not self._named else reason


def _whole_calls(pieces: list[CallPiece]) -> list[dict[str, Any]]:
    first = [piece for piece in pieces if piece.name]
    written = ["".join(piece.arguments for piece in pieces if piece.index == one.index) for one in first]
    return [_call(one.id, one.name, arguments) for one, arguments in zip(first, written, strict=True)]


def _call(id_: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
