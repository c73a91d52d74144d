"""How much a chat template may do. It is a program that came with the model: transformers runs it in
Jinja's sandbox, which keeps it away from everything, but lets it loop and write as long as it likes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import CO_GENERATOR
from types import CodeType, FrameType
from typing import Any

from jinja2 import Environment
from jinja2.exceptions import TemplateSyntaxError

RENDER_SECONDS = 0.15
"""Of this thread's processor, for a short conversation. A single step, which nobody interrupts, may take
twice as long as all before it took: that of a number which is squared again and again does."""
RENDER_SECONDS_PER_CHARACTER = 0.5e-6
"""More for each that is given: about three times what 4,000 messages take, so that a slow machine renders
them too."""
RENDERED_CHARACTERS = 200_000
"""What a template may write of its own, beside what it is given."""
RENDERED_TIMES = 4
"""How often it may repeat what it is given."""
MEMORY_BYTES = 256 * 1024 * 1024
"""How much the process may grow while it renders."""
GREATEST_NUMBER = 1_000_000
"""Written in a template. Anything larger is there to make something huge in one step."""

_LOOK_SECONDS = 0.01
_FILE = "<template>"
"""What Jinja says is the file of a template's code."""


class RenderLimit(Exception):
    """The template does more than a chat template has to; its message says what."""


def refused_by(template: str) -> str | None:
    """Why a template is not run at all: what would happen within one step, before anybody could look."""
    try:
        tokens = [token for token in Environment(autoescape=True).lex(template) if token[1] != "whitespace"]
    except TemplateSyntaxError:
        return None  # which is told when it is rendered
    for before, (_, kind, text) in zip([(0, "", ""), *tokens], tokens, strict=False):
        if kind == "operator" and text == "**" and before[2] not in ("(", ","):
            return "it computes powers ('**')"
        if kind == "integer" and int(text.replace("_", ""), 0) > GREATEST_NUMBER:
            return f"it has a number above {GREATEST_NUMBER}"
    return None


@contextmanager
def bounded(given_characters: int) -> Iterator[None]:
    """What is rendered within, in this thread, ends with RenderLimit once it takes too long, writes too
    much, or needs too much memory. Looked at line by line of a template: an exception that another thread
    raises here could come too late, and hit somebody else. A single step is not interrupted: one that
    makes something huge has made it before it is looked at."""
    watch = _Watch(
        characters=RENDERED_CHARACTERS + RENDERED_TIMES * given_characters,
        seconds=RENDER_SECONDS + RENDER_SECONDS_PER_CHARACTER * given_characters,
    )
    before = sys.gettrace()
    sys.settrace(watch.enter)
    try:
        yield
    finally:
        sys.settrace(before)


class _Watch:
    def __init__(self, *, characters: int, seconds: float) -> None:
        self._characters = characters
        self._until = time.thread_time() + seconds
        self._memory = 0
        self._next_look = time.perf_counter() + _LOOK_SECONDS
        self._inside = False
        """A template runs: what comes before and after it takes as long as it needs."""

    def enter(self, frame: FrameType, event: str, about: Any) -> Any:
        """Something is called. Only a template's own code is followed line by line; what it calls, filters
        that call something for each item among them, is looked at when it is called."""
        if frame.f_code.co_filename == _FILE:
            self._inside = True
            return self._line
        # Not in anything else that runs in between, a garbage collector's callback say: what is raised there
        # is swallowed.
        if self._inside and frame.f_globals.get("__name__", "").startswith("jinja2."):
            self._look()
        return None

    def _line(self, frame: FrameType, event: str, about: Any) -> Any:
        if event == "return":
            self._handed_out(frame.f_code, about)
        self._look()
        return self._line

    def _handed_out(self, code: CodeType, piece: object) -> None:
        # Generators hand out the pieces of the text; what macros make comes out through them.
        if type(piece) is str and code.co_flags & CO_GENERATOR:
            self._characters -= len(piece)
            if self._characters < 0:
                raise RenderLimit("it writes too much")
        elif piece is None and code.co_name == "root":
            self._inside = False

    def _look(self) -> None:
        now = time.perf_counter()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        if time.thread_time() > self._until:
            raise RenderLimit("it takes too long")
        # What it had before is asked for late: nearly every template is done by then.
        self._memory = self._memory or _resident_bytes() + MEMORY_BYTES
        if _resident_bytes() > self._memory:
            raise RenderLimit("it needs too much memory")


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * _PAGE
    except OSError:  # no Linux: there time and length are looked at, and nothing else
        return 0


_PAGE = os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else 4096
