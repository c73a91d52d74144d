"""Ending a text at the first stop string, without ever showing a part of one."""

from __future__ import annotations


class StopStrings:
    """Feed it text as it comes; it gives back what may be shown and says when a stop string was met.

    Text that could be the beginning of a stop string is held until it is clear that it is not. `include`:
    the stop string is shown.
    """

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        self._include = include
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.met: str | None = None
        """The stop string that ended the text."""

    def feed(self, text: str) -> str:
        if self.met is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        hits = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            # Of several in one place, the first that was given.
            at, self.met = min(hits, key=lambda hit: hit[0])
            end = at + len(self.met) if self._include else at
            shown, self._held = self._held[:end], ""
            return shown
        keep = max(self._overlap(stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held when the text ended by itself."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0
