"""One traffic, six books: the clients' own count, the report page, CSV, the usage API, the command and
/metrics."""

from __future__ import annotations

import asyncio
import csv
import http.cookiejar
import io
import json
import re
import time
import urllib.parse
import urllib.request
from typing import Any

import pytest

from tests.e2e.conftest import Roundhouse, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(600)]

MODEL = "agreed"
REQUESTS = 40

INPUT, OUTPUT, REQUEST = 2, 5, 100
"""Millionths of the currency: of a token in, a token out, and a request."""

Figures = tuple[int, int, int]
"""Requests, tokens in, tokens out."""


def cost_of(roundhouse: Roundhouse, figures: Figures) -> int:
    """What these figures cost. Readiness checks that came too early are requests, and cost nothing."""
    (unanswered,) = roundhouse.rows(
        "SELECT count(*) FROM registry_usageevent WHERE route = %s AND outcome = 'failed'", MODEL
    )[0]
    requests, prompt, completion = figures
    return prompt * INPUT + completion * OUTPUT + (requests - unanswered) * REQUEST


@pytest.fixture(scope="module")
def counted(roundhouse: Roundhouse) -> Figures:
    """What the clients counted themselves."""
    price = {"input_micros": INPUT * 10**6, "output_micros": OUTPUT * 10**6, "request_micros": REQUEST}
    roundhouse.manage(
        "shell",
        "-c",
        f"from registry.models import Price; Price.objects.create(route={MODEL!r}, **{price!r})",
    )
    roundhouse.deploy_simulated(MODEL)
    before = ledger(roundhouse)
    seen = asyncio.run(traffic(roundhouse))
    after = eventually(
        lambda: (found := ledger(roundhouse))[0] - before[0] == REQUESTS and found,
        seconds=10,
        what="the ledger has every request",
    )
    assert tuple(new - old for new, old in zip(after, before, strict=True)) == seen
    # The readiness check asked before, and is counted too.
    return tuple(mine + old for mine, old in zip(seen, before, strict=True))  # type: ignore[misc]


async def traffic(roundhouse: Roundhouse) -> Figures:
    async def one(number: int) -> tuple[int, int]:
        question: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"!tokens {number % 13 + 1} number {number}"}],
        }
        if number % 2:
            answer = await client.chat.completions.create(**question)
            return answer.usage.prompt_tokens, answer.usage.completion_tokens
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = [chunk async for chunk in await client.chat.completions.create(**question, **options)]
        return chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens

    async with roundhouse.async_client(max_retries=0) as client:
        counts = await asyncio.gather(*[one(number) for number in range(REQUESTS)])
    return REQUESTS, sum(prompt for prompt, _ in counts), sum(completion for _, completion in counts)


def ledger(roundhouse: Roundhouse) -> Figures:
    rows = eventually(
        lambda: roundhouse.rows(
            "SELECT count(*), sum(prompt_tokens), sum(completion_tokens) FROM registry_usageevent "
            "WHERE route = %s HAVING sum(prompt_tokens) > 0",
            MODEL,
        ),
        seconds=5,
        what="the readiness check is in the ledger",
    )
    return rows[0]  # type: ignore[return-value]


@pytest.fixture(scope="module")
def operator(roundhouse: Roundhouse) -> urllib.request.OpenerDirector:
    """A browser's session, logged in as the administrator."""
    facts = roundhouse.credentials
    jar = http.cookiejar.CookieJar()
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))
    login = facts["admin_url"] + "login/"
    page = opener.open(login).read().decode()
    (token,) = set(re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', page))
    form = {
        "csrfmiddlewaretoken": token,
        "username": facts["admin_username"],
        "password": facts["admin_password"],
    }
    request = urllib.request.Request(login, urllib.parse.urlencode(form).encode(), {"Referer": login})
    assert "Log out" in opener.open(request).read().decode()
    return opener


def test_the_report_says_what_the_clients_counted(roundhouse, operator, counted):
    url = f"{roundhouse.credentials['admin_url']}usage/?model={MODEL}&format="
    totals = json.load(operator.open(url + "json"))["totals"]
    assert (totals["requests"], totals["input_tokens"], totals["output_tokens"]) == counted
    assert totals["cost_micros"] == cost_of(roundhouse, counted)
    rows = list(csv.DictReader(io.StringIO(operator.open(url + "csv").read().decode())))
    sums = [sum(int(row[name]) for row in rows) for name in ("requests", "input_tokens", "output_tokens")]
    assert tuple(sums) == counted
    assert sum(int(row["cost_micros"]) for row in rows) == cost_of(roundhouse, counted)
    single = list(csv.DictReader(io.StringIO(operator.open(f"{url}csv&view=requests").read().decode())))
    assert len(single) == counted[0]
    assert sum(int(row["cost_micros"]) for row in single) == cost_of(roundhouse, counted)


def test_the_command_says_what_the_clients_counted(roundhouse, counted):
    told = roundhouse.manage("usage", "report", f"--route={MODEL}", "--by=key,route", "--format=json").stdout
    totals = json.loads(told)["totals"]
    assert (totals["requests"], totals["input_tokens"], totals["output_tokens"]) == counted
    assert totals["cost_micros"] == cost_of(roundhouse, counted)


def test_the_usage_api_says_what_the_clients_counted(roundhouse, counted):
    facts = roundhouse.credentials
    yesterday = int(time.time()) - 86400
    results = api_results(
        f"{facts['base_url']}/organization/usage/completions?start_time={yesterday}&bucket_width=1d"
        f"&group_by=model&models={MODEL}",
        facts["api_key"],
    )
    sums = [
        sum(result[name] for result in results if result["model"] == MODEL)
        for name in ("num_model_requests", "input_tokens", "output_tokens")
    ]
    assert tuple(sums) == counted
    costs = api_results(
        f"{facts['base_url']}/organization/costs?start_time={yesterday}&group_by=line_item", facts["api_key"]
    )
    amounts = [result["amount"]["value"] for result in costs if result["line_item"] == MODEL]
    assert round(sum(amounts) * 1_000_000) == cost_of(roundhouse, counted)


def api_results(url: str, key: str) -> list[dict[str, Any]]:
    """Every result of every bucket, from the first page to the last."""
    results = []
    page = ""
    while True:
        request = urllib.request.Request(url + page, headers={"Authorization": f"Bearer {key}"})
        with urllib.request.urlopen(request) as reply:
            answer = json.load(reply)
        results += [result for bucket in answer["data"] for result in bucket["results"]]
        if not answer["has_more"]:
            return results
        page = f"&page={answer['next_page']}"


def test_metrics_say_what_the_clients_counted(roundhouse, counted):
    url = roundhouse.credentials["base_url"].removesuffix("/v1") + "/metrics"
    with urllib.request.urlopen(url) as reply:
        text = reply.read().decode()

    def value(name: str) -> int:
        found = re.findall(rf'^roundhouse_{name}\{{[^}}]*route="{MODEL}"[^}}]*\}} (\S+)$', text, re.MULTILINE)
        return sum(int(float(number)) for number in found)

    figures = (value("requests_total"), value("prompt_tokens_total"), value("completion_tokens_total"))
    assert figures == counted
