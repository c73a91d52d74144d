"""The rule of counting, against one that is too slow to use: fractions, and every stretch of time."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openai_api.admission.pace import LEVEL_MAX, TICKS, Pace
from openai_api.admission.told import duration
from registry.models.limit import AMOUNT_MAX, Per

paces = st.builds(
    Pace.of,
    st.sampled_from(list(Per)),
    st.integers(1, 200) | st.integers(1, AMOUNT_MAX),
    st.integers(1, 200) | st.integers(1, AMOUNT_MAX),
)
waits = st.integers(0, 20) | st.integers(0, 10_000)


class Reference:
    """The same limit, written down as it is promised."""

    def __init__(self, pace: Pace) -> None:
        self.rate = Fraction(pace.amount, pace.parts)
        self.burst = pace.burst
        self.level = Fraction(0)

    def wait(self, ticks: int) -> None:
        self.level = max(Fraction(0), self.level - self.rate * ticks)

    def admit(self, cost: int) -> bool:
        if self.level + cost > self.burst:
            return False
        self.level += cost
        return True


@given(paces, st.lists(st.tuples(waits, st.integers(1, 60)), max_size=60))
@settings(max_examples=300, deadline=None)
def test_it_lets_through_what_the_promise_lets_through_and_no_more(
    pace: Pace, asked: list[tuple[int, int]]
) -> None:
    reference = Reference(pace)
    level = now = 0
    admitted: list[tuple[int, int]] = []
    for ticks, cost in asked:
        cost = min(cost, pace.burst)
        now += ticks
        level = pace.leaked(level, ticks)
        reference.wait(ticks)
        assert pace.fits(level, cost) == reference.admit(cost)
        if pace.fits(level, cost):
            level = pace.added(level, cost)
            admitted.append((now, cost))
        assert Fraction(level, pace.parts) == reference.level
    for first, (began, _) in enumerate(admitted):
        total = 0
        for ended, cost in admitted[first:]:
            total += cost
            assert total <= pace.burst + Fraction(pace.amount, pace.parts) * (ended - began)


@given(paces, st.integers(0, 2 * AMOUNT_MAX), waits, st.integers(1, AMOUNT_MAX))
@settings(max_examples=300, deadline=None)
def test_what_is_told_is_true(pace: Pace, used: int, ticks: int, cost: int) -> None:
    """Remaining is what fits and not one more; after the wait it fits and a tick before it does not; after
    the reset, and not before, nothing is used any more."""
    cost = min(cost, pace.burst)
    level = pace.leaked(pace.added(0, used), ticks)
    left = pace.remaining(level)
    assert left == 0 or pace.fits(level, left)
    assert not pace.fits(level, left + 1)

    wait = pace.wait_ms(level, cost) // pace.tick_ms
    assert (wait == 0) == pace.fits(level, cost)
    assert pace.fits(pace.leaked(level, wait), cost)
    assert wait == 0 or not pace.fits(pace.leaked(level, wait - 1), cost)

    reset = pace.reset_ms(level) // pace.tick_ms
    assert pace.leaked(level, reset) == 0
    assert reset == 0 or pace.leaked(level, reset - 1) > 0


@given(paces, st.lists(st.integers(-AMOUNT_MAX, AMOUNT_MAX), max_size=20))
def test_what_is_given_back_never_makes_more_than_empty(pace: Pace, counts: list[int]) -> None:
    level = 0
    for count in counts:
        level = pace.added(level, count)
        assert 0 <= level <= LEVEL_MAX


def test_a_clock_that_goes_back_gives_nothing_back() -> None:
    pace = Pace.of(Per.MINUTE, 60, 60)
    assert pace.leaked(pace.added(0, 10), -5) == pace.added(0, 10)


def test_what_costs_nothing_is_not_refused_even_by_a_bucket_that_is_overdrawn() -> None:
    pace = Pace.of(Per.MINUTE, 60, 60)
    assert pace.fits(pace.added(0, 500), 0)
    assert not pace.fits(pace.added(0, 500), 1)


@pytest.mark.parametrize("per", list(TICKS))
def test_the_largest_level_of_any_limit_is_exact_in_a_double(per: str) -> None:
    pace = Pace.of(per, AMOUNT_MAX, AMOUNT_MAX)
    level = pace.added(0, 10 * AMOUNT_MAX)
    assert level == 10 * AMOUNT_MAX * pace.parts < 2**53
    assert pace.tick_ms * pace.parts == {"second": 1, "minute": 60, "hour": 3600, "day": 86400}[per] * 1000


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        *((0, "0s"), (4, "4ms"), (999, "999ms"), (1000, "1s"), (1200, "1.2s"), (8640, "8.64s")),
        *((60_000, "1m0s"), (360_000, "6m0s"), (86_400, "1m26.4s"), (3_600_000, "1h0m0s")),
        *((86_400_000, "24h0m0s"), (3_661_001, "1h1m1.001s")),
    ],
)
def test_durations_are_written_as_openai_writes_them(milliseconds: int, text: str) -> None:
    assert duration(milliseconds) == text
