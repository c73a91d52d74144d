"""What one request has cost so far, by its workers' own count."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from inference.errors import WorkerBroke
from openai_api.continuation import Said, usage_of
from registry.spool import Entry

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class _PromptDetails(msgspec.Struct):
    cached_tokens: _Count | None = None


class Usage(msgspec.Struct):
    """As workers tell it."""

    prompt_tokens: _Count = 0
    completion_tokens: _Count = 0
    total_tokens: _Count = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Answer(msgspec.Struct):
    usage: Usage


class Counts:
    """Counts one request's tokens before its client sees them, over all workers that have a part in its
    answer, and tells the ledger's entry."""

    __slots__ = ("_before", "cached", "completion", "entry", "prompt")

    def __init__(self) -> None:
        self.prompt = 0
        self.cached = 0
        self.completion = 0
        self.entry: Entry | None = None
        """The ledger's, once it is open."""
        self._before: tuple[int, int] | None = None
        """Prompt and completion tokens when the last worker broke off; None while the first one answers."""

    @property
    def goes_on(self) -> bool:
        """Does another worker go on with the answer of one that broke off?"""
        return self._before is not None

    def go_on(self) -> None:
        """A worker broke off: what the next one counts comes on top, but for the prompt."""
        self._before = self.prompt, self.completion

    def add(self, prompt: int, completion: int, cached: int = 0) -> None:
        """What the present worker has counted. Never less than before: what a client has seen is paid for."""
        if self._before is not None:
            prompt, completion = self._before[0] or prompt, self._before[1] + completion
        self.prompt = max(self.prompt, prompt)
        self.completion = max(self.completion, completion)
        self.cached = min(max(self.cached, cached), self.prompt)
        self._tell()

    def add_usage(self, usage: Usage) -> None:
        """The same, as the worker told it."""
        details = usage.prompt_tokens_details
        # Some rerankers tell the sum only.
        prompt = usage.prompt_tokens or max(0, usage.total_tokens - usage.completion_tokens)
        cached = details.cached_tokens if details is not None and not self.goes_on else None
        self.add(prompt, usage.completion_tokens, cached or 0)

    def taken_from(
        self, events: list[bytes], said: Said, shows_usage: bool
    ) -> tuple[list[bytes], WorkerBroke | None]:
        """Events for the client, which `said` hears of too, and what broke the answer off behind them. Each
        event of the worker carries the usage so far as its last key, which is counted, and cut off without
        parsing."""
        told: list[bytes] = []
        broke = None
        usage_instead = b',"usage":null}\n\n' if shows_usage else b"}\n\n"
        earlier, written = self._before or (0, 0)
        try:
            for event in events:
                at = event.rfind(b',"usage":{')
                tail = _match_tail(event, at) if at > 0 else None
                if tail is None:
                    if (other := self._taken_from_other(event, said, shows_usage)) is not None:
                        told.append(other)
                    continue
                prompt, completion = earlier or int(tail[1]), written + int(tail[2])
                if completion >= self.completion:  # else its abort has told more in the meantime
                    self.prompt, self.completion = prompt, completion
                if not event.endswith(_NO_CHOICES, 0, at):
                    told.append(event[:at] + usage_instead)
                    said.add(event)
                    continue
                if not earlier and (cached := _CACHED.search(event, at)):
                    self.cached = min(int(cached[1]), self.prompt)
                if shows_usage:
                    told.append((said.usage(prompt, completion) if earlier else event) + b"\n\n")
        except WorkerBroke as error:
            broke = error
        self._tell()
        return told, broke

    def _taken_from_other(self, event: bytes, said: Said, shows_usage: bool) -> bytes | None:
        """An event whose usage is not where ours puts it: taken apart and put together again."""
        if is_error(event):
            raise WorkerBroke("The worker reported an error in mid-answer.")
        try:
            chunk = msgspec.json.decode(event[len(b"data: ") :])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise WorkerBroke("The worker sent an event that is not JSON.") from error
        if not isinstance(chunk, dict) or chunk.get("error"):
            raise WorkerBroke("The worker sent an event that is no chunk.")
        usage = chunk.pop("usage", None)
        if usage is not None:
            try:
                self.add_usage(msgspec.convert(usage, Usage))
            except msgspec.ValidationError as error:
                raise WorkerBroke("The worker sent a usage that is none.") from error
            if not chunk.get("choices"):
                if not shows_usage:
                    return None
                if self.goes_on:
                    usage = usage_of(self.prompt, self.completion)
                chunk["usage"] = usage
        if shows_usage:
            chunk.setdefault("usage", None)
        if chunk.get("choices"):
            said.add(event)
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    def _tell(self) -> None:
        if self.entry is not None:
            self.entry.count(
                prompt_tokens=self.prompt, completion_tokens=self.completion, cached_tokens=self.cached
            )


def usage_in(answer: bytes) -> Usage:
    """Of a whole answer. Raises msgspec.DecodeError or UnicodeDecodeError."""
    return _decode_answer(answer).usage


def prompt_tokens_in(event: bytes) -> int:
    """What a stream's event says that the prompt has; 0 where it does not say so in our own engines' way."""
    tail = _TAIL.search(event)
    return 0 if tail is None else int(tail[1])


def is_error(event: bytes) -> bool:
    """Does a stream's event tell of an error instead of an answer?"""
    return event.startswith(b'data: {"error"')


_decode_answer = msgspec.json.Decoder(_Answer).decode
_NO_CHOICES = b'"choices":[]'
_TAIL = re.compile(
    rb',"usage":\{"prompt_tokens":(\d{1,9}),(?:"total_tokens":\d+,)?"completion_tokens":(\d{1,9})'
    rb"[^{}]*(?:\{[^{}]*\}[^{}]*)*\}\}\Z"
)
"""How workers end a chunk. Within a JSON string the quotes would be escaped, so this cannot be text."""
_match_tail = _TAIL.match
_CACHED = re.compile(rb'"cached_tokens":(\d{1,9})')
