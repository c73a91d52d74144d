"""How far vLLM is while it starts, from what it prints: it answers nobody until it is done."""

from __future__ import annotations

import re

from inference.protocol import Progress

_SHARDS = re.compile(r"checkpoint shards:\s+\d+% Completed \| (\d+)/(\d+)")
_GRAPHS = re.compile(r"Capturing CUDA graphs[^|]*\|[^|]*\| (\d+)/(\d+)")
_STEPS = (
    ("Starting to load model", "loading the weights"),
    ("Model loading took", "measuring memory"),
    ("Loading weights took", "measuring memory"),
    ("torch.compile", "compiling"),
    ("Graph capturing finished", "warming up"),
    ("Warming up model", "warming up"),
    ("init engine (", "starting the server"),
)
_END = re.compile(r"[\r\n]")


class ProgressReader:
    """Hears what vLLM prints, in pieces of any length."""

    def __init__(self) -> None:
        self._part = ""
        self._told: Progress | None = None

    def hear(self, text: str) -> Progress | None:
        """How far it is now, when that is news."""
        *lines, self._part = _END.split(self._part + text)
        # A bar rewrites its line, and the last one has no end yet.
        self._part = self._part[-4000:]
        news = None
        for line in lines:
            news = self._read(line) or news
        if news is None or news == self._told:
            return None
        self._told = news
        return news

    def _read(self, line: str) -> Progress | None:
        if shards := _SHARDS.search(line):
            return Progress(
                step="loading the weights", done=int(shards[1]), total=int(shards[2]), unit="files"
            )
        if graphs := _GRAPHS.search(line):
            return Progress(step="capturing graphs", done=int(graphs[1]), total=int(graphs[2]), unit="graphs")
        return next((Progress(step=step) for words, step in _STEPS if words in line), None)
