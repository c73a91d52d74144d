"""What reports cost when the ledger is large:

    python -m bench --events 10000000 [--database postgres://…]

Writes so many events of the last 30 days into a database of its own, rolls them up by the code that control
runs, and asks as people and programs do: the usage page, the usage API, and the CSV of a million requests.
Minutes to hours, and gigabytes: no part of the plain `make bench`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import django
import psutil

from bench.database import own_database

DAYS = 30
KEYS = 100
AT_ONCE = 500_000
CSV_ROWS = 1_000_000
ROUNDS = 7


def measured(events: int, server: str | None) -> list[tuple[str, str, str]]:
    """Rows of what, how much, and the bar for it."""
    with own_database(server) as environment:
        # Nobody has collected static files here.
        command = [sys.executable, "-W", "ignore::UserWarning", "-m", "bench.ledger", str(events)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    rows: list[tuple[str, str, str]] = json.loads(done.stdout)
    return rows


def main() -> None:
    django.setup()
    events = int(sys.argv[1])
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    start = end - timedelta(days=DAYS)
    # Facts beside them first: the pages show the names of what there is.
    key = make_key()
    _timed("filled", lambda: fill(events, start, end))
    _timed("rolled up", roll_up_all)
    print(json.dumps(report(events, start, end, key)))


def make_key() -> str:
    """The text of a key that may ask the usage API; its project is that of the events."""
    from registry.actions.api_keys import issue_api_key  # after Django's apps
    from registry.models import Project

    project = Project.objects.create(name="project 1")
    return issue_api_key(name="bench", project=project, by="bench")[1]


def fill(events: int, start: datetime, end: datetime) -> None:
    """Append events, evenly over the time, as one statement of the database for each `AT_ONCE`."""
    from django.db import connection, transaction

    from registry.actions.rollups import HOUR, mark_stale

    if connection.vendor == "postgresql":
        instant = "to_timestamp(%s + n * %s)"
    else:
        instant = "strftime('%%Y-%%m-%%d %%H:%%M:%%f', %s + n * %s, 'unixepoch')"
    step = (end - start).total_seconds() / events
    for first in range(0, events, AT_ONCE):
        last = min(first + AT_ONCE, events) - 1
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(FILL.format(instant=instant), [first, last, start.timestamp(), step, KEYS])
        print(f"{last + 1:,} events", file=sys.stderr)
    hours = (end - start) // HOUR
    with transaction.atomic():
        mark_stale(start + number * HOUR for number in range(hours))
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")


# Every key has one project and two models; some have requests that fail, or that their client left.
FILL = """
    WITH RECURSIVE numbers(n) AS (SELECT CAST(%s AS BIGINT) UNION ALL SELECT n + 1 FROM numbers WHERE n < %s)
    INSERT INTO registry_usageevent (
        request_id, started_at, project_id, project_name, key_public_id, key_name, route, deployment, worker,
        endpoint, stream, status, outcome, prompt_tokens, cached_tokens, completion_tokens, attempts,
        queue_ms, ttft_ms, duration_ms, gateway
    )
    SELECT
        'req_bench' || n, {instant}, 1 + k %% 20, 'project ' || (1 + k %% 20), 'key' || k, 'key ' || k,
        'model-' || ((k + n / 100 %% 2) %% 12), 'deployment', 'deployment-0',
        CASE k %% 4 WHEN 1 THEN '/v1/embeddings' WHEN 2 THEN '/v1/messages' ELSE '/v1/chat/completions' END,
        n %% 2 = 0, CASE WHEN n %% 40 = 0 THEN 429 WHEN n %% 100 = 1 THEN 499 ELSE 200 END,
        CASE WHEN n %% 40 = 0 THEN 'failed' WHEN n %% 100 = 1 THEN 'aborted' ELSE 'ok' END,
        CASE WHEN n %% 40 = 0 THEN 0 ELSE 20 + n * 31 %% 3000 END, 0,
        CASE WHEN n %% 40 = 0 THEN 0 ELSE 1 + n * 17 %% 500 END, 1,
        n %% 50, 20 + n * 13 %% 900, 1000 + n * 7 %% 9000, 'bench'
    FROM (SELECT n, n * 7919 %% %s AS k FROM numbers) numbered
"""


def roll_up_all() -> None:
    from registry.actions.rollups import roll_up

    while hours := roll_up():
        print(f"{hours} hours rolled up", file=sys.stderr)


def report(events: int, start: datetime, end: datetime, key: str) -> list[tuple[str, str, str]]:
    from django.contrib.auth import get_user_model
    from django.test import Client

    person = get_user_model().objects.create_superuser("bench")
    pages = Client(SERVER_NAME="localhost")
    pages.force_login(person)
    programs = Client(SERVER_NAME="localhost", headers={"Authorization": f"Bearer {key}"})
    days = {"from": (end - timedelta(days=DAYS - 1)).date(), "to": end.date()}
    usage = "/v1/organization/usage/completions"
    asked: dict[str, Callable[[], Any]] = {
        "usage page": lambda: pages.get("/admin/usage/", days),
        "usage page, one key": lambda: pages.get("/admin/usage/", {**days, "key": "key7"}),
        "usage page, split by key and model as JSON": lambda: pages.get(
            "/admin/usage/", {**days, "format": "json", "split": "key,model"}
        ),
        "usage API by day": lambda: programs.get(
            usage, {"start_time": int(start.timestamp()), "limit": 31, "bucket_width": "1d"}
        ),
        "usage API by day, model and key": lambda: programs.get(
            usage, {"start_time": int(start.timestamp()), "limit": 31, "group_by": ["model", "api_key_id"]}
        ),
    }
    rows = []
    for what, ask in asked.items():
        seconds = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            answer = ask()
            body = answer.getvalue()
            seconds.append(time.perf_counter() - began)
            if answer.status_code != 200 or not body:
                raise SystemExit(f"{what}: {answer.status_code} {body[:300]!r}")
        middle = f"{statistics.median(seconds) * 1e3:.0f} ms (first {seconds[0] * 1e3:.0f})"
        rows.append((f"{what}, {DAYS} days of {events:,} events", middle, "300 ms"))
    return rows + stream(pages, events, start)


def stream(pages: Any, events: int, start: datetime) -> list[tuple[str, str, str]]:
    """The CSV of single requests, over as many days as have a million of them."""
    days = min(-(-CSV_ROWS * DAYS // events), DAYS - 1)
    process = psutil.Process()
    before = most = process.memory_info().rss
    began = time.perf_counter()
    question = {"from": (start + timedelta(days=1)).date(), "to": (start + timedelta(days=days)).date()}
    answer = pages.get("/admin/usage/", {**question, "view": "requests", "format": "csv"})
    lines = 0
    first = None
    for block in answer.streaming_content:
        first = first or time.perf_counter() - began
        lines += block.count(b"\n")
        most = max(most, process.memory_info().rss)
    seconds = time.perf_counter() - began
    return [
        (f"CSV of {lines - 1:,} requests", f"{seconds:.1f} s (first block {first or 0:.2f})", ""),
        ("its memory, beyond the process's before", f"{(most - before) / 1e6:.0f} MB", "100 MB"),
    ]


def _timed(what: str, work: Callable[[], None]) -> None:
    began = time.perf_counter()
    work()
    print(f"{what} in {time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
