"""What was measured, and whether it is good enough."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6, "MB": 1e-6}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. Values and bars are in seconds, bytes or plain numbers; `unit` is how they are
    shown."""

    what: str
    value: float
    unit: str = ""
    bar: float | None = None
    at_least: bool = False
    """The bar is the least that will do, not the most."""

    @property
    def met(self) -> bool | None:
        """None without a bar."""
        if self.bar is None:
            return None
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    @property
    def verdict(self) -> str:
        return {None: "", True: "met", False: "missed"}[self.met]

    def shown(self, value: float) -> str:
        """A value as people read it: three digits, or all of those before the point."""
        scaled = value * _UNITS.get(self.unit, 1.0)
        size = abs(scaled)
        digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.095 or size == 0 else 3
        return f"{scaled:,.{digits}f} {self.unit}".rstrip()

    @property
    def shown_bar(self) -> str:
        return "" if self.bar is None else f"{'≥' if self.at_least else '≤'} {self.shown(self.bar)}"


def table(title: str, rows: Iterable[Row]) -> str:
    """The rows as people read them in a terminal."""
    return columns(title, [(row.what, row.shown(row.value), row.shown_bar, row.verdict) for row in rows])


def columns(title: str, rows: Iterable[tuple[str, ...]]) -> str:
    """The same of what is text already: what, measured, bar, and whether it was met, as far as it goes."""
    lines = [("what", "measured", "bar", ""), *((*row, *("",) * (4 - len(row))) for row in rows)]
    what, measured, bar, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        [title, *(f"  {a:{what}}  {b:>{measured}}  {c:>{bar}}  {d}".rstrip() for a, b, c, d in lines)]
    )


def quantile(values: list[float], share: float) -> float:
    """The value that this share of them is not above: 0.5 is the median."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
