"""Reports as text for programs: CSV, JSON and NDJSON, written row by row as the rows are read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from registry.histograms import Histogram, add_to, count, quantile
from registry.reports import Dimension, Figures, Row, UsageQuery, Width

FIGURES = (
    "requests",
    "errors",
    "aborted",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "cost_micros",
)
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
LATENCIES = {"queue": "queue_ms", "ttft": "ttft_ms", "e2e": "e2e_ms", "speed": "tokens_per_second"}
"""Measures of the histograms, and what they are called where they are shown."""
EVENT_COLUMNS = (
    "request_id",
    "started_at",
    "project_id",
    "project_name",
    "key_public_id",
    "key_name",
    "route",
    "endpoint",
    "stream",
    "status",
    "outcome",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "cost_micros",
    "corrects",
    "queue_ms",
    "ttft_ms",
    "duration_ms",
)
"""What is told of a single request, by the names that the ledger has for it."""
BLOCK = 64 * 1024
"""Characters that are sent at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A report and the moment up to which it is complete."""

    query: UsageQuery
    complete_to: datetime

    def columns(self) -> list[str]:
        """Names of what each row has, in order."""
        query = self.query
        columns = [query.width.value] if query.width else []
        for dimension, names in _TEXTS.items():
            if dimension in query.by:
                columns += names
        return [*columns, *FIGURES]

    def records(self) -> Iterator[dict[str, Any]]:
        """Each row as plain values."""
        columns = self.columns()
        for row in self.query.rows():
            record = self._values(row)
            yield {column: record[column] for column in columns}

    def csv(self) -> Iterator[str]:
        """RFC 4180 with a header line. Cells that a spreadsheet would take for a formula are quoted."""
        yield from _csv(self.columns(), self.records())

    def ndjson(self) -> Iterator[str]:
        """One JSON object per line."""
        yield from _ndjson(self.records())

    def json(self) -> Iterator[str]:
        """One object: what was asked, the rows, their totals, and percentiles over all of them."""
        query = self.query
        head = {
            "start": query.start.isoformat(),
            "end": query.end.isoformat(),
            "time_zone": str(query.zone),
            "complete_to": self.complete_to.isoformat(timespec="seconds"),
        }
        yield json.dumps(head)[:-1] + ', "rows": ['
        totals = dict.fromkeys(FIGURES, 0)
        comma = ""
        for record in self.records():
            for name in FIGURES:
                totals[name] += record[name]
            yield comma + "\n" + json.dumps(record, ensure_ascii=False)
            comma = ","
        latencies = latencies_of(query.histograms().values())
        yield f'\n], "totals": {json.dumps(totals)}, "latencies": {json.dumps(latencies)}}}\n'

    def _values(self, row: Row) -> dict[str, Any]:
        query = self.query
        values: dict[str, Any] = {
            "project_id": row.project_id,
            "project": row.project_name,
            "key_id": row.key,
            "key": row.key_name,
            "model": row.model,
            "endpoint": row.endpoint,
            "status": row.status,
            **figures_of(row.figures),
        }
        if query.width is not None:
            values[query.width.value] = time_text(row.start, query)
        return values


_TEXTS = {
    Dimension.PROJECT: ["project_id", "project"],
    Dimension.KEY: ["key_id", "key"],
    Dimension.MODEL: ["model"],
    Dimension.ENDPOINT: ["endpoint"],
    Dimension.STATUS: ["status"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestsExport:
    """The single requests behind a report, the newest first."""

    query: UsageQuery

    def records(self) -> Iterator[dict[str, Any]]:
        """Each as plain values, read as they are asked for."""
        for values in self.query.events().values_list(*EVENT_COLUMNS).iterator(chunk_size=2000):
            record = dict(zip(EVENT_COLUMNS, values, strict=True))
            record["started_at"] = record["started_at"].isoformat(timespec="milliseconds")
            yield record

    def csv(self) -> Iterator[str]:
        """As `Export.csv`."""
        yield from _csv(EVENT_COLUMNS, self.records())

    def ndjson(self) -> Iterator[str]:
        """One JSON object per line."""
        yield from _ndjson(self.records())

    def json(self) -> Iterator[str]:
        """One object with the list of them."""
        yield '{"requests": ['
        comma = ""
        for record in self.records():
            yield comma + "\n" + json.dumps(record, ensure_ascii=False)
            comma = ","
        yield "\n]}\n"


def latencies_of(models: Iterable[Mapping[str, Histogram]]) -> dict[str, dict[str, float | int | None]]:
    """Percentiles of each measure over these models together, and how many requests they are made of."""
    sums: dict[str, Histogram] = {measure: {} for measure in LATENCIES}
    for histograms in models:
        for measure, histogram in histograms.items():
            add_to(sums[measure], histogram)
    return {
        name: {
            "requests": count(sums[measure]),
            **{
                quantile_name: _shown(measure, sums[measure], part)
                for quantile_name, part in QUANTILES.items()
            },
        }
        for measure, name in LATENCIES.items()
    }


def _shown(measure: str, histogram: Histogram, part: float) -> float | int | None:
    value = quantile(histogram, part)
    if value is None:
        return None
    # Speeds are kept in thousandths.
    return round(value / 1000, 1) if measure == "speed" else round(value)


def figures_of(figures: Figures) -> dict[str, int]:
    """What is exported of the sums."""
    return {name: getattr(figures, name) for name in FIGURES}


def time_text(start: datetime, query: UsageQuery) -> str:
    """A bucket's name: a date, or a date, time and offset."""
    local = start.astimezone(query.zone)
    return local.date().isoformat() if query.width is Width.DAY else local.isoformat(timespec="minutes")


def safe_cell(value: object) -> object:
    """A text that a spreadsheet would run as a formula gets a quote before it; numbers stay numbers."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return value


def in_blocks(pieces: Iterator[str]) -> Iterator[bytes]:
    """The same text in fewer pieces: each costs a network write."""
    waiting: list[str] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= BLOCK:
            yield "".join(waiting).encode()
            waiting, size = [], 0
    if waiting:
        yield "".join(waiting).encode()


def _csv(columns: Sequence[str], records: Iterator[dict[str, Any]]) -> Iterator[str]:
    line = _Line()
    writer = csv.writer(line)
    yield line.of(writer.writerow(columns))
    for record in records:
        yield line.of(writer.writerow([safe_cell(value) for value in record.values()]))


def _ndjson(records: Iterator[dict[str, Any]]) -> Iterator[str]:
    for record in records:
        yield json.dumps(record, ensure_ascii=False) + "\n"


class _Line:
    """Where `csv.writer` writes: it hands on what it was given last."""

    def __init__(self) -> None:
        self._text = ""

    def write(self, text: str) -> None:
        self._text = text

    def of(self, _: object) -> str:
        return self._text
