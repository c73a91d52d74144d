"""Compiling a grammar; as a program, a process of its own to try that in.

llguidance bounds nearly all that it does, but a few schemas take it hours and many gigabytes, and it
cannot be interrupted. So whatever a client sends is compiled in a child first, which is killed when it takes
too long or too much. Frames of JSON, each after its length in four bytes: first `Vocabulary`, then grammars;
each is answered by the reason why it cannot be used, or null.
"""

from __future__ import annotations

import resource
import struct
import sys
import time
from typing import BinaryIO

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

COMPILE_SECONDS = 2.0
MEMORY_BYTES = 1024**3
"""Beyond what the vocabulary takes."""

LENGTH = struct.Struct("!I")

_LIMITS = LLParserLimits(
    max_lexer_states=30_000,  # about 1 kB each, for each request
    max_grammar_size=200_000,
    # A step goes on with others' tokens waiting: at most some tens of milliseconds.
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    verbose_errors=False,
)


class Vocabulary(msgspec.Struct):
    """What a grammar's text is made of."""

    tokenizer: str
    """The `tokenizer.json`."""
    size: int
    ends: list[int]


class CannotCompile(Exception):
    """Its message says why, in words for the client."""


def read(vocabulary: Vocabulary) -> LLTokenizer:
    """Takes a third of a second for 50,000 tokens. Raises ValueError for a tokenizer it does not know."""
    return LLTokenizer(vocabulary.tokenizer, n_vocab=vocabulary.size, eos_token=vocabulary.ends)


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Ready for the first token; raises CannotCompile."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise CannotCompile(_reason(matcher.get_error()))
    return matcher


def _reason(error: str) -> str:
    if error.startswith("NoExtension"):
        return "no text has this form"
    lines = [line.strip() for line in error.splitlines() if line.strip() not in ("", "<non-verbose/>")]
    # Of an error in a regex, the last such line says what it is.
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[0] if lines else "")
    return said.removeprefix("error: ")[:300].rstrip(".") or "it cannot be compiled"


def _frame(stream: BinaryIO) -> bytes | None:
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return stream.read(LENGTH.unpack(head)[0])


def framed(content: bytes) -> bytes:
    return LENGTH.pack(len(content)) + content


def main() -> None:
    first = _frame(sys.stdin.buffer)
    if first is None:
        return
    tokenizer = read(msgspec.json.decode(first, type=Vocabulary))
    _limit_memory()
    _answer(None)
    while (grammar := _frame(sys.stdin.buffer)) is not None:
        # Should nobody be left to kill it.
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + COMPILE_SECONDS) + 2, -1))
        try:
            compile_grammar(tokenizer, grammar.decode())
        except CannotCompile as error:
            _answer(str(error))
        else:
            _answer(None)


def _limit_memory() -> None:
    try:
        with open("/proc/self/statm", "rb") as statm:
            now = int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:  # no Linux: there time is looked at, and nothing else
        return
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, -1))


def _answer(reason: str | None) -> None:
    sys.stdout.buffer.write(framed(msgspec.json.encode(reason)))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
