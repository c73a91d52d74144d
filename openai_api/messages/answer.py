"""Chat's answers, whole and streamed, in Anthropic's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from inference.errors import WorkerBroke, WorkerUnreachable
from openai_api.answered import Answered
from openai_api.auth import Key
from openai_api.messages.errors import of_a_stream
from openai_api.messages.request import MessagesRequest


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    function: _Function
    id: str | None = None
    index: int = 0


class _Said(msgspec.Struct):
    """A message, or a delta of one."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None

    @property
    def thought(self) -> str | None:
        return self.reasoning or self.reasoning_content


class _Choice(msgspec.Struct):
    message: _Said = msgspec.field(default_factory=_Said)
    delta: _Said = msgspec.field(default_factory=_Said)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    """Which stop string ended it, where the engine says so."""


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Chat(msgspec.Struct):
    """A completion, or a chunk of one."""

    choices: list[_Choice]
    usage: _Usage | None = None


class _Failed(msgspec.Struct):
    error: dict[str, Any]


_decode_chat = msgspec.json.Decoder(_Chat).decode
_decode_failed = msgspec.json.Decoder(_Failed).decode
_decode_object = msgspec.json.Decoder(dict[str, Any]).decode

_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}


class Messages:
    """Passes an answer on to `answered`: see `Answered`."""

    def __init__(self, answered: Answered, call: MessagesRequest, key: Key, request_id: str) -> None:
        self._answered = answered
        self._call = call
        self._id = f"msg_{request_id.removeprefix('req_')}"
        self._blocks = 0
        """How many were begun; the last may be open."""
        self._open: tuple[str, int] | None = None
        """Type of the open block, and for a tool its index in chat's deltas."""
        self._used_tools = False
        self._finish: _Choice | None = None
        self._usage = _Usage()

    @property
    def client_gone(self) -> bool:
        return self._answered.client_gone

    async def send_json(self, status: int, payload: object) -> None:
        try:
            chat = _decode_chat(payload if isinstance(payload, bytes) else msgspec.json.encode(payload))
            (choice,) = chat.choices
            content = _blocks(choice.message)
        except ValueError as error:
            raise WorkerUnreachable("A worker's answer is no chat completion.") from error
        whole = self._message(chat.usage or _Usage()) | {"content": content}
        used_tools = any(block["type"] == "tool_use" for block in content)
        await self._answered.send_json(status, whole | self._stopped(choice, used_tools))

    async def stream_start(self, prompt_tokens: int = 0) -> None:
        await self._answered.stream_start()
        begun = self._message(_Usage(prompt_tokens=prompt_tokens))
        await self._answered.stream_events([_event("message_start", message=begun)])

    async def stream_events(self, events: Sequence[bytes]) -> None:
        said = b"".join(map(self._read, events))
        if said:
            await self._answered.stream_events([said])

    async def stream_end(self, chunk: bytes = b"") -> None:
        if chunk.startswith(b'data: {"error"'):
            failed = _decode_failed(chunk[len(b"data: ") :])
            payload = msgspec.json.encode(of_a_stream(failed.error))
            await self._answered.stream_end(b"event: error\ndata: " + payload + b"\n\n")
            return
        stopped = self._stopped(self._finish or _Choice(), self._used_tools)
        events = self._close()
        events += _event("message_delta", delta=stopped, usage=_usage(self._usage))
        await self._answered.stream_end(events + _event("message_stop"))

    def _read(self, event: bytes) -> bytes:
        try:
            chat = _decode_chat(event[len(b"data: ") :])
        except ValueError as error:
            raise WorkerBroke("A worker sent a chunk of something else.") from error
        self._usage = chat.usage or self._usage
        events = b""
        for choice in chat.choices:
            events += self._said(choice.delta)
            if choice.finish_reason is not None:
                self._finish = choice
        return events

    def _message(self, usage: _Usage) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._call.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage),
        }

    def _stopped(self, choice: _Choice, used_tools: bool) -> dict[str, Any]:
        reason, sequence = _REASONS.get(choice.finish_reason or "", "end_turn"), None
        if used_tools and reason == "end_turn":
            # A tool that was demanded by its name ends with chat's "stop".
            reason = "tool_use"
        elif isinstance(choice.stop_reason, str) and choice.stop_reason in (self._call.stop_sequences or ()):
            reason, sequence = "stop_sequence", choice.stop_reason
        return {"stop_reason": reason, "stop_sequence": sequence}

    # -- the blocks of a stream

    def _said(self, delta: _Said) -> bytes:
        events = b""
        if delta.thought:
            events += self._begin(("thinking", 0), {"type": "thinking", "thinking": "", "signature": ""})
            events += self._delta({"type": "thinking_delta", "thinking": delta.thought})
        if delta.content:
            events += self._begin(("text", 0), {"type": "text", "text": ""})
            events += self._delta({"type": "text_delta", "text": delta.content})
        for call in delta.tool_calls or ():
            if call.function.name is not None:
                block = {"type": "tool_use", "id": call.id, "name": call.function.name}
                events += self._begin(("tool_use", call.index), block | {"input": {}})
                self._used_tools = True
            elif self._open != ("tool_use", call.index):
                raise WorkerBroke("A worker sent arguments of a tool call that is not open.")
            if call.function.arguments:
                events += self._delta({"type": "input_json_delta", "partial_json": call.function.arguments})
        return events

    def _begin(self, kind: tuple[str, int], block: dict[str, Any]) -> bytes:
        if self._open == kind:
            return b""
        closed = self._close()
        self._open = kind
        self._blocks += 1
        return closed + _event("content_block_start", index=self._blocks - 1, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event("content_block_stop", index=self._blocks - 1)


def _blocks(said: _Said) -> list[dict[str, Any]]:
    """A whole message's content. Raises ValueError for a tool call that is none."""
    blocks: list[dict[str, Any]] = []
    if said.thought:
        blocks.append({"type": "thinking", "thinking": said.thought, "signature": ""})
    if said.content:
        blocks.append({"type": "text", "text": said.content})
    for call in said.tool_calls or ():
        used = {"type": "tool_use", "id": call.id, "name": call.function.name}
        blocks.append(used | {"input": _input(call.function.arguments or "{}")})
    return blocks


def _input(arguments: str) -> dict[str, Any]:
    """A tool's arguments as an object. What the model did not finish, or wrote wrong, is handed on as it is,
    under a name that no tool takes for its own."""
    try:
        return _decode_object(arguments)
    except ValueError:
        return {"raw_arguments": arguments}


def _usage(usage: _Usage) -> dict[str, int]:
    """Anthropic counts what came from a cache beside the input, not within it."""
    details = usage.prompt_tokens_details
    cached = (details.cached_tokens if details is not None else None) or 0
    return {
        "input_tokens": usage.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion_tokens,
    }


def _event(kind: str, **fields: Any) -> bytes:
    payload = msgspec.json.encode({"type": kind, **fields})
    return b"event: " + kind.encode() + b"\ndata: " + payload + b"\n\n"


class _Count(msgspec.Struct):
    count: int


_decode_count = msgspec.json.Decoder(_Count).decode


def as_count(answer: bytes) -> bytes:
    """The answer to count_tokens. Raises msgspec.DecodeError for what is no tokenization."""
    return msgspec.json.encode({"input_tokens": _decode_count(answer).count})
