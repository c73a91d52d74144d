"""Breakers, the retry budget and poisonous requests, on a clock of the test."""

from __future__ import annotations

from inference.dispatch.breaker import FAILURES, LONGEST_SECONDS, OPEN_SECONDS, WITHIN_SECONDS, Breaker
from inference.dispatch.poison import DEATHS, KEPT, REFUSED_SECONDS, Poison
from inference.dispatch.retries import LEAST, WINDOW_SECONDS, RetryBudget


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    assert [breaker.failed() for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
    return breaker


# -- the breaker


def test_failures_in_a_short_time_open_it():
    clock = Clock()
    breaker = opened(clock)
    assert not breaker.lets(0)
    assert not breaker.closed
    clock.now += OPEN_SECONDS - 0.1
    assert not breaker.lets(0)


def test_failures_now_and_then_do_not():
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(5 * FAILURES):
        assert not breaker.failed()
        clock.now += WITHIN_SECONDS / (FAILURES - 1) + 0.1
    assert breaker.lets(100)


def test_half_open_one_request_at_a_time_goes_through():
    clock = Clock()
    breaker = opened(clock)
    clock.now += OPEN_SECONDS
    assert breaker.lets(0)
    assert not breaker.lets(1)
    breaker.succeeded()
    assert breaker.lets(10)
    assert breaker.closed


def test_each_probe_that_fails_doubles_the_wait_up_to_a_bound():
    clock = Clock()
    breaker = opened(clock)
    waits = []
    wait = OPEN_SECONDS
    for _ in range(6):
        clock.now += wait
        assert breaker.lets(0)
        assert breaker.failed()
        began = clock.now
        while not breaker.lets(0):
            clock.now += 1.0
        waits.append(clock.now - began)
        clock.now = began
        wait = waits[-1]
    assert waits == [20.0, 40.0, 80.0, LONGEST_SECONDS, LONGEST_SECONDS, LONGEST_SECONDS]


def test_after_it_has_closed_the_first_wait_is_short_again():
    clock = Clock()
    breaker = opened(clock)
    clock.now += OPEN_SECONDS
    breaker.failed()
    clock.now += 2 * OPEN_SECONDS
    breaker.succeeded()
    for _ in range(FAILURES):
        breaker.failed()
    clock.now += OPEN_SECONDS
    assert breaker.lets(0)


def test_older_requests_say_nothing_while_it_is_open():
    clock = Clock()
    breaker = opened(clock)
    assert not breaker.failed()
    breaker.succeeded()
    assert not breaker.lets(0)
    clock.now += OPEN_SECONDS
    assert breaker.lets(0), "and do not make it wait longer"


# -- the retry budget


def test_a_few_retries_are_always_free():
    budget = RetryBudget(Clock())
    assert [budget.take() for _ in range(LEAST + 2)] == [True] * LEAST + [False] * 2


def test_a_tenth_of_many_requests_may_be_tried_again():
    budget = RetryBudget(Clock())
    for _ in range(1000):
        budget.note_request()
    assert sum(budget.take() for _ in range(500)) == 100


def test_it_is_full_again_in_the_next_window():
    clock = Clock()
    budget = RetryBudget(clock)
    while budget.take():
        pass
    clock.now += WINDOW_SECONDS
    assert sum(budget.take() for _ in range(10)) == LEAST


def test_at_the_beginning_of_a_window_the_last_one_counts():
    clock = Clock()
    budget = RetryBudget(clock)
    for _ in range(1000):
        clock.now += 0.0095
        budget.note_request()
    clock.now += 1.0
    assert sum(budget.take() for _ in range(500)) == 100
    clock.now += 3 * WINDOW_SECONDS
    assert sum(budget.take() for _ in range(10)) == LEAST, "what was long ago says nothing"


# -- poisonous requests


def test_the_second_death_makes_a_request_refused_for_a_while():
    clock = Clock()
    poison = Poison(clock)
    assert not poison.note_death(7, 1, 1)
    assert not poison.refuses(lambda: 7)
    assert poison.note_death(7, 2, 1)
    assert poison.refuses(lambda: 7)
    assert not poison.refuses(lambda: 8)
    clock.now += REFUSED_SECONDS + 1
    assert not poison.refuses(lambda: 7)
    assert not poison.note_death(7, 3, 1), "what was long ago does not count"


def test_one_death_told_twice_is_one_and_a_next_life_another():
    poison = Poison(Clock())
    assert not poison.note_death(7, 1, 1)
    assert not poison.note_death(7, 1, 1)
    assert poison.note_death(7, 1, 2)
    assert DEATHS == 2


def test_only_so_many_are_remembered():
    poison = Poison(Clock())
    for fingerprint in range(KEPT + 1):
        poison.note_death(fingerprint, 1, 1)
        poison.note_death(fingerprint, 2, 1)
    assert not poison.refuses(lambda: 0)
    assert poison.refuses(lambda: 1)
    assert poison.refuses(lambda: KEPT)


def test_without_a_recent_death_no_fingerprint_is_asked_for():
    def fingerprint() -> int:
        raise AssertionError("hashing a body takes time")

    clock = Clock()
    poison = Poison(clock)
    assert not poison.refuses(fingerprint)
    poison.note_death(7, 1, 1)
    clock.now += REFUSED_SECONDS + 1
    assert not poison.refuses(fingerprint)
