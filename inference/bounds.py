"""What the kernel holds processes to that read other people's files and texts. Standard library only."""

from __future__ import annotations

import os
import resource

GIB = 1024**3
MEMORY = 4 * GIB
MEMORY_PER_CORE = 64 * 1024**2
"""Libraries, and what each of their threads has of its own."""
MEMORY_PER_WEIGHT = 16
"""Bytes: unpacked to 32 bits, turned, and the result of 16 bits beside it."""
FILE = GIB // 4
FILE_PER_WEIGHT = 2


def leave_no_core() -> None:
    """From here on neither this process nor one that it starts leaves its memory on a disk when it crashes:
    in it are prompts and secrets."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def hold_conversion(weights: int) -> None:
    """For a process that converts a model of so many weights, and uses no device: beyond what they need,
    whatever the file says, allocating fails (MemoryError) and so does writing (EFBIG).

    Not the address space: mapped files and libraries may be as large as they are.
    """
    leave_no_core()
    memory = MEMORY + MEMORY_PER_CORE * (os.cpu_count() or 1) + MEMORY_PER_WEIGHT * weights
    for bound, amount in (
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_FSIZE, FILE + FILE_PER_WEIGHT * weights),
    ):
        most = resource.getrlimit(bound)[1]
        amount = amount if most == resource.RLIM_INFINITY else min(amount, most)
        resource.setrlimit(bound, (amount, amount))
