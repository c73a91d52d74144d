"""What a model said, as output items, and the events that tell of them one by one."""

from __future__ import annotations

from typing import Any

import msgspec

from inference.errors import WorkerBroke
from openai_api.responses.items import item_id

Event = dict[str, Any]


class Output:
    """Takes deltas of a chat completion; a whole message is one delta. Items follow each other: one is done
    when the next begins."""

    def __init__(self, response_id: str, first: int) -> None:
        """`first` is how many input items come before."""
        self.items: list[dict[str, Any]] = []
        self._response_id = response_id
        self._first = first
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []
        """The text, or the arguments, of the item that is open."""
        self._call: int | None = None
        """The chat's index of the call that is open."""
        self._calls: set[int] = set()

    def take(self, delta: Delta, logprobs: Logprobs | None = None) -> list[Event]:
        events: list[Event] = []
        if reasoning := delta.reasoning_content or delta.reasoning:
            self._say(events, "reasoning", _clean(reasoning), [])
        if delta.content:
            self._say(events, "message", _clean(delta.content), logprobs.content or [] if logprobs else [])
        for call in delta.tool_calls or ():
            self._go_on(events, call)
        return events

    def finish(self, status: str) -> list[Event]:
        """Ends what is open; `status` is that of the last item. An answer of nothing is an empty message."""
        events: list[Event] = []
        if not self.items:
            self._say(events, "message", "", [])
        self._close(events, status)
        return events

    def cut(self) -> None:
        """The answer was cut: the item that was open stays as it is."""
        if self._open is not None:
            self._write(self._open)
            self._open["status"] = "incomplete"

    # -- texts

    def _say(self, events: list[Event], kind: str, text: str, logprobs: list[dict[str, Any]]) -> None:
        item = self._open
        if item is None or item["type"] != kind:
            item = self._begin(events, self._new_text(kind))
            item["content"].append(_part(kind))
            events.append(self._of_part("response.content_part.added", part=_part(kind)))
        if not text:
            return
        part = item["content"][0]
        self._pieces.append(text)
        told: Event = {"delta": text}
        if kind == "message":
            part["logprobs"].extend(logprobs)
            told["logprobs"] = logprobs
        events.append(self._of_part(f"response.{part['type']}.delta", **told))

    def _new_text(self, kind: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._next_id(kind), "type": kind, "status": "in_progress"}
        of_kind: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        return item | of_kind | {"content": []}

    def _end_text(self, events: list[Event], item: dict[str, Any]) -> None:
        part = item["content"][0]
        told: Event = {"text": part["text"]}
        if item["type"] == "message":
            told["logprobs"] = part["logprobs"]
        events.append(self._of_part(f"response.{part['type']}.done", **told))
        events.append(self._of_part("response.content_part.done", part=part))

    # -- calls

    def _go_on(self, events: list[Event], call: CallDelta) -> None:
        function = call.function or FunctionDelta()
        item = self._open
        if item is None or item["type"] != "function_call" or call.index != self._call:
            if call.index in self._calls:
                raise WorkerBroke("The worker went back to a function call that was over.")
            self._calls.add(call.index)
            new = {
                "id": self._next_id("function_call"),
                "type": "function_call",
                "status": "in_progress",
                "call_id": call.id or f"call_{self._response_id.removeprefix('resp_')}_{call.index}",
                "name": function.name or "",
                "arguments": "",
            }
            item = self._begin(events, new)
            self._call = call.index
        if function.arguments:
            text = _clean(function.arguments)
            self._pieces.append(text)
            events.append(self._of_item("response.function_call_arguments.delta", delta=text))

    def _end_call(self, events: list[Event], item: dict[str, Any]) -> None:
        told = {"name": item["name"], "arguments": item["arguments"]}
        events.append(self._of_item("response.function_call_arguments.done", **told))

    # -- items

    def _begin(self, events: list[Event], item: dict[str, Any]) -> dict[str, Any]:
        self._close(events, "completed")
        self.items.append(item)
        self._open = item
        self._pieces.clear()
        events.append(
            {
                "type": "response.output_item.added",
                "output_index": len(self.items) - 1,
                "item": {name: list(value) if name == "content" else value for name, value in item.items()},
            }
        )
        return item

    def _close(self, events: list[Event], status: str) -> None:
        item = self._open
        if item is None:
            return
        self._write(item)
        if item["type"] == "function_call":
            self._end_call(events, item)
        else:
            self._end_text(events, item)
        item["status"] = status
        events.append(
            {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": dict(item)}
        )
        self._open = None

    def _write(self, item: dict[str, Any]) -> None:
        text = "".join(self._pieces)
        if item["type"] == "function_call":
            item["arguments"] = text
        else:
            item["content"][0]["text"] = text

    def _next_id(self, kind: str) -> str:
        return item_id(kind, self._response_id, self._first + len(self.items))

    def _of_item(self, kind: str, **told: Any) -> Event:
        item = self.items[-1]
        return {"type": kind, "item_id": item["id"], "output_index": len(self.items) - 1, **told}

    def _of_part(self, kind: str, **told: Any) -> Event:
        return self._of_item(kind, content_index=0, **told)


def _part(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _clean(text: str) -> str:
    """No request can hold NUL, and what was answered is part of the next one. Of the same length."""
    return text.replace("\x00", "\ufffd")


# -- chat completions, as far as they are read here


class FunctionDelta(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class CallDelta(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: FunctionDelta | None = None


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


class Logprobs(msgspec.Struct):
    content: list[dict[str, Any]] | None = None


class Choice(msgspec.Struct):
    delta: Delta | None = None
    message: Delta | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class ChatUsage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None

    def told(self) -> dict[str, Any]:
        """Under the names of /v1/responses."""
        prompt, completion = self.prompt_tokens_details, self.completion_tokens_details
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": (prompt and prompt.cached_tokens) or 0,
                "cache_write_tokens": 0,
            },
            "output_tokens": self.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": (completion and completion.reasoning_tokens) or 0},
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class ChatAnswer(msgspec.Struct):
    """A whole completion, or a chunk."""

    choices: list[Choice] = []
    usage: ChatUsage | None = None


decode_answer = msgspec.json.Decoder(ChatAnswer).decode
