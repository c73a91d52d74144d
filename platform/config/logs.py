"""One line per event: time, level, sentence, then the event's facts as `key=value`."""

from __future__ import annotations

import json
import logging
import time
from json.encoder import encode_basestring_ascii

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class LineFormatter(logging.Formatter):
    """Formats a record as one line; control characters in values are escaped, so none can forge a line.

    >>> log.info("worker is ready", extra={"event": "worker_ready", "worker_id": 7})
    2026-11-21T09:27:00Z INFO worker is ready event="worker_ready" worker_id=7
    """

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        sentence = (
            record.getMessage().encode("unicode_escape").decode() if _unprintable(record) else record.message
        )
        facts = "".join(
            f" {key}={_text(value)}" for key, value in vars(record).items() if key not in _STANDARD
        )
        line = f"{stamp} {record.levelname} {sentence}{facts}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _text(value: object) -> str:
    """JSON. The two types that nearly all facts have take a short way: there is a line per request."""
    if type(value) is str:
        return encode_basestring_ascii(value)
    if type(value) is int:
        return str(value)
    return json.dumps(value, default=str)


def _unprintable(record: logging.LogRecord) -> bool:
    record.message = record.getMessage()
    return not record.message.isprintable()
