"""Server-sent events, taken apart."""

from __future__ import annotations

MAX_EVENT_BYTES = 1024 * 1024
DONE = b"data: [DONE]"


class BadStream(ValueError):
    """What came is not a stream of server-sent events with a proper end."""


class EventSplitter:
    """Takes a byte stream apart into server-sent events, however it was cut."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that `chunk` completes. Raises BadStream for what is none, or longer than 1 MB."""
        data = self._rest + chunk if self._rest else chunk
        if b"\r" in data:
            # JSON never holds a bare carriage return; a "\r" at the very end waits for its "\n".
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        if len(data) > MAX_EVENT_BYTES and max(len(self._rest), *map(len, events), 0) > MAX_EVENT_BYTES:
            raise BadStream(f"it sent an event of more than {MAX_EVENT_BYTES} bytes")
        for event in events:
            # Nearly every event is one line of data and passes as it is.
            if b"\n" in event or not event.startswith(b"data: "):
                return [line for line in map(_one_line, events) if line]
        return events


def _one_line(event: bytes) -> bytes:
    """An event in its general form, as one line of data; empty if it has none."""
    data = []
    for line in event.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
        elif name not in (b"", b"event", b"id", b"retry"):
            raise BadStream("it sent something that is no server-sent event")
    # Within JSON a line break can only stand between tokens, where a space means the same.
    return b"data: " + b" ".join(data) if data else b""
