"""What a route says of its requests: fallbacks, how long each part may take, sessions; and how one request
was dispatched."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import openai
import pytest
from django.contrib.auth import get_user_model
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from config.front import make_application
from inference.dispatch.explanations import LATEST
from openai_api import limits
from registry.actions.events import publish_change
from registry.models import Deployment, Route, RouteTarget, UsageEvent
from registry.threads import in_database
from tests.api.conftest import CAPABILITIES, ROUTE, Served, Worker, eventually, say, serving, worker_process
from tests.factories import make_api_key, make_deployment, make_worker
from tests.usage import make_event

FIRST, FALLBACK = 531, 532


@pytest.fixture
def two(transactional_db: None) -> Iterator[tuple[Served, Worker, Worker]]:
    """A gateway, a worker of one slot, and the worker of a fallback: a token in 5 ms each."""
    with contextlib.ExitStack() as stack:
        workers = []
        for rank, worker_id in enumerate((FIRST, FALLBACK)):
            deployment = make_deployment(route=ROUTE, name=("first", "fallback")[rank], slots=1)
            RouteTarget.objects.filter(deployment=deployment).update(rank=rank)
            running = stack.enter_context(worker_process(worker_id, tokens_per_second=200))
            make_worker(deployment=deployment, id=worker_id, url=running.url, capabilities=CAPABILITIES)
            workers.append(running)
        publish_change("route", ROUTE)
        front = make_application()
        with serving(front) as port:
            yield Served(port, make_api_key(name="tests")[1], front), workers[0], workers[1]


def set_times(served: Served, **seconds: float) -> None:
    Route.objects.filter(name=ROUTE).update(**seconds)
    publish_change("route", ROUTE)
    assert served.front is not None
    fleet = served.front.gateway.fleet
    name, value = next(iter(seconds.items()))
    eventually(
        lambda: getattr(fleet.route(ROUTE).timeouts, name.removesuffix("_seconds")) == value,
        "the gateway knows the route's times",
    )


def deployments_of(served: Served, *request_ids: str) -> list[str]:
    return [served.event(one).deployment for one in request_ids]


def stop(worker: Worker) -> None:
    os.kill(worker.process.pid, signal.SIGSTOP)


async def test_a_fallback_answers_while_the_first_is_busy(two):
    served, _, _ = two
    async with served.client() as client:
        busy = await client.chat.completions.create(**say("!tokens 100"), stream=True)
        other = await client.chat.completions.with_raw_response.create(**say("!tokens 2"))
        async for _ in busy:
            pass
        after = await client.chat.completions.with_raw_response.create(**say("!tokens 2"))
    ids = [other.headers["x-request-id"], after.headers["x-request-id"]]
    assert await in_database(deployments_of, served, *ids) == ["fallback", "first"]


async def test_a_fallback_answers_when_the_first_fails(two):
    served, first, _ = two
    first.process.kill()
    first.process.wait(10)
    async with served.client() as client:
        answer = await client.chat.completions.with_raw_response.create(**say("!tokens 2"))
    assert await in_database(deployments_of, served, answer.headers["x-request-id"]) == ["fallback"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_silent_worker_is_given_up_before_its_first_token(two, stream: bool):
    served, first, _ = two
    await in_database(set_times, served, first_token_seconds=1)
    stop(first)
    async with served.client() as client:
        began = time.monotonic()
        answer = await client.chat.completions.with_raw_response.create(**say("!tokens 2"), stream=stream)
        assert 0.9 < time.monotonic() - began < 4
    assert await in_database(deployments_of, served, answer.headers["x-request-id"]) == ["fallback"]


async def test_a_stream_that_falls_silent_goes_on_elsewhere(two):
    served, first, _ = two
    await in_database(set_times, served, idle_seconds=1)
    async with served.client() as client:
        whole = await client.chat.completions.create(**say("!tokens 60"))
        text, longest, at = "", 0.0, time.monotonic()
        async for chunk in await client.chat.completions.create(**say("!tokens 60"), stream=True):
            text += chunk.choices[0].delta.content or ""
            longest, at = max(longest, time.monotonic() - at), time.monotonic()
            if len(text) > 40 and first.process.poll() is None:
                stop(first)
    assert text == whole.choices[0].message.content
    assert 0.9 < longest < 4


async def test_a_request_has_so_much_time_and_no_more(two):
    served, first, _ = two
    await in_database(set_times, served, total_seconds=1)
    began = time.monotonic()
    async with served.client() as client:
        with pytest.raises(openai.APIStatusError) as refused:
            await client.chat.completions.create(**say("!tokens 2000"))
        assert 0.9 < time.monotonic() - began < 3
        assert (refused.value.status_code, refused.value.code) == (504, "timeout")
        assert refused.value.response.headers["x-should-retry"] == "false"
        assert "1 seconds" in refused.value.message

        seen = 0
        stream = await client.chat.completions.create(**say("!tokens 2000"), stream=True)
        with pytest.raises(openai.APIError) as cut:  # noqa: PT012 - it comes between the chunks
            async for _ in stream:
                seen += 1
        assert cut.value.code == "timeout"
        assert seen > 20
        eventually(lambda: first.load()["running"] == 0, "the worker was told to stop", seconds=2)
        # One that is quick enough is not concerned, and leaves nothing behind.
        await client.chat.completions.create(**say("!tokens 2"))

    def rows() -> list[UsageEvent]:
        return list(UsageEvent.objects.order_by("started_at"))

    ended = await in_database(lambda: eventually(lambda: len(rows()) == 3 and rows(), "three rows"))
    assert [(row.status, row.outcome) for row in ended] == [
        (504, "failed"),
        (200, "interrupted"),
        (200, "ok"),
    ]
    assert seen <= ended[1].completion_tokens + 2
    assert ended[1].completion_tokens < 400


async def test_who_waited_hears_its_place(two):
    served, _, fallback = two
    fallback.process.kill()
    told = []
    async with served.client() as client:
        for _ in range(3):
            busy = await client.chat.completions.create(**say("!tokens 60"), stream=True)
            waited = await client.chat.completions.with_raw_response.create(**say("!tokens 2"))
            told.append(waited.headers)
            async for _ in busy:
                pass
        free = await client.chat.completions.with_raw_response.create(**say("!tokens 2"))
    assert [headers["x-queue-position"] for headers in told] == ["1"] * 3
    assert "x-queue-estimate" not in told[0], "nobody has waited yet: no pace is known"
    assert float(told[2]["x-queue-estimate"]) > 0
    assert "x-queue-position" not in free.headers


@pytest.fixture
def replicas(transactional_db: None) -> Iterator[Served]:
    with contextlib.ExitStack() as stack:
        deployment = make_deployment(route=ROUTE)
        for worker_id in (FIRST, FALLBACK):
            running = stack.enter_context(worker_process(worker_id))
            make_worker(deployment=deployment, id=worker_id, url=running.url, capabilities=CAPABILITIES)
        publish_change("route", ROUTE)
        front = make_application()
        with serving(front) as port:
            yield Served(port, make_api_key(name="tests")[1], front)


async def test_requests_of_a_session_go_to_one_worker(replicas):
    async with replicas.client() as client:

        async def went(times: int, **options) -> set[str]:
            ids = []
            for _ in range(times):
                answer = await client.chat.completions.with_raw_response.create(**say("!tokens 1"), **options)
                ids.append(answer.headers["x-request-id"])
            return {LATEST.get(one).steps[0].choice.chosen for one in ids}

        assert len(await went(12, extra_headers={"X-Session-Id": "a"})) == 1
        assert len(await went(12, prompt_cache_key="b")) == 1
        assert len(await went(30)) == 2, "without one they are spread"


@pytest.mark.parametrize(
    ("fields", "headers", "param"),
    [
        ({}, {"X-Session-Id": "x" * (limits.SESSION_BYTES + 1)}, "X-Session-Id"),
        ({"prompt_cache_key": "x" * (limits.SESSION_BYTES + 1)}, {}, "prompt_cache_key"),
    ],
)
async def test_a_sessions_name_is_bounded(served, fields, headers, param):
    async with served.client() as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**say("hello"), **fields, extra_headers=headers)
    assert refused.value.param == param


async def test_the_admin_explains_where_a_request_went(two):
    served, first, _ = two
    await in_database(set_times, served, first_token_seconds=1)
    stop(first)
    async with served.client() as client:
        answer = await client.chat.completions.with_raw_response.create(**say("!tokens 2"))
    request_id = answer.headers["x-request-id"]

    def page() -> str:
        event = served.event(request_id)
        admin = get_user_model().objects.create_superuser("operator")
        browser = Client()
        browser.force_login(admin)
        return browser.get(reverse("admin:registry_usageevent_change", args=[event.pk])).content.decode()

    shown = await in_database(page)
    names = await in_database(lambda: list(Deployment.objects.values_list("name", flat=True)))
    assert set(names) == {"first", "fallback"}
    assert "1. first-0 of first, by prefix_affinity. It failed: first-0 gave no answer" in shown
    assert "2. fallback-0 of fallback" in shown
    assert "→ fallback-0" in shown


def test_of_a_request_of_long_ago_nothing_is_explained(admin_client):
    event = make_event(request_id="req_old", started_at=timezone.now())
    event.save(force_insert=True)
    shown = admin_client.get(reverse("admin:registry_usageevent_change", args=[event.pk])).content.decode()
    assert "Not known any more" in shown
