"""What something costs of the processor, on a machine that others use too."""

from __future__ import annotations

import time
from collections.abc import Callable


def cpu_seconds(call: Callable[[], object], *, tries: int = 3, enough: float = 0.0, times: int = 1) -> float:
    """CPU seconds of one call in this thread: the least of several tries, since whatever disturbs one only
    adds to it. A try that comes below `enough` is the last; each is the mean of so many `times`."""
    best = float("inf")
    for _ in range(tries):
        began = time.thread_time()
        for _ in range(times):
            call()
        best = min(best, (time.thread_time() - began) / times)
        if best < enough:
            break
    return best
