"""An engine without a model: deterministic words at a given pace, and faults on request.

It is what tests, demonstrations, drills and the benchmark run on; everything around it is the same
as around a real engine.

A token is one word; a token id of a prompt is one of 32768, and each means a word. `prompt_tokens` is
the number of whitespace-separated words in all messages, or in the prompt, at least 1. The answer
depends on these alone, and on which sample it is: sampling fields are accepted and change nothing,
except `max_tokens`, `stop` and `ignore_eos`, which are honoured.

A tool that must be called is called with arguments that its schema allows; one that may be called is
when the last message is a user's and names it or, after a first word like `get`, what it is about:
"the weather" means `get_weather`. An answer that must have a form is the first choice, or a value that
the schema allows. In arguments and values are what the last message quotes and the numbers it says, as
far as the schema has a place for them; where any object will do, what it quotes are the names.
`reasoning_effort` gives thoughts before the answer, more for more of it.

Deployment arguments (`SimulatedArguments`):

    token_seconds       seconds per token; 0: as fast as possible
    tokens_per_second   the same the other way round; give one of the two
    load_seconds        how long loading takes
    text                the answer; without it, words chosen by a digest of the messages
    tokens              length of the answer, 16; a given `text` has its own length
    context_length      most tokens of prompt and answer together, 8192
    fail_load           a cause ("out_of_memory", "missing_file", …): loading fails with it

A last user message, or a prompt, that begins with `!` is a list of commands. N is how many tokens are
given first:

    !tokens N     answer with N tokens
    !slow S       S seconds per token
    !crash [N]    the process ends at once, as by a bug
    !oom [N]      the process ends as one does that ran out of device memory
    !hang [N]     no step is made any more, for no request, as long as this one is open
    !cut [N]      the answer ends without a finish reason
    !error [N]    the engine fails this request and lives on
    !sick [N]     the engine fails this request and can never answer again
    !think [N]    N tokens of reasoning before the answer, 8
    !tool NAME    call this tool
    !say WORD     an answer of this word alone, again and again
    !garbage      an answer of text that breaks careless relays: framing, quotes, controls, markup

For example `!tokens 40 !slow 0.2 !crash 10`. Words that are no command are ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from inference.engines.base import (
    PLAIN,
    Delta,
    EngineError,
    EngineSpec,
    GenerationRequest,
    LoadError,
    Template,
    check_token_ids,
    too_long,
)
from inference.engines.simulated_forms import formed_text
from inference.engines.simulated_words import (
    VOCABULARY_SIZE,
    Telling,
    after,
    digest,
    echoed,
    lorem,
    split,
    text_of,
    token_id,
)
from inference.engines.stops import StopStrings
from inference.engines.tool_forms import HERMES
from inference.protocol import Cause, Load, Progress

_GARBAGE = (
    "\n\n",
    "data: [DONE]\n\n",
    'data: {"error":{"message":"not an error"}}\n\n',
    '"}]}\r\n',
    "\x00\x1b[31m\x7f",
    "\u2028\u2029\ufeff\u202e",
    "\U0001f682\u0301",
    "<script>alert(1)</script>",
    "\\u0022\\",
    ',"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}}',
    "x" * 100_000,
)

_LOAD_STEPS = 20
_CRASH_EXIT = 13
_THOUGHTS = {"minimal": 2, "low": 4, "medium": 8, "high": 16, "xhigh": 32, "max": 64}
_COUNTED = frozenset({"crash", "oom", "hang", "cut", "error", "sick"})

_Duration = Annotated[float, msgspec.Meta(ge=0, le=3600)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]


class SimulatedArguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The arguments of a deployment; see the module's text."""

    token_seconds: _Duration | None = None
    tokens_per_second: Annotated[float, msgspec.Meta(gt=0)] | None = None
    load_seconds: _Duration = 0.0
    text: str | None = None
    tokens: _Count = 16
    context_length: _Count = 8192
    fail_load: Cause | None = None

    def pace(self) -> float:
        if self.token_seconds is not None:
            return self.token_seconds
        return 1 / self.tokens_per_second if self.tokens_per_second else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Script:
    """What one request's commands ask for."""

    tokens: int | None = None
    token_seconds: float | None = None
    garbage: bool = False
    think: int | None = None
    tool: str | None = None
    say: str | None = None
    fault: str | None = None
    fault_at: int = 0


class SimulatedEngine:
    tool_form = HERMES
    capabilities = frozenset(
        {
            "temperature",
            "top_p",
            "top_k",
            "stop",
            "ignore_eos",
            "seed",
            "frequency_penalty",
            "presence_penalty",
            "n",
            "echo",
            "logprobs",
            "top_logprobs",
            "return_token_ids",
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "response_format",
            "structured_outputs",
            "reasoning_effort",
            "continue_final_message",
            "add_generation_prompt",
            "endpoint:chat",
            "endpoint:completions",
            "endpoint:tokenize",
        }
    )

    def __init__(self, spec: EngineSpec) -> None:
        try:
            self._arguments = msgspec.convert(spec.arguments, SimulatedArguments)
        except msgspec.ValidationError as error:
            raise LoadError(
                Cause.BAD_ARGUMENT, f"The simulated engine refuses its arguments: {error}."
            ) from None
        if self._arguments.token_seconds is not None and self._arguments.tokens_per_second is not None:
            raise LoadError(
                Cause.BAD_ARGUMENT,
                "The simulated engine takes either token_seconds or tokens_per_second, not both.",
            )
        self.context_length = self._arguments.context_length
        self._running = 0
        self._steps = 0
        self._tokens = 0
        self._hanging = 0
        self._moving = asyncio.Event()
        self._moving.set()
        self._healthy = True

    async def load(self, progress: Callable[[Progress], None]) -> None:
        for step in range(_LOAD_STEPS if self._arguments.load_seconds else 0):
            progress(Progress(step="load", done=step, total=_LOAD_STEPS, unit="tensors"))
            await asyncio.sleep(self._arguments.load_seconds / _LOAD_STEPS)
        if self._arguments.fail_load is not None:
            raise LoadError(
                self._arguments.fail_load, f"Loading failed with {self._arguments.fail_load}, as asked."
            )
        progress(Progress(step="load", done=_LOAD_STEPS, total=_LOAD_STEPS, unit="tensors"))

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        if not self._healthy:
            raise EngineError("The engine has failed and answers no more.")
        text = None if request.prompt is None else _text_of(request.prompt)
        messages = request.messages if text is None else [{"role": "user", "content": text}]
        prompt = max(1, sum(len(str(message.get("content") or "").split()) for message in messages))
        room = self.context_length - prompt
        if room < 1:
            raise too_long(self.context_length, prompt, request)
        if text is not None and (request.echo or request.sampling.max_tokens == 0):
            ended = "length" if request.sampling.max_tokens == 0 else None
            yield Delta(
                text=text if request.echo else "",
                prompt_tokens=prompt,
                completion_tokens=0,
                finish_reason=ended,
                detail=echoed(request, text) if request.echo else None,
            )
            if ended is not None:
                return
        self._running += 1
        try:
            async with contextlib.aclosing(self._answer(request, messages, prompt, room)) as answer:
                async for delta in answer:
                    yield delta
        finally:
            self._running -= 1

    async def _answer(
        self, request: GenerationRequest, messages: list[dict[str, Any]], prompt: int, room: int
    ) -> AsyncGenerator[Delta, None]:
        begun = ""
        if request.template.continued:
            begun = str(messages[-1].get("content") or "")
            messages = messages[:-1]
        script = _read_script(messages)
        words, natural = self._words(request, messages, script)
        if begun:
            words, said = after(words, len(begun))
            natural = max(1, natural - said)
        thoughts = _THOUGHTS.get(request.reasoning_effort or "", 0) if script.think is None else script.think
        if thoughts:
            words = itertools.chain(itertools.islice(lorem(b"thoughts"), thoughts), words)
            natural += thoughts
        limit = min(room, request.sampling.max_tokens or room)
        if request.sampling.ignore_eos:
            natural = limit
            ending = "length"
        else:
            ending = "length" if limit < natural else "stop"
        length = min(natural, limit)
        telling = Telling(request, messages, thoughts)
        pace = self._arguments.pace() if script.token_seconds is None else script.token_seconds
        started = time.monotonic()
        self._steps += 1  # the prompt is one step
        stops = StopStrings(request.sampling.stop)
        for count in range(1, length + 1):
            if script.fault is not None and count == script.fault_at + 1:
                if script.fault == "cut":
                    return
                await self._fail(script.fault)
            # The schedule is absolute: a late token does not make all later ones late.
            await asyncio.sleep(max(0.0, started + count * pace - time.monotonic()))
            await self._moving.wait()
            self._steps += 1
            self._tokens += 1
            word = next(words)
            text = stops.feed(word) if count > thoughts else ""
            if count == length and stops.met is None:
                text += stops.flush()
            finish = "stop" if stops.met is not None else ending if count == length else None
            yield Delta(
                text=text,
                prompt_tokens=prompt,
                completion_tokens=count,
                finish_reason=finish,
                stop=stops.met,
                detail=telling.of(count, word, text) if telling.needed else None,
            )
            if finish is not None:
                return

    def _words(
        self, request: GenerationRequest, messages: list[dict[str, Any]], script: _Script
    ) -> tuple[Iterator[str], int]:
        """The answer, going on for ever, and how many tokens it has when nothing else ends it."""
        formed = formed_text(request, script.tool)
        if script.say is not None and formed is None:
            return itertools.chain([script.say], itertools.repeat(f" {script.say}")), (
                script.tokens or self._arguments.tokens
            )
        if script.garbage and formed is None:
            return itertools.cycle(_GARBAGE), script.tokens or len(_GARBAGE)
        given = split((self._arguments.text or "").rstrip() if formed is None else formed)
        if given:
            rest = itertools.cycle([word if word[0].isspace() else f" {word}" for word in given])
            natural = len(given) if formed is not None else script.tokens or len(given)
            return itertools.chain(given, itertools.islice(rest, len(given), None)), natural
        return lorem(digest(messages, request.sample)), script.tokens or self._arguments.tokens

    async def _fail(self, fault: str) -> None:
        if fault == "crash":
            os._exit(_CRASH_EXIT)
        if fault == "oom":
            sys.stderr.write("OutOfMemoryError: simulated device out of memory, as asked.\n")
            sys.stderr.flush()
            os._exit(1)
        if fault == "hang":
            self._hanging += 1
            self._moving.clear()
            try:
                await asyncio.Event().wait()
            finally:
                self._hanging -= 1
                if not self._hanging:
                    self._moving.set()
        if fault == "sick":
            self._healthy = False
        raise EngineError("The engine failed, as asked.")

    def load_report(self) -> Load:
        return Load(
            running=self._running,
            kv_use=0.0,
            steps=self._steps,
            tokens=self._tokens,
        )

    def healthy(self) -> bool:
        return self._healthy

    async def close(self) -> None:
        """Nothing to give back."""

    async def tokenize(
        self,
        prompt: str | list[dict[str, Any]],
        *,
        special_tokens: bool,
        template: Template = PLAIN,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[tuple[int, str]]:
        """There are no special tokens, and no words around messages."""
        if not isinstance(prompt, str):
            prompt = " ".join(str(message.get("content") or "") for message in prompt)
        return [(token_id(word), word) for word in prompt.split()]

    async def detokenize(self, tokens: list[int]) -> str:
        check_token_ids(tokens, VOCABULARY_SIZE, param="tokens")
        return text_of(tokens)


def _text_of(prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    check_token_ids(prompt, VOCABULARY_SIZE)
    return text_of(prompt)


def _read_script(messages: list[dict[str, Any]]) -> _Script:
    said = next((str(m.get("content") or "") for m in reversed(messages) if m.get("role") == "user"), "")
    if not said.startswith("!"):
        return _Script()
    found: dict[str, Any] = {}
    words = said.split()
    for at, word in enumerate(words):
        name = word[1:] if word.startswith("!") else ""
        value = _number(words[at + 1]) if at + 1 < len(words) else None
        if name == "tokens" and value:
            found["tokens"] = max(1, int(value))
        elif name == "slow" and value is not None:
            found["token_seconds"] = value
        elif name == "garbage":
            found["garbage"] = True
        elif name == "think":
            found["think"] = 8 if value is None else int(value)
        elif name in ("tool", "say"):
            found[name] = words[at + 1] if at + 1 < len(words) else None
        elif name in _COUNTED:
            found.update(fault=name, fault_at=int(value or 0))
    return _Script(**found)


def _number(word: str) -> float | None:
    return float(word) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", word) else None
