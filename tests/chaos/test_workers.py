"""F1 to F4, F7 to F9, F23 to F25: workers that die, hang or lie under a request. Their processes and sockets
are real."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest

from config.front import make_application
from inference.dispatch import breaker, retries
from registry.actions.events import publish_change
from registry.models import Deployment, Route, UsageEvent
from registry.states import Outcome
from registry.threads import in_database
from tests.api.conftest import CAPABILITIES, ROUTE, Served, Worker, eventually, say, serving, worker_process
from tests.chaos.clients import leases, read_until, sent
from tests.chaos.liar import HEAD, LAST, Asked, Liar, chunk, liar
from tests.chaos.proxy import proxy_to, reset
from tests.factories import make_api_key, make_deployment, make_worker

pytestmark = pytest.mark.django_db(transaction=True)

WORD = "wörd"
TOKENS = 6
QUESTION = say(f"!say {WORD} !tokens {TOKENS}")
ANSWER = " ".join([WORD] * TOKENS)


async def read(stream: Any) -> tuple[str, Any, list[str]]:
    """The text, the usage and the finish reasons."""
    text, usage, reasons = "", None, []
    async for part in stream:
        usage = part.usage or usage
        for choice in part.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    return text, usage, reasons


def events() -> list[UsageEvent]:
    return list(UsageEvent.objects.order_by("started_at"))


async def rows(count: int) -> list[UsageEvent]:
    """The ledger, which has so many requests."""
    return await in_database(  # type: ignore[no-any-return]
        lambda: eventually(lambda: len(found := events()) == count and found, f"{count} rows")
    )


@contextlib.contextmanager
def front_of(**seconds: Any) -> Iterator[Served]:
    """A gateway; `seconds` are its route's bounds."""
    Route.objects.filter(name=ROUTE).update(**seconds)
    publish_change("route", ROUTE)
    with serving(front := make_application()) as port:
        yield Served(port, make_api_key(name="tests")[1], front)


@contextlib.contextmanager
def real(count: int, *, deployment: Any, first_id: int, **arguments: Any) -> Iterator[dict[str, Worker]]:
    """Real workers of the simulated engine, by name."""
    with contextlib.ExitStack() as stack:
        found = {}
        for replica in range(count):
            running = stack.enter_context(worker_process(first_id + replica, **arguments))
            row = make_worker(
                deployment=deployment, id=first_id + replica, url=running.url, capabilities=CAPABILITIES
            )
            found[row.name] = running
        yield found


# -- F23 to F25, F9: a worker that lies


async def bad_json(asked: Asked) -> AsyncIterator[bytes]:
    yield chunk(b'data: {"id":"chatcmpl-' + asked.request_id.encode() + b'","choices":[{]}\n\n')


async def broken_utf8(asked: Asked) -> AsyncIterator[bytes]:
    whole = asked.event("BROKEN", 3).partition(b"\r\n")[2][:-2]
    yield chunk(whole.replace(b"BROKEN", b"w\xc3 rd"))


async def half_an_event(asked: Asked) -> AsyncIterator[bytes]:
    yield asked.event("never", 3)[:-20]


async def no_end(asked: Asked) -> AsyncIterator[bytes]:
    yield LAST


async def no_reason(asked: Asked) -> AsyncIterator[bytes]:
    yield chunk(b"data: [DONE]\n\n") + LAST


async def ten_megabytes(asked: Asked) -> AsyncIterator[bytes]:
    for _ in range(160):
        yield chunk(b"x" * 65536)


async def anothers(asked: Asked) -> AsyncIterator[bytes]:
    yield Asked("req_of_somebody_else", {}).event("secret", 3)


async def an_error(asked: Asked) -> AsyncIterator[bytes]:
    yield chunk(b'data: {"error":{"message":"internal"}}\n\n')


async def html(asked: Asked) -> AsyncIterator[bytes]:
    yield chunk(b"<html><h1>502 Bad Gateway</h1></html>\n\n")


async def silence(asked: Asked) -> AsyncIterator[bytes]:
    await asyncio.sleep(60)
    yield b""


LIES = (
    *(bad_json, broken_utf8, half_an_event, no_end, no_reason),
    *(ten_megabytes, anothers, an_error, html, silence),
)


async def page(asked: Asked) -> AsyncIterator[bytes]:
    """200, and then a page of some proxy."""
    yield b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\n\r\n<html></html>"


async def truth_in_single_bytes(asked: Asked) -> AsyncIterator[bytes]:
    """Nothing is wrong with it, but how it is cut."""
    truth = HEAD
    for count in range(1, TOKENS + 1):
        more = {"finish_reason": "stop"} if count == TOKENS else {}
        truth += asked.event(f" {WORD}" if count > 1 else WORD, count, **more)
    truth += asked.event("", TOKENS, usage_only=True)
    truth += chunk(b"data: [DONE]\n\n") + LAST
    for at in range(len(truth)):
        yield truth[at : at + 1]


@pytest.fixture
def lied_to(transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Served, Liar, Worker]]:
    """A gateway with two workers, of which one lies; each gets every other request."""
    monkeypatch.setattr(retries, "LEAST", 1000)
    monkeypatch.setattr(breaker, "FAILURES", 1000)
    deployment = make_deployment(route=ROUTE, policy="round_robin")
    with liar() as lying, real(1, deployment=deployment, first_id=7021) as honest:
        make_worker(deployment=deployment, id=7022, url=lying.url, capabilities=CAPABILITIES)
        # Not shorter: where others use the processor too, an honest worker has been silent for a second.
        with front_of(first_token_seconds=3, idle_seconds=2) as served:
            yield served, lying, *honest.values()


async def test_what_a_lying_worker_sends_is_made_good_by_another(
    lied_to: tuple[Served, Liar, Worker],
) -> None:
    served, lying, honest = lied_to
    asked = 0
    async with served.client() as client:
        for lie in (*LIES, page, truth_in_single_bytes):
            for tokens in (2, 0) if lie in LIES else (0,):

                async def answer(asked: Asked, lie: Any = lie, tokens: int = tokens) -> AsyncIterator[bytes]:
                    if lie in LIES:
                        yield HEAD
                    for count in range(1, tokens + 1):
                        yield asked.event(f" {WORD}" if count > 1 else WORD, count)
                    async for piece in lie(asked):
                        yield piece

                lying.answer = answer
                before = len(lying.asked)
                while len(lying.asked) == before:
                    stream = await client.chat.completions.create(
                        **QUESTION, stream=True, stream_options={"include_usage": True}
                    )
                    text, usage, reasons = await read(stream)
                    asked += 1
                    case = lie.__name__, tokens
                    assert (case, text) == (case, ANSWER)
                    assert (case, reasons) == (case, ["stop"])
                    assert (case, usage.completion_tokens) == (case, TOKENS)
                    told = 4 if tokens or lie is truth_in_single_bytes else usage.prompt_tokens
                    if len(lying.asked) > before:
                        assert (case, usage.prompt_tokens) == (case, told)
        lying.answer = page
        for _ in range(2):
            whole = await client.chat.completions.create(**QUESTION)
            assert whole.choices[0].message.content == ANSWER
            asked += 1
    ledger = await rows(asked)
    assert {(row.outcome, row.status, row.completion_tokens) for row in ledger} == {(Outcome.OK, 200, TOKENS)}
    assert {row.attempts for row in ledger} == {1, 2}
    eventually(lambda: leases(served) == 0 and honest.load()["running"] == 0, "the slots are free", seconds=5)


async def test_a_lie_that_nobody_makes_good_ends_with_an_error(
    transactional_db: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve() -> Any:
        stack = contextlib.ExitStack()
        lying = stack.enter_context(liar())
        deployment = make_deployment(route=ROUTE)
        make_worker(deployment=deployment, id=7023, url=lying.url, capabilities=CAPABILITIES)
        return stack, lying, stack.enter_context(front_of(idle_seconds=1))

    async def answer(asked: Asked) -> AsyncIterator[bytes]:
        yield HEAD
        yield asked.event(WORD, 1)
        async for piece in broken_utf8(asked):
            yield piece

    stack, lying, served = await in_database(serve)
    with stack:
        lying.answer = answer
        async with served.client() as client:
            stream = await client.chat.completions.create(**QUESTION, stream=True)
            first = await anext(stream)
            assert first.choices[0].delta.content == WORD
            with pytest.raises(openai.APIError) as broken:
                await read(stream)
        assert broken.value.code == "stream_interrupted"
        [row] = await rows(1)
        assert (row.outcome, row.completion_tokens) == (Outcome.INTERRUPTED, 1)


async def test_who_leaves_with_all_of_his_answer_has_had_it(
    transactional_db: None,
) -> None:
    """The worker's connection ends a moment after the answer, and the client is gone by then."""

    async def answer(asked: Asked) -> AsyncIterator[bytes]:
        yield HEAD
        yield asked.event(WORD, 1, finish_reason="stop")
        yield chunk(b"data: [DONE]\n\n")
        await asyncio.sleep(0.05)
        yield LAST

    def serve() -> Any:
        stack = contextlib.ExitStack()
        lying = stack.enter_context(liar())
        make_worker(
            deployment=make_deployment(route=ROUTE), id=7024, url=lying.url, capabilities=CAPABILITIES
        )
        return stack, lying, stack.enter_context(front_of())

    stack, lying, served = await in_database(serve)
    with stack:
        lying.answer = answer
        for leave in (reset, socket.socket.close):
            connected = sent(served, QUESTION | {"stream": True})
            await asyncio.to_thread(read_until, connected, b"[DONE]")
            leave(connected)
        assert [(row.outcome, row.status) for row in await rows(2)] == [(Outcome.OK, 200)] * 2
        assert lying.aborted == []


# -- F1, F3, F4: a worker that dies


@pytest.fixture
def pair(transactional_db: None) -> Iterator[tuple[Served, dict[str, Worker]]]:
    deployment = make_deployment(route=ROUTE, policy="round_robin", queue_seconds=2)
    with real(2, deployment=deployment, first_id=7031) as workers, front_of() as served:
        yield served, workers


async def test_one_that_dies_before_its_first_token_is_replaced_at_once(
    pair: tuple[Served, dict[str, Worker]],
) -> None:
    served, workers = pair
    victim, other = workers.values()
    slow = say(f"!say {WORD} !tokens 2 !slow 0.7")

    async def ask(stream: bool) -> tuple[str, float]:
        """The text, and when its first word was here, or all of a whole answer."""
        async with served.client() as client:
            answer = await client.chat.completions.create(**slow, stream=stream)
            if not stream:
                return answer.choices[0].message.content, time.monotonic()
            first = await anext(answer)
            while not first.choices[0].delta.content:
                first = await anext(answer)
            here = time.monotonic()
            return first.choices[0].delta.content + (await read(answer))[0], here

    # More than the budget of second tries: what one had when it died is not held against anybody.
    tasks = {asyncio.create_task(ask(stream)): stream for stream in [True, False] * 10}
    while [worker.load()["running"] for worker in workers.values()] != [10, 10]:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    killed = time.monotonic()
    victim.process.kill()
    for task, stream in tasks.items():
        text, here = await task
        assert text == f"{WORD} {WORD}"
        # Undisturbed it takes 0.7 s to the first word, 1.4 s to the end.
        assert here - killed < (0.7 if stream else 1.4) + 1.0
    ledger = await rows(20)
    assert {(row.outcome, row.completion_tokens) for row in ledger} == {(Outcome.OK, 2)}
    assert sorted(row.attempts for row in ledger) == [1] * 10 + [2] * 10
    eventually(lambda: leases(served) == 0 and other.load()["running"] == 0, "the slots are free", seconds=5)


async def test_of_one_that_dies_in_mid_stream_clients_see_a_pause(
    pair: tuple[Served, dict[str, Worker]],
) -> None:
    served, workers = pair
    victim, other = workers.values()
    question = say(f"!say {WORD} !tokens 60 !slow 0.02") | {"stream": True}
    begun = 0

    async def ask() -> tuple[str, float]:
        nonlocal begun
        text, pause, last = "", 0.0, 0.0
        async with served.client() as client:
            async for part in await client.chat.completions.create(**question):
                if part.choices and part.choices[0].delta.content:
                    now = time.monotonic()
                    if last:
                        pause = max(pause, now - last)
                    else:
                        begun += 1
                    last = now
                    text += part.choices[0].delta.content
        return text, pause

    asking = [asyncio.create_task(ask()) for _ in range(8)]
    while begun < len(asking):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    victim.process.kill()
    told = await asyncio.gather(*asking)
    assert {text for text, _ in told} == {" ".join([WORD] * 60)}
    assert max(pause for _, pause in told) <= 2.0
    ledger = await rows(8)
    assert {(row.outcome, row.completion_tokens) for row in ledger} == {(Outcome.OK, 60)}
    assert sum(row.attempts == 2 for row in ledger) == 4
    eventually(lambda: leases(served) == 0 and other.load()["running"] == 0, "the slots are free", seconds=5)


async def test_when_all_of_a_models_workers_die_it_is_told_and_other_models_are_served(
    pair: tuple[Served, dict[str, Worker]],
) -> None:
    served, workers = pair

    def another_model() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(real(1, deployment=make_deployment(route="org/other"), first_id=7041))
        publish_change("route", "org/other")
        fleet = served.front.gateway.fleet
        known = lambda: (route := fleet.route("org/other")) and route.targets[0][0].workers  # noqa: E731
        eventually(known, "its worker is known")
        return stack

    with await in_database(another_model):
        async with served.client() as client:
            slow = say("!tokens 100 !slow 0.05")
            streams = [await client.chat.completions.create(**slow, stream=True) for _ in range(2)]
            for stream in streams:
                await anext(stream)
            whole = asyncio.create_task(client.chat.completions.create(**slow))
            while sum(worker.load()["running"] for worker in workers.values()) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            for worker in workers.values():
                worker.process.kill()
            for stream in streams:
                with pytest.raises(openai.APIError) as broken:
                    await read(stream)
                assert broken.value.code in ("stream_interrupted", "poison")
            with pytest.raises(openai.InternalServerError) as refused:
                await whole
            assert refused.value.code in ("server_is_overloaded", "poison")
            began = time.monotonic()
            with pytest.raises(openai.InternalServerError) as refused:
                await client.chat.completions.create(**say("anybody there?"))
            assert (refused.value.status_code, refused.value.code) == (503, "server_is_overloaded")
            assert int(refused.value.response.headers["retry-after"]) >= 1
            assert 2 <= time.monotonic() - began < 5, "as long as it would have waited for a busy worker"
            for _ in range(5):
                await client.chat.completions.create(**say("!tokens 2") | {"model": "org/other"})
    ledger = await rows(9)
    assert sorted(row.outcome for row in ledger if row.status != 200) == [Outcome.FAILED, Outcome.FAILED]
    assert {row.completion_tokens for row in ledger if row.status != 200} == {0}
    assert [row.outcome for row in ledger if row.stream] == [Outcome.INTERRUPTED] * 2
    assert all(row.completion_tokens > 0 for row in ledger if row.stream)
    eventually(lambda: leases(served) == 0, "the slots are free", seconds=5)


async def test_while_the_workers_of_a_model_are_replaced_its_requests_wait(
    pair: tuple[Served, dict[str, Worker]],
) -> None:
    served, workers = pair

    def replaced() -> contextlib.ExitStack:
        deployment = Deployment.objects.get()
        deployment.workers.all().delete()
        stack = contextlib.ExitStack()
        stack.enter_context(real(1, deployment=deployment, first_id=7051))
        return stack

    number = await in_database(
        lambda: Deployment.objects.update(queue_seconds=30) and Deployment.objects.get().pk
    )
    await in_database(publish_change, "deployment", str(number))
    fleet = served.front.gateway.fleet
    await in_database(eventually, lambda: fleet.deployment(number).queue_seconds == 30, "that is known")
    for worker in workers.values():
        worker.process.kill()
    async with served.client() as client:
        # Who is the first to find that out is told at once.
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(**QUESTION)
        asking = [asyncio.create_task(client.chat.completions.create(**QUESTION)) for _ in range(3)]
        while served.front.gateway.dispatcher.waiting(number) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        with await in_database(replaced):
            answers = await asyncio.gather(*asking)
    assert {answer.choices[0].message.content for answer in answers} == {ANSWER}


# -- F7, F8: a worker that hangs


@pytest.mark.full
async def test_a_worker_that_hangs_is_left_and_what_it_says_when_it_is_back_is_not_heard(
    transactional_db: None,
) -> None:
    def serve() -> Any:
        stack = contextlib.ExitStack()
        deployment = make_deployment(route=ROUTE, policy="round_robin")
        workers = stack.enter_context(real(2, deployment=deployment, first_id=7051, token_seconds=0.02))
        return stack, workers, stack.enter_context(front_of(first_token_seconds=2, idle_seconds=2))

    stack, workers, served = await in_database(serve)
    with stack:
        async with served.client() as client:
            question = say("!tokens 60") | {"stream": True, "stream_options": {"include_usage": True}}
            whole = await read(await client.chat.completions.create(**question))
            streams = [await client.chat.completions.create(**question) for _ in range(2)]
            begun = [(await anext(stream)).choices[0].delta.content or "" for stream in streams]
            stopped, _ = workers.values()
            os.kill(stopped.process.pid, signal.SIGSTOP)
            try:
                # One is in mid-stream at the stopped one, and one of the next two has not begun there.
                streams += [await client.chat.completions.create(**question) for _ in range(2)]
                began = time.monotonic()
                told = await asyncio.gather(*map(read, streams))
                assert time.monotonic() - began < 9
            finally:
                os.kill(stopped.process.pid, signal.SIGCONT)
            for at, (text, usage, reasons) in enumerate(told):
                text = (begun[at] if at < len(begun) else "") + text
                assert (text, reasons) == (whole[0], ["stop"])
                assert (usage.prompt_tokens, usage.completion_tokens) == (2, 60)
        ledger = await rows(5)
        assert {(row.outcome, row.completion_tokens) for row in ledger} == {(Outcome.OK, 60)}
        assert sorted(row.attempts for row in ledger) == [1, 1, 1, 2, 2]
        eventually(
            lambda: leases(served) == 0 and not any(one.load()["running"] for one in workers.values()),
            "nothing runs any more",
            seconds=5,
        )


# -- a bad network between gateway and worker


@pytest.mark.full
async def test_a_bad_network_between_them_changes_no_answer(
    transactional_db: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "LEAST", 1000)
    monkeypatch.setattr(breaker, "FAILURES", 1000)

    def serve() -> Any:
        stack = contextlib.ExitStack()
        deployment = make_deployment(route=ROUTE, policy="round_robin")
        [near] = stack.enter_context(real(1, deployment=deployment, first_id=7061)).values()
        far = stack.enter_context(worker_process(7062))
        between = stack.enter_context(proxy_to(far.url))
        make_worker(deployment=deployment, id=7062, url=between.url, capabilities=CAPABILITIES)
        return (
            stack,
            (near, far),
            between,
            stack.enter_context(front_of(first_token_seconds=3, idle_seconds=2)),
        )

    stack, workers, between, served = await in_database(serve)
    question = say(f"!say {WORD} !tokens 20 !slow 0.02") | {"stream": True}
    answer = " ".join([WORD] * 20)

    async def ask() -> str:
        async with served.client() as client:
            return (await read(await client.chat.completions.create(**question)))[0]

    with stack:
        between.piece, between.delay = 7, 0.001
        assert await asyncio.gather(ask(), ask()) == [answer] * 2
        between.piece, between.delay = 65536, 0.0
        for do in (between.cut, between.hold, between.half_close):
            asking = [asyncio.create_task(ask()) for _ in range(4)]
            await asyncio.sleep(0.2)
            do()
            assert [await one for one in asking] == [answer] * 4, do
            between.go_on()
        between.changed = lambda data: data.replace(b"w", b"\xff")
        assert await asyncio.gather(*(ask() for _ in range(4))) == [answer] * 4
        assert between.connections > 5
        ledger = await rows(18)
        assert {(row.outcome, row.completion_tokens) for row in ledger} == {(Outcome.OK, 20)}
        eventually(
            lambda: leases(served) == 0 and not any(one.load()["running"] for one in workers),
            "nothing runs any more",
            seconds=5,
        )
