"""What this machine has, for the beat."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata

import psutil


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    memory_bytes: int
    memory_free_bytes: int
    cores: int
    """Those that this process may use."""


def inventory() -> Inventory:
    memory = psutil.virtual_memory()
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return Inventory(
        memory_bytes=memory.total,
        memory_free_bytes=memory.available,
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
    )


def version() -> str:
    """Roundhouse's version, empty when it runs from a folder that was never installed."""
    try:
        return metadata.version("roundhouse")
    except metadata.PackageNotFoundError:
        return ""
