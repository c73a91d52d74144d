"""Numbers that tokens are drawn with."""

from __future__ import annotations

import torch

LARGEST = 1 - 2.0**-22
"""A sum of float32 multiplied with it is less than that sum."""

_MASK = 2**64 - 1


def fresh(count: int) -> list[float]:
    """So many numbers of at least 0 and at most LARGEST."""
    return [min(number, LARGEST) for number in torch.rand(count).tolist()]


def seeded(seed: int, position: int) -> float:
    """Such a number that depends on the seed and the place in the answer alone: not on the rest of the
    batch, the device, or how often a request had to begin again."""
    mixed = (_scrambled(seed & _MASK) + position * 0x9E3779B97F4A7C15) & _MASK
    return min((_scrambled(mixed) >> 40) / 2.0**24, LARGEST)


def _scrambled(number: int) -> int:
    """SplitMix64: neighbours give unlike numbers."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)
