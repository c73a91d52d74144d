"""One line per event, for people or for machines: time, level, sentence, and the event's facts.

Nothing that was logged can forge a line: control characters in sentences and values are escaped, and the
lines of a traceback are indented. Each line that belongs to a request carries its `request_id`, whoever
logs it: Django, a library, or code of ours that does not know it.
"""

from __future__ import annotations

import json
import logging
import time
from functools import lru_cache
from json.encoder import encode_basestring_ascii

from inference.http import request_id_now

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_INDENT = "    "
_PLAIN = frozenset({str, int, float, bool, list, tuple, dict, type(None)})
_DERIVED = (str, int)
"""Enums, mostly."""


def _facts(record: logging.LogRecord) -> list[tuple[str, object]]:
    """What was given as `extra`, and the request that this belongs to. Objects, such as the request that
    Django adds, are left out: they could carry anything."""
    facts = [
        (key, value)
        for key, value in vars(record).items()
        if key not in _STANDARD and (type(value) in _PLAIN or isinstance(value, _DERIVED))
    ]
    request_id = request_id_now.get()
    if request_id and "request_id" not in vars(record):
        facts.append(("request_id", request_id))
    return facts


class LineFormatter(logging.Formatter):
    """For people.

    >>> log.info("worker is ready", extra={"event": "worker_ready", "worker_id": 7})
    2026-11-21T09:27:00Z INFO worker is ready event="worker_ready" worker_id=7
    """

    def format(self, record: logging.LogRecord) -> str:
        sentence = record.getMessage()
        if not sentence.isprintable():
            sentence = sentence.encode("unicode_escape").decode()
        facts = "".join([f" {key}={_text(value)}" for key, value in _facts(record)])
        line = f"{_stamp(record.created)} {record.levelname} {sentence}{facts}"
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line += "".join(f"\n{_INDENT}{_visible(part)}" for part in trace.splitlines())
        return line


class JsonFormatter(logging.Formatter):
    """For machines: one JSON object per line, ASCII only.

    `time`, `level`, `logger` and `message` are always there, `exception` where one was logged.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _stamp(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        # A fact cannot pass for what this line says of itself.
        line |= {key: value for key, value in _facts(record) if key not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _stamp(created: float) -> str:
    return _stamp_of_second(int(created))


@lru_cache(maxsize=4)
def _stamp_of_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))


def _visible(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _text(value: object) -> str:
    """JSON. The two types that nearly all facts have take a short way: there is a line per request."""
    if type(value) is str:
        return encode_basestring_ascii(value)
    if type(value) is int:
        return str(value)
    return json.dumps(value, default=str)
