"""`/metrics`, `/healthz` and `/readyz` of a real gateway, and their agreement with the ledger."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.contrib.sessions.backends.db import SessionStore
from django.db.models import Sum
from django.test import Client

from config.front import make_application
from inference.http import Request
from openai_api.health import RedisProbe, is_from_this_machine
from openai_api.metrics import Meter
from registry.models import UsageEvent
from tests.api.conftest import ROUTE, Served, eventually, facts, say, served, serving, worker  # noqa: F401
from tests.cost import cpu_seconds

pytestmark = pytest.mark.django_db(transaction=True)

TOKEN = "a-token-of-at-least-20-characters"


def scrape(served: Served, *headers: str) -> dict[str, float]:  # noqa: F811 (a fixture's name)
    """Samples by their name with labels, as a scraper would read them."""
    answer = served.request("GET", "/metrics", None, *headers, key=None)
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {}
    for line in answer.body.decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert name.startswith("roundhouse_"), line
            assert name not in samples, f"{name} is there twice"
            samples[name] = float(value)
    return samples


def of(samples: dict[str, float], name: str, **labels: str) -> float:
    """The sum of a metric's samples that carry these labels."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(
        value
        for key, value in samples.items()
        if key.partition("{")[0] == f"roundhouse_{name}" and all(one in key for one in wanted)
    )


def test_the_metrics_count_what_the_ledger_counts(served: Served) -> None:  # noqa: F811
    for number in range(3):
        assert served.chat(say("hello " * number, max_tokens=5)).status == 200
    assert served.chat(say("hello", max_tokens=4, stream=True)).status == 200
    assert served.chat(say("hello", max_tokens=-1)).status == 400
    assert served.chat(say("hello") | {"model": 'unknown\n"x'}).status == 404
    assert served.chat(say("hello"), key="sk-nobody").status == 401
    eventually(lambda: UsageEvent.objects.count() == 4, "the ledger has the four that were admitted")
    samples = scrape(served)
    labels = {"route": ROUTE, "endpoint": "/v1/chat/completions"}
    assert of(samples, "requests_total", status="2xx", **labels) == 4
    assert of(samples, "requests_total", status="4xx") == 3
    assert of(samples, "requests_total", route="", status="4xx") == 3, (
        "names that clients make up are no label"
    )
    ledger = UsageEvent.objects.aggregate(tokens_in=Sum("prompt_tokens"), tokens_out=Sum("completion_tokens"))
    assert of(samples, "prompt_tokens_total", **labels) == ledger["tokens_in"]
    assert of(samples, "completion_tokens_total", **labels) == ledger["tokens_out"] == 19
    assert of(samples, "e2e_request_latency_seconds_count", **labels) == 4
    assert of(samples, "time_to_first_token_seconds_count", **labels) == 1
    assert of(samples, "e2e_request_latency_seconds_bucket", le="+Inf", **labels) == 4
    assert 0 < of(samples, "e2e_request_latency_seconds_sum", **labels) < 60
    assert of(samples, "requests_in_flight") == 0
    assert of(samples, "workers", state="ready") == 1
    assert of(samples, "workers") == 1
    assert of(samples, "deployment_ready_workers") == 1
    assert of(samples, "requests_waiting") == 0
    assert of(samples, "tokens_waiting") == 0
    assert of(samples, "queue_time_seconds_count", **labels) == 4
    assert of(samples, "queue_time_seconds_bucket", le="0.005", **labels) == 4
    assert of(samples, "dispatched_total") == 4
    assert of(samples, "worker_requests") == 0
    for name in ("queue_refused_total", "continuations_total", "retries_total", "worker_ejected"):
        assert any(sample.startswith(f"roundhouse_{name}{{") for sample in samples), name
        assert of(samples, name) == 0
    assert of(samples, "spool_pending") == 0
    assert of(samples, "gateway_info") == 1
    assert of(samples, "database_away_seconds") == 0


def test_buckets_hold_everything_below_them() -> None:
    meter = Meter()
    for seconds in (0.001, 0.005, 0.3, 599.0, 10_000.0):
        meter.note("chat", "/v1/chat/completions", 200, seconds, None, 0.0, 1, 0, 1)
    found = {
        line.partition('le="')[2].partition('"')[0]: int(line.rpartition(" ")[2])
        for line in meter.lines()
        if "e2e_request_latency_seconds_bucket" in line
    }
    assert found["0.005"] == 2
    assert found["0.5"] == 3
    assert found["600.0"] == 4
    assert found["+Inf"] == 5
    assert list(found.values()) == sorted(found.values())


def test_a_label_cannot_break_its_line() -> None:
    meter = Meter()
    meter.note('a"b\\c\nd', "/v1/chat/completions", 200, 1.0, 1.0, 0.0, 1, 0, 1)
    lines = list(meter.lines())
    assert all("\n" not in line for line in lines)
    assert any('route="a\\"b\\\\c\\nd"' in line for line in lines)


def test_counting_a_request_costs_some_microseconds() -> None:
    meter = Meter()

    def note() -> None:
        meter.note("chat", "/v1/chat/completions", 200, 0.2, 0.1, 0.0, 10, 0, 20)

    # 5 µs is the allowance; twice that for a slow machine.
    assert cpu_seconds(note, tries=5, times=2000) < 10e-6


@pytest.fixture
def guarded(facts: str, settings: Any) -> Iterator[Served]:  # noqa: F811
    settings.ROUNDHOUSE_METRICS_TOKEN = TOKEN
    settings.ALLOWED_HOSTS = [*settings.ALLOWED_HOSTS, "roundhouse.example"]
    front = make_application()
    with serving(front) as port:
        yield Served(port, facts, front)


PROXIED = "X-Forwarded-For: 192.0.2.7"


def test_the_metrics_are_for_this_machine_the_token_and_staff(guarded: Served) -> None:
    def status(*headers: str) -> int:
        return guarded.request("GET", "/metrics", None, *headers, key=None).status

    def cookie_of(user: Any) -> str:
        client = Client(headers={"host": "localhost"})
        client.force_login(user)
        return f"Cookie: a=b; sessionid={client.cookies['sessionid'].value}"

    assert status() == 200, "loopback"
    assert status(PROXIED) == 403, "a proxy on this machine brings strangers"
    assert status(PROXIED, f"Authorization: Bearer {TOKEN}") == 200
    assert status(PROXIED, f"Authorization: Bearer {TOKEN}x") == 403
    assert status(PROXIED, "Authorization: Bearer ") == 403
    assert status(PROXIED, f"Authorization: Bearer {guarded.api_key}") == 403, "an API key opens no metrics"
    users = get_user_model().objects
    staff = cookie_of(users.create_user("sam", password="x", is_staff=True))
    assert status(PROXIED, staff) == 200
    assert status(PROXIED, cookie_of(users.create_user("paul", password="x"))) == 403
    gone = users.create_user("gone", password="x", is_staff=True)
    left = cookie_of(gone)
    gone.is_active = False
    gone.save()
    assert status(PROXIED, left) == 403
    for nonsense in (
        "sessionid=",
        "sessionid=x",
        "sessionid=" + "x" * 3000,
        '="',
        SessionStore().session_key,
    ):
        assert status(PROXIED, f"Cookie: {nonsense}") == 403
    assert guarded.request("POST", "/metrics", b"", key=None).status == 405
    refused = guarded.request("GET", "/metrics", None, PROXIED, key=None)
    assert "ROUNDHOUSE_METRICS_TOKEN" in refused.error()["message"]


@pytest.mark.parametrize(
    ("address", "host", "forwarded", "ours"),
    [
        ("127.0.0.1", b"localhost:8000", None, True),
        ("127.0.0.1", b"127.0.0.1", None, True),
        ("::1", b"[::1]:8000", None, True),
        ("127.0.0.1", b"roundhouse.example", None, False),
        ("127.0.0.1", b"localhost", b"x-forwarded-for", False),
        ("127.0.0.1", b"localhost", b"forwarded", False),
        ("192.0.2.7", b"localhost", None, False),
        ("", b"localhost", None, False),
        ("127.0.0.1", b"", None, False),
    ],
)
def test_only_who_asks_from_here_by_a_name_of_here_is_from_here(
    address: str, host: bytes, forwarded: bytes | None, ours: bool
) -> None:
    headers = [(b"host", host), *([(forwarded, b"192.0.2.7")] if forwarded else [])]
    scope = {
        "method": "GET",
        "path": "/metrics",
        "headers": headers,
        "client": (address, 1) if address else None,
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    assert is_from_this_machine(Request(scope, receive)) is ours


def test_without_a_token_none_opens_the_metrics(served: Served) -> None:  # noqa: F811
    for header in ("Authorization: Bearer ", "Authorization: Bearer None", "Authorization: Bearer x"):
        assert served.request("GET", "/metrics", None, PROXIED, header, key=None).status == 403


# -- Health


def test_readiness_tells_its_parts(served: Served) -> None:  # noqa: F811
    answer = served.request("GET", "/readyz", key=None)
    assert answer.status == 200
    told = answer.json()
    assert (told["status"], told["database"], told["spool_pending"]) == ("ok", "ok", 0)
    assert told["redis"] in ("ok", "not used", "away")
    assert json.loads(served.request("GET", "/healthz", key=None).body) == {"status": "ok"}


async def test_a_redis_that_is_away_is_told_and_asked_seldom() -> None:
    asked = 0

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        probe = RedisProbe(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0")
        assert await probe.state() == "away"
        at_first = asked
        assert {await probe.state() for _ in range(1000)} == {"away"}
        assert 0 < asked <= 2 * at_first
    assert await RedisProbe(None).state() == "not used"
