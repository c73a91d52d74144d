"""Policies are pure: loads and speeds in, a choice out."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from inference.dispatch.policies import POLICIES, policy_named
from inference.dispatch.policies.base import usual_speed
from inference.dispatch.policies.lottery import lottery
from inference.dispatch.policies.shortest_queue import shortest_queue
from registry.states import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    name: str
    load: float = 0.0
    speed: float = 0.0


def times_chosen(policy, workers, times=4000):
    source = random.Random(7)
    return Counter(policy(workers, source.random).name for _ in range(times))


def test_every_policy_of_the_registry_has_its_function():
    assert set(POLICIES) == set(Policy.values)


def test_a_policy_of_a_newer_version_is_served_by_the_default():
    assert policy_named("not_known_yet") is shortest_queue


def test_the_shortest_queue_is_the_least_load_per_speed():
    workers = [Worker(name="slow", load=2, speed=10), Worker(name="fast", load=5, speed=100)]
    assert shortest_queue(workers, random.random).name == "fast"


def test_equals_are_chosen_equally_often():
    chosen = times_chosen(shortest_queue, [Worker(name=name) for name in "abc"])
    assert all(1100 < chosen[name] < 1570 for name in "abc")


def test_an_unknown_speed_counts_as_the_average_of_the_known():
    workers = [Worker(name="a", speed=10), Worker(name="b", speed=30), Worker(name="new")]
    assert usual_speed(workers) == 20
    assert usual_speed([Worker(name="new")]) == 1
    loaded = [Worker(name="known", load=3, speed=10), Worker(name="new", load=2)]
    assert shortest_queue(loaded, random.random).name == "new"


def test_the_lottery_follows_speed():
    chosen = times_chosen(lottery, [Worker(name="slow", speed=10), Worker(name="fast", speed=30)])
    assert 0.71 < chosen["fast"] / 4000 < 0.79


def test_the_lottery_gives_a_worker_of_unknown_speed_its_share():
    chosen = times_chosen(lottery, [Worker(name="known", speed=50), Worker(name="new")])
    assert 0.46 < chosen["new"] / 4000 < 0.54


def test_a_single_candidate_is_chosen_by_every_policy():
    only = Worker(name="only", load=3, speed=0)
    for policy in POLICIES.values():
        assert policy([only], lambda: 0.999999) is only
