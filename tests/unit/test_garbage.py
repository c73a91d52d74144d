"""The collector looks at everything that lives when nobody waits for it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from config.garbage import LONGEST_PAUSE_SECONDS, PAUSE_SECONDS, QUIET_REQUESTS, Collector


class Circle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def old_circle() -> weakref.ref[Circle]:
    """Garbage that has outlived the looks at what is young."""
    circle = Circle()
    for _ in range(3):
        gc.collect(1)
    return weakref.ref(circle)


def test_a_quiet_moment_is_waited_for() -> None:
    collector = Collector(0.0)
    old = old_circle()
    gc.collect(1)
    collector.look(PAUSE_SECONDS + 1, QUIET_REQUESTS + 1)
    assert old() is not None, "looked at while many wait"
    collector.look(PAUSE_SECONDS + 2, QUIET_REQUESTS)
    assert old() is None
    old = old_circle()
    collector.look(PAUSE_SECONDS + 3, 0)
    assert old() is not None, "looked at again at once"


def test_where_it_is_never_quiet_it_is_not_waited_for_for_ever() -> None:
    collector = Collector(0.0)
    old = old_circle()
    for minute in range(59):
        collector.look(60.0 * minute, 10_000)
    assert old() is not None
    collector.look(LONGEST_PAUSE_SECONDS, 10_000)
    assert old() is None


def test_it_does_not_come_by_itself() -> None:
    Collector(0.0)
    came = []
    gc.callbacks.append(lambda phase, info: came.append(info["generation"]))
    try:
        kept = [[at] for at in range(300_000)]
    finally:
        gc.callbacks.pop()
    assert len(kept) == 300_000
    assert came
    assert max(came) < 2
