"""Limits of several gateways on one Redis that is killed, emptied and held up. No database here."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.env import ROOT
from config.private_redis import redis_command, redis_url, socket_folder
from openai_api.admission import Admission, Admitted, Rule, admission
from openai_api.admission.line import Line, RedisAway, command, connect
from openai_api.admission.pace import Pace
from openai_api.admission.scripts import ADMIT, AMEND
from openai_api.errors import LimitUnknown, RateLimited, TokensLimited, answer_to
from registry.models import Metric, Per, WhenAway
from tests.services import OwnRedis, missing, own_redis

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def server() -> Iterator[OwnRedis]:
    with own_redis() as running:
        if running is None:
            missing("no redis-server is installed")
        yield running


def rule(metric: str = "requests", amount: int = 10, per: str = "hour", **facts: Any) -> Rule:
    """A limit with a bucket of its own. Per hour, so that nothing leaks while a test looks on."""
    burst = facts.pop("burst", None) or amount
    parallel = metric == Metric.PARALLEL
    defaults: dict[str, Any] = {
        "bucket": f"{next(_numbers)}:{metric}:{per}",
        "metric": Metric(metric),
        "amount": amount,
        "per": "" if parallel else per,
        "burst": burst,
        "pace": None if parallel else Pace.of(per, amount, burst),
        "when_away": WhenAway(facts.pop("away", "local")),
        "route": "",
        "each_route": False,
        "subject": "key test",
    }
    return Rule(**defaults | facts)


def key(*rules: Rule) -> Any:
    return SimpleNamespace(public_id=f"key{next(_numbers)}", rules=rules)


@contextlib.asynccontextmanager
async def gateways(url: str | None, count: int = 1) -> AsyncIterator[list[Admission]]:
    """So many gateways, that know of each other."""
    made = [Admission(url, count_gateways=lambda: count) for _ in range(count)]
    for one in made:
        await one.start()
        one._gateways = count
    try:
        yield made
    finally:
        for one in made:
            await one.stop()


async def ask(gateway: Admission, of: Any, model: str = "m", **facts: Any) -> Admitted | RateLimited:
    defaults: dict[str, Any] = {"prompt_bytes": 40, "max_tokens": 10, "request_id": f"r{next(_numbers)}"}
    try:
        admitted = await gateway.admit(of, model, **defaults | facts)
    except RateLimited as refused:
        return refused
    assert admitted is not None
    return admitted


async def how_many(gateway: Admission, of: Any, tries: int, **facts: Any) -> int:
    answers = [await ask(gateway, of, **facts) for _ in range(tries)]
    return sum(isinstance(answer, Admitted) for answer in answers)


async def until(question: Callable[[], Any], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def headers(answer: Admitted | RateLimited) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in answer.headers}


# -- exactly


async def test_two_gateways_let_through_exactly_the_limit_of_200_at_once(server: OwnRedis) -> None:
    async with gateways(server.url, 2) as both:
        of = key(rule(amount=37), rule("tokens", 1_000_000), rule("parallel", 1_000))
        answers = await asyncio.gather(*(ask(both[at % 2], of) for at in range(200)))
        admitted = [answer for answer in answers if isinstance(answer, Admitted)]
        assert len(admitted) == 37
        left = sorted(int(headers(answer)["x-ratelimit-remaining-requests"]) for answer in admitted)
        assert left == list(range(37))


PROGRAM = """
import asyncio, sys
from types import SimpleNamespace
import django
from django.conf import settings
apps = ["django.contrib.contenttypes", "django.contrib.auth", "registry"]
settings.configure(SECRET_KEY="s" * 50, INSTALLED_APPS=apps, USE_TZ=True)
django.setup()
from openai_api.admission import Admission, Rule
from openai_api.admission.pace import Pace
from openai_api.errors import RateLimited

async def main():
    rule = Rule(bucket=sys.argv[2], metric="requests", amount=60, per="hour", burst=60,
        pace=Pace.of("hour", 60, 60), when_away="closed", route="", each_route=False, subject="test")
    key = SimpleNamespace(public_id="k", rules=(rule,))
    gateway = Admission(sys.argv[1], count_gateways=lambda: 2)
    await gateway.start()
    print("ready", flush=True)
    sys.stdin.readline()
    asked = [gateway.admit(key, "m", prompt_bytes=1, max_tokens=1, request_id=f"{id(gateway)}-{at}")
        for at in range(100)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(one, RateLimited) for one in answers if isinstance(one, Exception)), answers
    print(sum(not isinstance(one, Exception) for one in answers), flush=True)
    await gateway.stop()

asyncio.run(main())
"""


def test_two_processes_let_through_exactly_the_limit(server: OwnRedis) -> None:
    bucket = f"processes-{next(_numbers)}"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, server.url, bucket],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
            for _ in range(2)
        ]
        for process in both:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        # Both at once, as near as can be.
        for process in both:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert sum(int(process.communicate(timeout=60)[0]) for process in both) == 60


async def test_what_one_limit_refuses_no_limit_counts(server: OwnRedis) -> None:
    async with gateways(server.url) as (gateway,):
        small, large, slots = rule(amount=2), rule("tokens", 1_000), rule("parallel", 5)
        of, other = key(small, large, slots), key(large, slots)
        assert await how_many(gateway, of, 10) == 2
        left = headers(await ask(gateway, other))
        # 20 tokens of each of the two, and of this one.
        assert left["x-ratelimit-remaining-tokens"] == str(1_000 - 3 * 20)
        assert await how_many(gateway, other, 10) == 2, "two of five slots were left"


async def test_a_key_without_limits_costs_no_question(server: OwnRedis) -> None:
    async with gateways("redis://127.0.0.1:1/0") as (gateway,):
        assert await gateway.admit(key(), "m", prompt_bytes=1, max_tokens=1, request_id="r") is None
        elsewhere = key(rule(route="other*", away="closed"))
        assert await gateway.admit(elsewhere, "m", prompt_bytes=1, max_tokens=1, request_id="r") is None


async def test_a_limit_of_a_model_is_that_models_and_one_of_each_is_each_ones(server: OwnRedis) -> None:
    async with gateways(server.url) as (gateway,):
        of = key(rule(amount=3, route="smol*"), rule(amount=5, each_route=True))
        assert await how_many(gateway, of, 10, model="smol-1") == 3
        assert await how_many(gateway, of, 10, model="smol-2") == 0
        assert await how_many(gateway, of, 10, model="big-1") == 5
        assert await how_many(gateway, of, 10, model="big-2") == 5


async def test_two_instances_on_one_redis_share_no_count(
    server: OwnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = key(rule(amount=3))
    async with gateways(server.url) as (ours,):
        assert await how_many(ours, of, 5) == 3
        from django.conf import settings as django_settings

        monkeypatch.setattr(django_settings, "SECRET_KEY", "another" * 10)
        async with gateways(server.url) as (theirs,):
            assert await how_many(theirs, of, 5) == 3


# -- time


async def test_when_it_says_try_again_it_lets_through_and_not_before(server: OwnRedis) -> None:
    async with gateways(server.url) as (gateway,):
        of = key(rule(amount=60, per="minute", burst=1))
        assert isinstance(await ask(gateway, of), Admitted)
        asked_at = time.monotonic()
        refused = await ask(gateway, of)
        wait = int(headers(refused)["retry-after-ms"]) / 1000
        assert 0.5 < wait <= 1.0
        assert headers(refused)["retry-after"] == "1"
        await asyncio.sleep(wait / 2)
        early = await ask(gateway, of)
        # This machine may have slept much longer than it was told to.
        assert isinstance(early, RateLimited) or time.monotonic() - asked_at > wait
        await asyncio.sleep(max(0.0, asked_at + wait - time.monotonic()) + 0.05)
        assert isinstance(early, Admitted) or isinstance(await ask(gateway, of), Admitted)


async def test_a_burst_is_all_that_goes_at_once(server: OwnRedis) -> None:
    async with gateways(server.url) as (gateway,):
        of = key(rule(amount=600, per="minute", burst=4))
        assert await how_many(gateway, of, 4) == 4
        refused = await ask(gateway, of)
        assert "Limit 600 (4 at once), Used 4, Requested 1" in str(refused)
        assert int(headers(refused)["retry-after-ms"]) <= 100


# -- tokens


async def test_tokens_are_estimated_then_trued_up(server: OwnRedis) -> None:
    async with gateways(server.url, 2) as (gateway, other):
        of = key(rule("input_tokens", 1_000), rule("output_tokens", 1_000, bucket=f"o{next(_numbers)}"))
        tokens = key(rule("tokens", 5_000))
        both = await ask(gateway, of, prompt_bytes=400, max_tokens=300)
        assert headers(both)["x-ratelimit-remaining-tokens"] == "700"
        assert isinstance(both, Admitted)
        both.progress(150, 350)
        both.progress(150, 20)  # never less than it was, while it runs
        await until_written(gateway)
        left = [await left_of(other, key(one)) for one in of.rules]
        assert left == [850, 650]
        both.settle(150, 360)
        both.settle(0, 0)  # the second time does nothing
        both.progress(900, 900)
        await until_written(gateway)
        assert [await left_of(other, key(one)) for one in of.rules] == [850, 640]

        many = await ask(gateway, tokens, prompt_bytes=400, max_tokens=None, choices=2)
        assert headers(many)["x-ratelimit-remaining-tokens"] == str(5_000 - 100 - 2 * admission.OUTPUT_GUESS)
        assert isinstance(many, Admitted)
        many.settle(0, 0)
        await until_written(gateway)
        assert await left_of(other, tokens) == 5_000


async def left_of(gateway: Admission, of: Any) -> int:
    """What a request without tokens sees. It is settled by itself: it has used nothing."""
    answer = await ask(gateway, of, prompt_bytes=0, max_tokens=0)
    return int(headers(answer)["x-ratelimit-remaining-tokens"])


async def until_written(gateway: Admission) -> None:
    await until(lambda: not gateway._to_write.is_set() and not gateway._to_add and not gateway._to_end)
    # Redis answers in the order of the questions: when it answers this one, all that was written is done.
    assert gateway._line is not None
    await gateway._line.ask(command(b"PING"))


async def test_an_estimate_never_shuts_a_request_out_for_good(server: OwnRedis) -> None:
    """Nobody knows beforehand what it will be: it needs a full bucket, and what it overdraws is paid back."""
    async with gateways(server.url) as (gateway,):
        of = key(rule("tokens", 100, "second"))
        began = time.monotonic()
        first = await ask(gateway, of, prompt_bytes=40_000, max_tokens=4_000)
        assert isinstance(first, Admitted)
        refused = await ask(gateway, of)
        assert isinstance(refused, TokensLimited)
        first.settle(10, 240)
        await until_written(gateway)
        refused = await ask(gateway, of)
        assert isinstance(refused, TokensLimited)
        # 250 used of 100, and 20 wanted: 170 parts of a hundred per second have to leak, from when it began.
        assert 1_700 - 1_000 * (time.monotonic() - began) - 100 <= int(headers(refused)["retry-after-ms"])
        assert int(headers(refused)["retry-after-ms"]) <= 1_700


async def test_a_client_that_asks_for_much_output_is_not_charged_more_than_a_bound(server: OwnRedis) -> None:
    async with gateways(server.url) as (gateway,):
        of = key(rule("output_tokens", 1_000_000))
        answer = await ask(gateway, of, max_tokens=10**9)
        assert headers(answer)["x-ratelimit-remaining-tokens"] == str(1_000_000 - admission.OUTPUT_MOST)


# -- parallel requests


async def test_slots_of_parallel_requests_are_given_back(server: OwnRedis) -> None:
    async with gateways(server.url, 2) as both:
        of = key(rule("parallel", 4))
        answers = await asyncio.gather(*(ask(both[at % 2], of) for at in range(20)))
        running = [answer for answer in answers if isinstance(answer, Admitted)]
        assert len(running) == 4
        refused = next(answer for answer in answers if isinstance(answer, RateLimited))
        assert "on parallel requests: Limit 4, Used 4, Requested 1" in str(refused)
        assert headers(refused)["retry-after"] == "1"
        for one in running[:3]:
            one.settle(1, 1)
        for one in both:
            await until_written(one)
        assert await how_many(both[0], of, 10) == 3


async def test_slots_of_a_dead_gateway_end_and_those_of_a_living_one_do_not(
    server: OwnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "SLOT_MS", 1_200)
    monkeypatch.setattr(admission, "HOLD_SECONDS", 0.2)
    of = key(rule("parallel", 2))
    async with gateways(server.url) as (living,):
        dead = Admission(server.url)
        await dead.start()
        assert isinstance(await ask(living, of), Admitted)
        assert isinstance(await ask(dead, of), Admitted)
        for task in dead._tasks:
            task.cancel()
        assert isinstance(await ask(living, of), RateLimited)
        await asyncio.sleep(1.3)
        assert isinstance(await ask(living, of), Admitted), "the dead one's slot is free again"
        await asyncio.sleep(1.3)
        assert isinstance(await ask(living, of), RateLimited), "both are held by the living one"
        await dead.stop()


# -- F34: Redis is away


async def test_f34_while_redis_is_away_each_gateway_counts_its_share(server: OwnRedis) -> None:
    async with gateways(server.url, 2) as both:
        fresh, used = key(rule(amount=10)), key(rule(amount=10))
        assert await how_many(both[0], used, 6) == 6
        server.kill()
        try:
            # What was used before is not forgotten by who used it.
            assert await how_many(both[0], used, 10) == 2
            assert [await how_many(one, fresh, 20) for one in both] == [5, 5]
            assert all(one.away for one in both)
        finally:
            server.start()
        await until(lambda: not any(one.away for one in both))
        # And Redis, which knows nothing any more, hears of it.
        assert [await how_many(one, fresh, 5) for one in both] == [0, 0]
        assert await how_many(both[1], used, 10) == 0


async def test_f34_open_and_closed_limits_do_as_they_say(server: OwnRedis) -> None:
    async with gateways(server.url) as (gateway,):
        opened, closed = key(rule(amount=2, away="open")), key(rule(amount=100, away="closed"))
        assert await how_many(gateway, opened, 5) == 2
        assert await how_many(gateway, closed, 5) == 5
        server.kill()
        try:
            assert await how_many(gateway, opened, 20) == 20
            with pytest.raises(LimitUnknown) as refused:
                await ask(gateway, closed)
            status, payload, _ = answer_to(refused.value)
            assert (status, payload["error"]["code"]) == (503, "storage")
        finally:
            server.start()
        await until(lambda: not gateway.away)
        assert await how_many(gateway, opened, 5) == 0
        assert await how_many(gateway, closed, 5) == 5


async def test_f34_what_an_open_limit_lets_through_meanwhile_counts_afterwards(server: OwnRedis) -> None:
    async with gateways(server.url) as (gateway,):
        of = key(rule("tokens", 1_000, away="open"))
        server.kill()
        try:
            answers = [await ask(gateway, of, prompt_bytes=400, max_tokens=1_000) for _ in range(3)]
            assert answers[0].headers == []
            for answer in answers:
                assert isinstance(answer, Admitted)
                answer.settle(100, 50)
        finally:
            server.start()
        await until(lambda: not gateway.away)
        assert await left_of(gateway, of) == 1_000 - 3 * 150


async def test_f34_nobody_waits_for_a_redis_that_is_away(server: OwnRedis) -> None:
    async with gateways("redis://127.0.0.1:1/0") as (gateway,):
        began = time.monotonic()
        assert await how_many(gateway, key(rule(amount=10)), 500) == 10
        # A tenth of a second each would be fifty.
        assert time.monotonic() - began < 10.0


async def test_without_any_redis_one_gateway_counts_exactly(server: OwnRedis) -> None:
    async with gateways(None) as (gateway,):
        assert not gateway.away
        of = key(rule(amount=10, away="closed"), rule("parallel", 3))
        running = [await ask(gateway, of) for _ in range(10)]
        admitted = [one for one in running if isinstance(one, Admitted)]
        assert len(admitted) == 3
        admitted[0].settle(1, 1)
        assert await how_many(gateway, of, 5) == 1


async def test_at_least_one_is_let_through_however_many_gateways_there_are() -> None:
    async with gateways(None, 5) as several:
        of, slots = key(rule(amount=2)), key(rule("parallel", 2))
        assert [await how_many(one, of, 3) for one in several] == [1] * 5
        assert [await how_many(one, slots, 3) for one in several] == [1] * 5


async def test_tokens_used_while_redis_is_away_count_for_each_gateway() -> None:
    async with gateways(None, 4) as (gateway, *_):
        of = key(rule("tokens", 1_000))
        answer = await ask(gateway, of, prompt_bytes=40, max_tokens=40)
        assert isinstance(answer, Admitted)
        assert headers(answer)["x-ratelimit-remaining-tokens"] == "200"  # (1000 - 4 * 50) / 4
        answer.settle(10, 90)
        assert headers(await ask(gateway, of, prompt_bytes=0, max_tokens=0))[
            "x-ratelimit-remaining-tokens"
        ] == str((1_000 - 4 * 100) // 4)


async def test_one_that_was_thought_to_need_more_than_there_is_gets_back_only_what_was_taken() -> None:
    async with gateways(None, 4) as (gateway, *_):
        of = key(rule("tokens", 1_000))
        answer = await ask(gateway, of, prompt_bytes=40, max_tokens=490)
        assert isinstance(answer, Admitted)
        answer.settle(10, 90)
        assert await left_of(gateway, of) == (1_000 - 4 * 100) // 4


# -- F35: Redis is emptied


async def test_f35_after_flushall_what_was_used_is_used(server: OwnRedis) -> None:
    async with gateways(server.url, 2) as both:
        of, slots = key(rule(amount=20)), key(rule("parallel", 4))
        assert await how_many(both[0], of, 10) == 10
        assert await how_many(both[1], of, 8) == 8
        running = [await ask(one, slots) for one in both]
        with server.client() as client:
            client.flushall()
        # The one that asks first brings what it knows, which is up to its own last question; the other
        # hears of it with its next question and adds what it knows.
        assert await how_many(both[1], of, 10) == 2
        assert await how_many(both[0], slots, 10) >= 2
        await until(lambda: both[0]._epoch == both[1]._epoch)
        await asyncio.sleep(0.1)
        assert await how_many(both[0], of, 10) == 0
        with server.client() as client:
            (name,) = [one for one in client.keys("*:parallel:*") if client.zcard(one)]
            held = {one.decode() for one in client.zrange(name, 0, -1)}
        assert {one._request_id for one in running if isinstance(one, Admitted)} <= held


async def test_a_redis_that_forgot_the_scripts_is_told_them_again(server: OwnRedis) -> None:
    async with gateways(server.url) as (gateway,):
        of = key(rule(amount=4), rule("tokens", 1_000))
        first = await ask(gateway, of)
        with server.client() as client:
            client.script_flush()
        assert isinstance(first, Admitted)
        first.settle(1, 1)
        await until_written(gateway)
        assert await how_many(gateway, of, 5) == 3
        assert not gateway.away


# -- F36: Redis is slow


async def test_f36_a_slow_redis_costs_each_waiting_request_a_tenth_of_a_second_and_the_next_ones_nothing(
    server: OwnRedis, caplog: pytest.LogCaptureFixture
) -> None:
    async with gateways(server.url) as (gateway,):
        of = key(rule(amount=1_000))
        assert isinstance(await ask(gateway, of), Admitted)
        server.freeze()
        try:
            with caplog.at_level(logging.WARNING, logger="roundhouse.limits"):
                began = time.monotonic()
                answers = await asyncio.gather(*(ask(gateway, of) for _ in range(20)))
                first = time.monotonic() - began
                began = time.monotonic()
                answers += [await ask(gateway, of) for _ in range(200)]
                after = time.monotonic() - began
        finally:
            server.thaw()
        assert all(isinstance(answer, Admitted) for answer in answers)
        assert 0.09 <= first < 1.5
        # A tenth of a second each would be twenty.
        assert after < 5.0
        told = [record for record in caplog.records if getattr(record, "event", "") == "limits_away"]
        assert len(told) == 1
        await until(lambda: not gateway.away)
        # Those that it did not answer in time were counted at least once.
        assert int(headers(await ask(gateway, of))["x-ratelimit-remaining-requests"]) <= 1_000 - 222


# -- S31: nobody gets another's reply


async def test_s31_however_many_are_cancelled_each_reply_reaches_who_asked_for_it(server: OwnRedis) -> None:
    line = await connect(server.url, (), lambda _: None)
    crossed: list[tuple[bytes, bytes]] = []
    answered = 0

    async def echo(nonce: bytes) -> None:
        nonlocal answered
        reply = await line.ask(command(b"ECHO", nonce))
        answered += 1
        if reply != nonce:
            crossed.append((nonce, reply))

    for number in range(0, 20_000, 200):
        tasks = [asyncio.create_task(echo(b"%d" % (number + at))) for at in range(200)]
        await asyncio.sleep(0)
        for task in tasks[number % 7 :: 3]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    line.end("The test is over.")
    assert crossed == []
    assert answered > 10_000


async def test_s31_a_reply_with_another_number_ends_the_connection() -> None:
    async def liar(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"*2\r\n:99\r\n:1\r\n")
        await writer.drain()
        await reader.read()
        writer.close()
        over.set()

    over = asyncio.Event()
    lost: list[Line] = []
    async with await asyncio.start_server(liar, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        line = await connect(f"redis://127.0.0.1:{port}/0", (), lost.append)
        with pytest.raises(RedisAway, match="another's reply"):
            await line.ask(command(b"X"), line.next_number())
        with pytest.raises(RedisAway):
            await line.ask(command(b"X"), line.next_number())
        await over.wait()
    assert lost == [line]


async def test_a_cancelled_request_holds_no_slot_and_no_tokens(server: OwnRedis) -> None:
    async with gateways(server.url) as (gateway,):
        of, tokens = key(rule("parallel", 3)), rule("tokens", 1_000)
        both = key(*of.rules, tokens)
        for _ in range(20):
            task = asyncio.create_task(ask(gateway, both))
            # Asked, and gone before the answer.
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(0.005)
        await until_written(gateway)
        assert await how_many(gateway, of, 5) == 3
        assert await left_of(gateway, key(tokens)) == 1_000


async def test_one_that_is_cancelled_when_its_reply_has_come_holds_nothing_either(server: OwnRedis) -> None:
    async with gateways(server.url) as (gateway,):
        of = key(rule("parallel", 1))
        task = asyncio.create_task(ask(gateway, of))
        line = gateway._line
        assert line is not None
        received = line.data_received

        def receive(data: bytes) -> None:
            received(data)
            task.cancel()

        line.data_received = receive  # type: ignore[method-assign]
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        line.data_received = received  # type: ignore[method-assign]
        await until_written(gateway)
        assert isinstance(await ask(gateway, of), Admitted)


@pytest.fixture
def private_redis(tmp_path: Path) -> Iterator[str]:
    folder = socket_folder(tmp_path)
    server = subprocess.Popen(redis_command(folder), stdin=subprocess.DEVNULL)
    yield redis_url(folder)
    server.kill()
    server.wait()
    for left in folder.iterdir():
        left.unlink()
    folder.rmdir()


async def test_the_private_redis_is_reached_through_its_socket(private_redis: str) -> None:
    async with gateways(private_redis) as (gateway,):
        await until(lambda: not gateway.away)
        assert await how_many(gateway, key(rule(amount=3)), 5) == 3
        line = gateway._line
        assert line is not None
        assert len(await line.ask(command(b"KEYS", b"*:limit:*"))) == 2, "the epoch and the bucket"


async def test_a_redis_with_a_password_and_a_database_number(server: OwnRedis) -> None:
    with server.client() as client:
        client.config_set("requirepass", "of the tests")
    try:
        url = f"{server.url.replace('redis://', 'redis://:of%20the%20tests@').rpartition('/')[0]}/5"
        async with gateways(url) as (gateway,):
            assert not gateway.away
            assert await how_many(gateway, key(rule(amount=2)), 5) == 2
        with redis.Redis.from_url(url) as client:
            assert client.dbsize() > 0
            client.config_set("requirepass", "")
    finally:
        server.kill()
        server.start()


async def test_a_wrong_password_is_a_redis_that_is_away(server: OwnRedis) -> None:
    url = server.url.replace("redis://", "redis://:wrong@")
    async with gateways(url) as (gateway,):
        assert gateway.away
        assert await how_many(gateway, key(rule(amount=2)), 5) == 2


# -- the script, against a small model of it

Step = tuple[str, int, int, int]
steps = st.lists(
    st.tuples(
        st.sampled_from(["admit", "admit", "admit", "wait", "add", "raise"]),
        st.integers(0, 5_000),
        st.integers(0, 40),
        st.integers(0, 40),
    ),
    max_size=25,
)
limits = st.lists(
    st.tuples(st.sampled_from(list(Per)), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=3
)


def by_a_clock_of_ours(script: str) -> str:
    ours = "{tonumber(redis.call('GET', 'clock')) / 1000, 0}"
    assert "redis.call('TIME')" in script
    return script.replace("redis.call('TIME')", ours)


def check_script(client: redis.Redis, kinds: list[tuple[Per, int, int]], asked: list[Step]) -> None:
    """The same limits as fractions; all are checked before any is debited."""
    admit = client.register_script(by_a_clock_of_ours(ADMIT))
    amend = client.register_script(by_a_clock_of_ours(AMEND))
    paces = [Pace.of(*kind) for kind in kinds]
    names = [f"h{next(_numbers)}" for _ in paces]
    now = 1_700_000_000_000
    client.mset({"clock": now, "epoch": 7})
    levels = [Fraction(0)] * len(paces)
    seen_at = [now // pace.tick_ms for pace in paces]

    def leak() -> None:
        for at, pace in enumerate(paces):
            ticks = now // pace.tick_ms - seen_at[at]
            levels[at] = max(Fraction(0), levels[at] - Fraction(pace.amount, pace.parts) * ticks)
            seen_at[at] = now // pace.tick_ms

    for what, long, first, second in asked:
        costs = [min(cost, pace.burst) for cost, pace in zip((first, second, 1), paces, strict=False)]
        if what == "wait":
            now += long
            client.set("clock", now)
            continue
        leak()
        if what == "admit":
            fields = [
                number
                for pace, cost in zip(paces, costs, strict=True)
                for number in (pace.tick_ms, pace.parts, pace.amount, pace.burst, cost)
            ]
            reply = admit(["epoch", *names], [5, "request", *fields])
            fits = all(
                not cost or level + cost <= pace.burst
                for level, cost, pace in zip(levels, costs, paces, strict=True)
            )
            assert reply[:3] == [5, 7, int(fits)]
            if fits:
                levels = [level + cost for level, cost in zip(levels, costs, strict=True)]
            assert [Fraction(part, pace.parts) for part, pace in zip(reply[3:], paces, strict=True)] == levels
        else:
            count = first - second
            pace = paces[0]
            value = count if what == "add" else first * pace.parts
            amend(["epoch", names[0]], [5, 0, what, pace.tick_ms, pace.parts, pace.amount, value])
            levels[0] = (
                max(Fraction(0), levels[0] + count) if what == "add" else max(levels[0], Fraction(first))
            )


@given(limits, steps)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_script_does_what_the_model_does(
    server: OwnRedis, kinds: list[tuple[Per, int, int]], asked: list[Step]
) -> None:
    with server.client() as client:
        check_script(client, kinds, asked)


@pytest.mark.full
@given(limits, steps)
@settings(max_examples=5_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_script_does_what_the_model_does_at_length(
    server: OwnRedis, kinds: list[tuple[Per, int, int]], asked: list[Step]
) -> None:
    with server.client() as client:
        check_script(client, kinds, asked)


def test_the_largest_limit_is_exact_in_the_script(server: OwnRedis) -> None:
    with server.client() as client:
        check_script(
            client,
            [(Per.DAY, 999_999_937, 1_000_000_000)],
            [("admit", 0, 40, 0), ("wait", 1_234, 0, 0), ("admit", 0, 39, 0), ("raise", 0, 40, 0)],
        )


# -- what it costs


async def test_a_limited_request_costs_less_than_60_us_of_cpu(
    server: OwnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is trued up goes to Redis in the background, for all that ended meanwhile together.
    monkeypatch.setattr(admission, "BATCH_SECONDS", 3_600)
    async with gateways(server.url) as (gateway,):
        of = key(rule(amount=10**9), rule("tokens", 10**9))
        ping = command(b"PING")

        async def limited() -> None:
            answer = await gateway.admit(of, "m", prompt_bytes=40, max_tokens=10, request_id="r")
            assert answer is not None
            answer.progress(5, 2)
            answer.settle(5, 5)

        async def bare() -> None:
            assert gateway._line is not None
            await gateway._line.ask(ping)

        async def none() -> None:
            assert (
                await gateway.admit(key_without, "m", prompt_bytes=40, max_tokens=10, request_id="r") is None
            )

        way, whole, nothing = await cpu(bare), await cpu(limited), await cpu(none)
        # Less what a question to Redis costs by itself: some 10 us, more where much else runs here.
        assert whole - way < max(60e-6, 6 * way)
        assert nothing < max(2e-6, way / 5)


async def test_what_ends_together_goes_to_redis_together(
    server: OwnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateways(server.url) as (gateway,):
        of = key(rule("tokens", 10**6), rule("parallel", 1_000))
        answers = [await ask(gateway, of) for _ in range(150)]
        line = gateway._line
        assert line is not None
        asked: list[bytes] = []
        really = line.ask

        async def watched(packed: bytes, *rest: Any) -> Any:
            asked.append(packed)
            return await really(packed, *rest)

        monkeypatch.setattr(line, "ask", watched)
        for answer in answers:
            assert isinstance(answer, Admitted)
            answer.settle(3, 3)
        await until_written(gateway)
        amended = [packed for packed in asked if b"EVALSHA" in packed]
        assert len(amended) == 2, "one for the tokens, one for the slots"
        assert await how_many(gateway, key(of.rules[1]), 1_001) == 1_000


key_without = key()


async def cpu(call: Callable[[], Awaitable[Any]], rounds: int = 12, each: int = 150) -> float:
    spent = []
    for _ in range(rounds):
        began = time.thread_time()
        for _ in range(each):
            await call()
        spent.append((time.thread_time() - began) / each)
    return min(spent)
