"""What the commands print: tables, amounts, ages. Plain text, the same on a terminal and in a pipe."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime

from inference.words import amount_of_bytes as amount_of_bytes


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, two blanks between them; an empty cell is a dash."""
    lines = [list(headings), *([one_line(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def one_line(cell: object) -> str:
    """Text for a terminal: no control characters, no line breaks."""
    text = "" if cell is None else str(cell)
    return "".join(char if printable(char) else " " for char in text) or "-"


def printable(char: str) -> bool:
    """False for what a terminal obeys instead of showing it."""
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def age(since: datetime | None, now: datetime) -> str:
    """How long ago, in the largest fitting unit; `never` for None."""
    if since is None:
        return "never"
    seconds = max(0.0, (now - since).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def share(step: str, done: int, total: int) -> str:
    """`loading weights, 43 %`; only the step while the total is unknown."""
    return f"{step}, {100 * done // total} %" if total else step
