"""Histograms: how far off a percentile may be, and that adding them loses nothing."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.histograms import Histogram, add_to, bucket_of, count, quantile, value_of

numbers = st.integers(min_value=0, max_value=2**40)


def histogram(values: list[int]) -> Histogram:
    buckets: Histogram = {}
    for value in values:
        add_to(buckets, {str(bucket_of(value)): 1})
    return buckets


@given(st.integers(min_value=1, max_value=2**40))
def test_a_bucket_stands_for_values_less_than_a_tenth_away(value: int) -> None:
    assert abs(value_of(bucket_of(value)) - value) < 0.1 * value


@given(st.lists(numbers, min_size=1, max_size=60), st.sampled_from([0.5, 0.95, 0.99, 1.0]))
def test_a_percentile_is_less_than_a_tenth_off(values: list[int], part: float) -> None:
    exact = sorted(values)[max(1, math.ceil(part * len(values))) - 1]
    found = quantile(histogram(values), part)
    assert found is not None
    assert abs(found - exact) <= 0.1 * exact


@given(st.lists(numbers, max_size=40), st.lists(numbers, max_size=40))
def test_adding_two_gives_that_of_both_also_after_json(first: list[int], second: list[int]) -> None:
    both = histogram(first)
    add_to(both, json.loads(json.dumps(histogram(second))))
    assert both == histogram(first + second)
    assert count(both) == len(first) + len(second)


def test_of_nothing_there_is_no_percentile() -> None:
    assert quantile({}, 0.5) is None


@pytest.mark.parametrize(("value", "bucket"), [(0, 0), (1, 1), (2, 4), (1000, 38)])
def test_buckets_stay_what_they_are(value: int, bucket: int) -> None:
    # They are stored: another numbering would mix old hours with new ones.
    assert bucket_of(value) == bucket
