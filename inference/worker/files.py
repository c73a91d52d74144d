"""The files in a worker's folder: replaced as a whole, readable by their owner only."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

import msgspec

from inference.protocol import LOG_TAIL_LINES, Message

LOG_BYTES = 16 * 1024 * 1024
"""An engine's log is moved aside at this size; one older part is kept."""

_LINE_CHARACTERS = 500


def write_message(path: Path, message: Message) -> None:
    """Replace `path` so that a reader sees the old content or the new, never a part."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(message))
    os.replace(fresh, path)


class EngineLog:
    """What an engine prints: a file of bounded size, and the last lines at hand.

    A disk that is full or gone costs the log, never the worker.
    """

    def __init__(self, path: Path, *, hide: str, limit_bytes: int = LOG_BYTES) -> None:
        self._path = path
        self._hide = hide
        self._limit = limit_bytes
        self._part = b""
        self._lines: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self._fd = self._open()
        self._size = os.fstat(self._fd).st_size

    def write(self, data: bytes) -> None:
        *whole, self._part = (self._part + data).split(b"\n")
        self._lines.extend(self._readable(line) for line in whole[-LOG_TAIL_LINES:])
        self._part = self._part[-4 * _LINE_CHARACTERS :]
        try:
            if self._size + len(data) > self._limit:
                os.close(self._fd)
                os.replace(self._path, self._path.with_name(self._path.name + ".1"))
                self._fd = self._open()
                self._size = 0
            self._size += os.write(self._fd, data)
        except OSError:
            return  # the lines at hand still travel with the worker's end

    def tail(self) -> list[str]:
        last = [self._readable(self._part)] if self._part else []
        return [*self._lines, *last][-LOG_TAIL_LINES:]

    def close(self) -> None:
        os.close(self._fd)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def _readable(self, line: bytes) -> str:
        text = line.decode("utf-8", "replace").rstrip()
        if self._hide:
            text = text.replace(self._hide, "***")
        return text[:_LINE_CHARACTERS]
