"""Histograms of times and speeds: how many requests fell into each bucket.

Buckets grow by a fifth, so a value read back from its bucket is less than a tenth off. Adding two
histograms gives that of both, so those of hours add up to those of days and of any range. A histogram is a
plain dict of bucket numbers, as text so that it is the same after JSON, and counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor, log

RATIO = 1.2
SCALE = 1 / log(RATIO)
"""Logarithms times this are bucket numbers. No whole number but 1 is a power of the ratio, so that no
database rounds one across a boundary."""

Histogram = dict[str, int]


def bucket_of(value: int) -> int:
    """The bucket of a whole number; 0 for all below 1. In SQL: `registry.actions.rollups`."""
    return 1 + floor(log(value) * SCALE) if value >= 1 else 0


def value_of(bucket: int) -> float:
    """What stands for all values of a bucket: less than 10 % from each of them."""
    return RATIO ** (bucket - 0.5) if bucket > 0 else 0.0


def add_to(histogram: Histogram, other: Mapping[str, int]) -> None:
    for bucket, count in other.items():
        histogram[bucket] = histogram.get(bucket, 0) + count


def count(histogram: Mapping[str, int]) -> int:
    """How many values it was made of."""
    return sum(histogram.values())


def quantile(histogram: Mapping[str, int], part: float) -> float | None:
    """The value that this part of all values does not exceed (nearest rank); None if there are none."""
    total = count(histogram)
    rank = max(1, -floor(-part * total))
    seen = 0
    for bucket in sorted(map(int, histogram)):
        seen += histogram[str(bucket)]
        if seen >= rank:
            return value_of(bucket)
    return None
