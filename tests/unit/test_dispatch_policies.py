"""Loads, speeds and prompts in, a choice out."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from inference.dispatch.demand import BLOCK_BYTES, BLOCK_TOKENS, MAX_BLOCKS, NO_DEMAND, Demand
from inference.dispatch.policies import POLICIES, policy_named
from inference.dispatch.policies.base import usual_speed
from inference.dispatch.policies.least_tokens import least_tokens
from inference.dispatch.policies.lottery import lottery
from inference.dispatch.policies.power_of_two import power_of_two
from inference.dispatch.policies.prefix_affinity import prefix_affinity
from inference.dispatch.policies.round_robin import round_robin
from inference.dispatch.policies.shortest_queue import shortest_queue
from inference.dispatch.prefixes import KEPT_BLOCKS, LIFE_SECONDS, Prefixes
from registry.states import Policy


@dataclass(slots=True, kw_only=True)
class Worker:
    name: str
    load: float = 0.0
    work: float = 0.0
    speed: float = 0.0
    kv_use: float = 0.0
    slots: int = 32
    turn: float = 0.0
    prefixes: Prefixes = field(default_factory=Prefixes)


def times_chosen(policy, workers, times=4000):
    source = random.Random(7)
    return Counter(policy(workers, NO_DEMAND, source.random).name for _ in range(times))


def test_every_policy_of_the_registry_has_its_function():
    assert set(POLICIES) == set(Policy.values)


def test_a_policy_of_a_newer_version_is_taken_for_the_shortest_queue():
    assert policy_named("not_known_yet") is shortest_queue


def test_the_shortest_queue_is_the_least_load_per_speed():
    workers = [Worker(name="slow", load=2, speed=10), Worker(name="fast", load=5, speed=100)]
    assert shortest_queue(workers, NO_DEMAND, random.random).name == "fast"


def test_equals_are_chosen_equally_often():
    chosen = times_chosen(shortest_queue, [Worker(name=name) for name in "abc"])
    assert all(1100 < chosen[name] < 1570 for name in "abc")


def test_an_unknown_speed_counts_as_the_average_of_the_known():
    workers = [Worker(name="a", speed=10), Worker(name="b", speed=30), Worker(name="new")]
    assert usual_speed(workers) == 20
    assert usual_speed([Worker(name="new")]) == 1
    loaded = [Worker(name="known", load=3, speed=10), Worker(name="new", load=2)]
    assert shortest_queue(loaded, NO_DEMAND, random.random).name == "new"


def test_the_lottery_follows_speed():
    chosen = times_chosen(lottery, [Worker(name="slow", speed=10), Worker(name="fast", speed=30)])
    assert 0.71 < chosen["fast"] / 4000 < 0.79


def test_the_lottery_gives_a_worker_of_unknown_speed_its_share():
    chosen = times_chosen(lottery, [Worker(name="known", speed=50), Worker(name="new")])
    assert 0.46 < chosen["new"] / 4000 < 0.54


def test_a_single_candidate_is_chosen_by_every_policy():
    only = Worker(name="only", load=3, speed=0)
    for policy in POLICIES.values():
        assert policy([only], NO_DEMAND, lambda: 0.999999) is only


# -- power_of_two


def test_of_two_workers_the_less_loaded_is_always_chosen():
    chosen = times_chosen(power_of_two, [Worker(name="busy", load=3), Worker(name="idle", load=2)])
    assert chosen == {"idle": 4000}


def test_of_many_each_pair_is_drawn_equally_often():
    workers = [Worker(name=name, load=load) for load, name in enumerate("abcd")]
    chosen = times_chosen(power_of_two, workers)
    # Of six pairs three have a in them, two b and no a, one c and d.
    assert chosen["a"] == pytest.approx(2000, abs=150)
    assert chosen["b"] == pytest.approx(1333, abs=150)
    assert chosen["c"] == pytest.approx(667, abs=150)
    assert chosen["d"] == 0


# -- round_robin


def test_round_robin_mixes_by_slots():
    workers = [Worker(name="a", slots=4), Worker(name="b", slots=1), Worker(name="c", slots=1)]
    order = "".join(round_robin(workers, NO_DEMAND, random.random).name for _ in range(12))
    assert Counter(order) == {"a": 8, "b": 2, "c": 2}
    assert "aaaa" not in order, "well mixed"


def test_round_robin_goes_on_when_one_is_busy_for_a_while():
    workers = [Worker(name=name) for name in "abc"]
    for _ in range(30):
        round_robin(workers, NO_DEMAND, random.random)
    without = Counter(round_robin(workers[:2], NO_DEMAND, random.random).name for _ in range(30))
    assert without == {"a": 15, "b": 15}
    back = Counter(round_robin(workers, NO_DEMAND, random.random).name for _ in range(30))
    assert max(back.values()) - min(back.values()) <= 1, "no flood for the one that comes back"


# -- least_tokens


def test_tokens_count_not_requests():
    workers = [Worker(name="one long", load=1, work=9000), Worker(name="many short", load=6, work=1200)]
    assert least_tokens(workers, NO_DEMAND, random.random).name == "many short"
    assert shortest_queue(workers, NO_DEMAND, random.random).name == "one long"


def test_a_long_request_goes_where_it_is_done_first():
    workers = [Worker(name="slow", speed=10), Worker(name="fast", work=3000, speed=100)]
    assert least_tokens(workers, Demand(b"x" * 4000), random.random).name == "fast"
    assert least_tokens(workers, Demand(b"x" * 40), random.random).name == "slow"


def test_a_nearly_full_cache_keeps_requests_away():
    full = Worker(name="full", work=1000, kv_use=0.94)
    roomy = Worker(name="roomy", work=2500, kv_use=0.3)
    assert least_tokens([full, roomy], Demand(b"x" * 400), random.random).name == "roomy"
    full.kv_use = 0.5
    assert least_tokens([full, roomy], Demand(b"x" * 400), random.random).name == "full"


# -- prefix_affinity


def prompt(system: str, question: str) -> Demand:
    body = b'{"model":"m","messages":[{"role":"system","content":"' + system.encode() * 4000 + b'"}'
    return Demand(body + question.encode() * 300 + b"]}", most_tokens=64)


def test_a_prompt_goes_where_its_beginning_is_cached():
    workers = [Worker(name=name) for name in "abcd"]
    homes = {
        system: prefix_affinity(workers, prompt(system, "first"), random.random).name for system in "wxyz"
    }
    for question in "12345":
        for system, home in homes.items():
            assert prefix_affinity(workers, prompt(system, question), random.random).name == home


def test_it_leaves_when_the_holder_is_behind_by_more_than_the_cache_saves():
    holder, other = Worker(name="holder"), Worker(name="other")
    holder.prefixes.note(prompt("x", "1").blocks)
    saved = prompt("x", "2").prompt_tokens
    holder.work = 0.5 * saved
    assert prefix_affinity([holder, other], prompt("x", "2"), random.random).name == "holder"
    holder.work = 1.1 * saved
    assert prefix_affinity([holder, other], prompt("x", "2"), random.random).name == "other"
    holder.work = 0.0
    chosen = {
        prefix_affinity([holder, other], prompt("x", question), random.random).name
        for question in "abcdefghijklmnopqrstuvwxyz"
    }
    assert chosen == {"holder", "other"}, "now both have it"


def test_without_a_common_beginning_the_work_decides():
    busy, idle = Worker(name="busy", work=5000), Worker(name="idle")
    busy.prefixes.note(prompt("x", "1").blocks)
    assert prefix_affinity([busy, idle], prompt("y", "1"), random.random).name == "idle"


# -- what they are told


def test_prompts_that_begin_alike_share_their_first_blocks():
    one, two = prompt("x", "1").blocks, prompt("x", "2").blocks
    shared = sum(a == b for a, b in zip(one, two, strict=True))
    assert len(one) - 2 <= shared < len(one)
    assert not set(one) & set(prompt("y", "1").blocks)
    other_name = Demand(b'{"model":"its alias","temperature":1,"messages":' + b"x" * 4000)
    assert Demand(b'{"model":"m","messages":' + b"x" * 4000).blocks == other_name.blocks


def test_a_demand_is_bounded_and_a_short_one_has_no_blocks():
    assert Demand(b"x" * (BLOCK_BYTES - 1)).blocks == ()
    assert len(Demand(b"x" * 10_000_000).blocks) == MAX_BLOCKS
    assert NO_DEMAND.blocks == ()


def test_what_an_answer_may_cost_is_bounded_by_what_is_usual():
    unbounded = Demand(most_tokens=None).work()
    assert Demand(most_tokens=100_000).work() == unbounded
    assert Demand(most_tokens=16).work() == unbounded / 16
    assert Demand(most_tokens=16, answers=3).work() == 3 * Demand(most_tokens=16).work()
    assert Demand(b"x" * 4000).work(cached_tokens=400) == 600
    assert Demand(b"x" * 4000).work(cached_tokens=5000) == 0


def test_prefixes_are_forgotten_like_in_a_cache():
    now = [0.0]
    prefixes = Prefixes(lambda: now[0])
    prefixes.note(range(100))
    assert prefixes.matched(range(100)) == 100
    assert prefixes.matched([0, 1, 2, 500]) == 3
    now[0] = LIFE_SECONDS / 2
    prefixes.note(range(1000, 1000 + KEPT_BLOCKS - 50))
    assert prefixes.matched(range(100)) == 50, "the end of a chain is forgotten first"
    now[0] = LIFE_SECONDS + 1
    assert prefixes.matched(range(50)) == 0
    assert prefixes.matched(range(1000, 1010)) == 10


def test_a_block_stands_for_as_many_tokens_as_its_bytes():
    assert Demand(b"x" * BLOCK_BYTES).prompt_tokens == BLOCK_TOKENS
