"""One line per event, for people or for machines: time, level, sentence, and the event's facts.

Nothing that was logged can forge a line: control characters in sentences and values are escaped, and the
lines of a traceback are indented. Each line that belongs to a request carries its `request_id`, whoever
logs it: Django, a library, or code of ours that does not know it. What PostgreSQL adds to its errors, the row
that it refused among it, is left out: it is somebody's data. A key of ours appears as its public part, even
where somebody has put it into a URL.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from functools import lru_cache
from json.encoder import encode_basestring_ascii

import msgspec

from inference.http import request_id_now
from registry.keys import KEY_PATTERN

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_INDENT = "    "
_DETAIL = "\nDETAIL:"
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


def _sentence(record: logging.LogRecord) -> str:
    sentence = record.getMessage()
    if isinstance(record.args, tuple):
        for argument in record.args:
            if isinstance(argument, BaseException):
                sentence = _without_details(sentence, argument)
    return sentence


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    return _without_details(formatter.formatException(record.exc_info), record.exc_info[1])


def _without_details(text: str, error: BaseException) -> str:
    for one in _chain(error):
        told = str(one)
        if _DETAIL in told:
            text = text.replace(told, told.partition(_DETAIL)[0])
    return text


def _masked(line: str) -> str:
    return KEY_PATTERN.sub(r"sk-\1-***", line) if "sk-" in line else line


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it."""
    open_, seen = [error], set()
    while open_:
        one = open_.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            open_ += [led for led in (one.__cause__, one.__context__) if led is not None]


class LineFormatter(logging.Formatter):
    """For people.

    >>> log.info("worker is ready", extra={"event": "worker_ready", "worker_id": 7})
    2026-11-21T09:27:00Z INFO worker is ready event="worker_ready" worker_id=7
    """

    def format(self, record: logging.LogRecord) -> str:
        sentence = _sentence(record)
        if not sentence.isprintable():
            sentence = sentence.encode("unicode_escape").decode()
        facts = "".join([f" {key}={_text(value)}" for key, value in _facts(record)])
        line = f"{_stamp(record.created)} {record.levelname} {sentence}{facts}"
        if trace := _trace(self, record):
            line += "".join(f"\n{_INDENT}{_visible(part)}" for part in trace.splitlines())
        return _masked(line)


class JsonFormatter(logging.Formatter):
    """For machines: one JSON object per line, ASCII only.

    `time`, `level`, `logger` and `message` are always there, `exception` where one was logged.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _stamp(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": _sentence(record),
        }
        # A fact cannot pass for what this line says of itself.
        line |= {key: value for key, value in _facts(record) if key not in line}
        if trace := _trace(self, record):
            line["exception"] = trace
        return _masked(_json(line))


def _json(value: object) -> str:
    """Printable ASCII only. msgspec takes a tenth of the time; what json escapes and it does not is rare."""
    line = msgspec.json.encode(value, enc_hook=str).decode()
    if line.isascii() and line.isprintable():
        return line
    return json.dumps(value, default=str, separators=(",", ":"))


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
