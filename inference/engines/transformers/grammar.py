"""Texts that must have a form: which tokens may come next, step by step.

llguidance follows the text. What a client sends is compiled off the event loop and within bounds, in a
child process first (`trial`); following it is bounded by llguidance's own limits for a step and by a purse
of seconds for the whole answer. Whoever exceeds them ends alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, cast

import msgspec
import numpy
import torch
from llguidance import LLMatcher, LLTokenizer

from inference.engines.base import EngineError
from inference.engines.reasoning import CLOSE
from inference.engines.transformers.lark import refusal
from inference.engines.transformers.trial import (
    COMPILE_SECONDS,
    LENGTH,
    CannotCompile,
    Vocabulary,
    compile_grammar,
    framed,
    read,
)

KEPT = 256
"""Compiled grammars, and refusals, that are remembered."""
START_SECONDS = 60.0
PURSE_SECONDS = 1.0
"""What following one answer's form may take altogether, beside `STEP_SECONDS` for each token."""
STEP_SECONDS = 0.005

_PACKAGES = str(Path(__file__).resolve().parents[3])
_PASSED_ON = ("PATH", "HOME", "LD_LIBRARY_PATH")
"""Of the environment; secrets are not where a client's text is worked on."""


class Thinking:
    """How far thoughts before the text are: their tokens are free, and their end begins the form.

    `opens`: the token that begins them, if the text may begin with it; None: it begins within them.
    """

    def __init__(self, opens: int | None) -> None:
        self.opens = opens
        self.inside = opens is None
        self._tail = b""

    def take(self, token_id: int, raw: bytes) -> bool:
        """Whether the form is still to begin after this token."""
        if not self.inside:
            self.inside = token_id == self.opens
            return self.inside
        self._tail = (self._tail + raw)[-64:]
        self.inside = CLOSE.encode() not in self._tail
        return True


class Grammar:
    """The form of one request's text, as the batching thread follows it. See `sampling.Grammar`."""

    def __init__(
        self,
        matcher: LLMatcher,
        tokenizer: LLTokenizer,
        *,
        ends: Sequence[int],
        param: str | None,
        thinking: Thinking | None,
    ) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._ends = list(ends)
        self._param = param
        self._thinking = thinking
        self._purse = PURSE_SECONDS

    def fill_mask(self, logits_row: torch.Tensor) -> None:
        """Raises BadRequest when following the form takes too much."""
        thinking = self._thinking
        if thinking is not None and thinking.inside:
            # An answer that ended here would not have its form.
            logits_row[self._ends] = -torch.inf
            return
        free = None if thinking is None or thinking.opens is None else logits_row[thinking.opens].clone()
        began = time.thread_time()  # others that the processor does meanwhile are not its cost
        bits = self._matcher.compute_bitmask()
        self._purse -= time.thread_time() - began - STEP_SECONDS
        if self._purse < 0 or self._matcher.is_error():
            self._refuse()
        allowed = numpy.unpackbits(
            numpy.frombuffer(bits, numpy.uint8), count=logits_row.shape[-1], bitorder="little"
        ).view(numpy.bool_)
        if logits_row.is_cpu and logits_row.dtype == torch.float32:
            # torch would share this out among threads, and waiting for them takes longer than the work.
            numpy.copyto(logits_row.numpy(), -numpy.inf, where=~allowed)
        else:
            logits_row.masked_fill_(torch.from_numpy(~allowed).to(logits_row.device), -torch.inf)
        if thinking is not None and free is not None:
            logits_row[thinking.opens] = free

    def accept(self, token: int) -> None:
        """Raises BadRequest when following the form takes too much."""
        if self._thinking is not None:
            if self._thinking.take(token, self._tokenizer.decode_bytes([token])):
                return
            self._thinking = None
        if not self._matcher.consume_token(token):
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise refusal("it takes too much to follow", self._param)


class Grammars:
    """Compiles grammars for one model. Belongs to the event loop.

    Raises ValueError for a tokenizer that llguidance does not know, or a model whose answers have no end.
    Making it takes a third of a second: do it in a thread.
    """

    def __init__(self, tokenizer: str, *, size: int, ends: Sequence[int]) -> None:
        if not ends:
            raise ValueError("no token ends an answer")
        self._vocabulary = Vocabulary(tokenizer=tokenizer, size=size, ends=list(ends))
        self.tokenizer = read(self._vocabulary)
        self._known: OrderedDict[str, LLMatcher | CannotCompile] = OrderedDict()
        self._one = asyncio.Lock()
        self._trial = _Trial(self._vocabulary)

    async def compile(self, grammar: str, *, param: str | None, thinking: Thinking | None) -> Grammar:
        """For one request. Raises CannotCompile."""
        found = self._known.get(grammar)
        if found is None:
            async with self._one:
                found = self._known.get(grammar) or await self._compiled(grammar)
                self._known[grammar] = found
                if len(self._known) > KEPT:
                    self._known.popitem(last=False)
        self._known.move_to_end(grammar)
        if isinstance(found, CannotCompile):
            raise found
        return Grammar(
            found.deep_copy(), self.tokenizer, ends=self._vocabulary.ends, param=param, thinking=thinking
        )

    async def _compiled(self, grammar: str) -> LLMatcher | CannotCompile:
        try:
            await self._trial.of(grammar)
            return await asyncio.to_thread(compile_grammar, self.tokenizer, grammar)
        except CannotCompile as refused:
            return refused

    async def close(self) -> None:
        await self._trial.end()


class _Trial:
    """The child that compiles first. Started when it is needed, and again after it was killed."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._child: asyncio.subprocess.Process | None = None
        self._environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}

    async def of(self, grammar: str) -> None:
        """Raises CannotCompile."""
        if self._child is None:
            await self._start()
        try:
            reason = await self._ask(grammar.encode(), COMPILE_SECONDS)
        except TimeoutError:
            raise CannotCompile(f"it takes more than {COMPILE_SECONDS:g} s to compile") from None
        except (EOFError, ConnectionError):
            raise CannotCompile("it takes too much to compile") from None
        if reason is not None:
            raise CannotCompile(reason)

    async def _start(self) -> None:
        self._child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "inference.engines.transformers.trial"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # a panic would tell of what a client sent
            env=self._environment | {"PYTHONPATH": _PACKAGES},
        )
        try:
            await self._ask(msgspec.json.encode(self._vocabulary), START_SECONDS)
        except (TimeoutError, EOFError, ConnectionError) as error:
            raise EngineError("The process that compiles grammars does not start.") from error

    async def _ask(self, content: bytes, seconds: float) -> str | None:
        answered = False
        child = cast(asyncio.subprocess.Process, self._child)
        to, back = cast(asyncio.StreamWriter, child.stdin), cast(asyncio.StreamReader, child.stdout)
        try:
            async with asyncio.timeout(seconds):
                to.write(framed(content))
                await to.drain()
                (length,) = LENGTH.unpack(await back.readexactly(LENGTH.size))
                reason = msgspec.json.decode(await back.readexactly(length), type=str | None)
            answered = True
            return reason
        finally:
            if not answered:  # also when nobody waits for it any longer
                self._kill()

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()

    async def end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
