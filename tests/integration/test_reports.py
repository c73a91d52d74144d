"""The usage report: the page, its exports, the API and the command say the same, to whom it concerns."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from registry.actions.rollups import HOUR, roll_up
from registry.actions.usage import record_usage
from registry.exports import figures_of
from registry.models import Price, Project, UsageDay, UsageEvent, UsageHour
from registry.querysets import database_now
from registry.reports import Dimension, UsageQuery, Width, midnight
from registry.templatetags.figures import money
from tests.factories import make_api_key
from tests.usage import make_event, make_traffic, sums

pytestmark = pytest.mark.django_db

START = datetime(2026, 3, 1, tzinfo=UTC)
DAY = timedelta(days=1)
KEYS = [("aaaaaaaaaaaa", "alpha"), ("bbbbbbbbbbbb", "beta"), ("user-7", "paula")]
ZONES = ["UTC", "Europe/Vienna", "Asia/Kolkata", "America/St_Johns", "Pacific/Chatham", "Africa/Cairo"]


def person(name: str, **facts: Any) -> Client:
    client = Client(headers={"host": "localhost:8000"})
    client.force_login(get_user_model().objects.create_user(name, password="x", **facts))
    return client


@pytest.fixture(autouse=True)
def price() -> Price:
    """What every request costs, so that each report of cost has something to tell."""
    return Price.objects.create(
        route="",
        starts_at=datetime(2000, 1, 1, tzinfo=UTC),
        input_micros=3_000_000,
        output_micros=7_000_000,
        request_micros=11,
    )


@pytest.fixture
def operator() -> Client:
    return person("olga", is_staff=True, is_superuser=True)


def body(response: Any) -> str:
    return b"".join(response.streaming_content).decode()


def in_half() -> None:
    """Roll up every second hour: a report must not show which."""
    starts = UsageHour.objects.values_list("start", flat=True)
    for start in list(starts)[::2]:
        roll_up(since=start, until=start + HOUR)


def command(*arguments: str) -> str:
    out = io.StringIO()
    call_command("usage", "report", *arguments, stdout=out)
    return out.getvalue()


@pytest.mark.parametrize(
    "rolled", [lambda: 0, in_half, roll_up], ids=["from events", "mixed", "from rollups"]
)
def test_page_json_csv_ndjson_and_command_agree_with_the_ledger(
    operator: Client, rolled: Callable[[], object]
) -> None:
    events = make_traffic(start=START, end=START + 3 * DAY, events=400, keys=KEYS)
    rolled()
    words = {"from": "2026-03-01", "to": "2026-03-03"}
    document = json.loads(body(operator.get("/admin/usage/", words | {"format": "json"})))
    assert document["totals"] == sums(events)
    for row in document["rows"]:
        these = [
            event
            for event in events
            if (event.started_at.date().isoformat(), event.key_public_id, event.route)
            == (row["day"], row["key_id"], row["model"])
        ]
        assert {name: row[name] for name in sums([])} == sums(these)
    lines = list(csv.DictReader(io.StringIO(body(operator.get("/admin/usage/", words | {"format": "csv"})))))
    assert [{name: str(value) for name, value in row.items()} for row in document["rows"]] == lines
    ndjson = body(operator.get("/admin/usage/", words | {"format": "ndjson"})).splitlines()
    assert [json.loads(line) for line in ndjson] == document["rows"]
    told = command("--from=2026-03-01", "--to=2026-03-03", "--by=day,key,model", "--format=json")
    assert json.loads(told)["rows"] == document["rows"]
    page = operator.get("/admin/usage/", words)
    assert figures_of(page.context["total"]) == sums(events)
    assert [when for when, *_ in page.context["buckets"]] == ["2026-03-03", "2026-03-02", "2026-03-01"]
    for name, value in sums(events).items():
        if name in ("requests", "input_tokens", "output_tokens"):
            assert f">{value:,}<" in page.content.decode()
    assert document["totals"]["cost_micros"] > 0
    assert money(document["totals"]["cost_micros"]) in page.content.decode()


@pytest.mark.parametrize(
    ("zone_name", "rolled"),
    [
        *(pytest.param(zone, in_half, id=f"mixed-{zone}") for zone in ZONES),
        pytest.param(ZONES[1], roll_up, id=f"from rollups-{ZONES[1]}"),
        *(
            pytest.param(zone, roll_up, id=f"from rollups-{zone}", marks=pytest.mark.full)
            for zone in ZONES
            if zone != ZONES[1]
        ),
    ],
)
def test_a_day_is_a_day_of_the_time_zone_asked_for(zone_name: str, rolled: Callable[[], object]) -> None:
    zone = ZoneInfo(zone_name)
    # Clocks change within these days in each of the zones that change them.
    first = midnight(date(2026, 3, 6), zone)
    events = make_traffic(start=first - DAY, end=first + 60 * DAY, events=300, keys=KEYS, seed=3)
    rolled()
    query = UsageQuery(
        start=first, end=midnight(date(2026, 5, 1), zone), zone=zone, width=Width.DAY, by=frozenset()
    )
    found = {row.start.astimezone(zone).date(): figures_of(row.figures) for row in query.rows()}
    expected: dict[date, list[UsageEvent]] = {}
    for event in events:
        if query.start <= event.started_at < query.end:
            expected.setdefault(event.started_at.astimezone(zone).date(), []).append(event)
    assert found == {day: sums(of) for day, of in expected.items()}
    assert list(found) == sorted(found)


@pytest.mark.parametrize("width", list(Width))
def test_buckets_of_a_range_that_begins_and_ends_anywhere_add_up(width: Width) -> None:
    events = make_traffic(start=START, end=START + 8 * HOUR, events=200, keys=KEYS, seed=5)
    in_half()
    query = UsageQuery(
        start=START + timedelta(minutes=17, seconds=3),
        end=START + timedelta(hours=6, minutes=41, seconds=59),
        width=width,
        by=frozenset(Dimension),
    )
    rows = list(query.rows())
    within = [event for event in events if query.start <= event.started_at < query.end]
    assert sum(row.figures.requests for row in rows) == len(within)
    assert figures_of(query.total()) == sums(within)
    assert [row.start for row in rows] == sorted(row.start for row in rows)
    assert rows[0].start >= query.start
    for key, _ in KEYS:
        mine = [event for event in within if event.key_public_id == key]
        only = UsageQuery(start=query.start, end=query.end, keys=frozenset({key}))
        assert figures_of(only.total()) == sums(mine)


def test_many_scattered_late_hours_are_one_short_query() -> None:
    record_usage([make_event(started_at=START + number * 2 * HOUR) for number in range(400)])
    query = UsageQuery(start=START, end=START + 40 * DAY, width=Width.DAY)
    with CaptureQueriesContext(
        connection,
    ) as queries:
        assert sum(row.figures.requests for row in query.rows()) == 400
    assert max(len(one["sql"]) for one in queries) < 10_000
    roll_up()
    roll_up()
    assert sum(row.figures.requests for row in query.rows()) == 400


def test_a_thing_renamed_within_the_range_is_one_row() -> None:
    record_usage(
        [make_event(started_at=START, key_name="old"), make_event(started_at=START + DAY, key_name="new")]
    )
    rows = UsageQuery(start=START, end=START + 2 * DAY).split(Dimension.KEY)
    assert [(row.key_name, row.figures.requests) for row in rows] == [("old", 2)]


def test_people_see_the_usage_of_their_own_keys_and_chats_only() -> None:
    paula, peter = person("paula"), person("peter")
    paula_id = get_user_model().objects.get(username="paula").pk
    hers, _ = make_api_key(name="hers", by="paula")
    his, _ = make_api_key(name="his", by="peter")
    now = database_now()
    record_usage(
        [
            make_event(started_at=now, key_public_id=hers.public_id, key_name="hers", prompt_tokens=1),
            make_event(started_at=now, key_public_id=f"user-{paula_id}", key_name="paula", prompt_tokens=10),
            make_event(started_at=now, key_public_id=his.public_id, key_name="his", prompt_tokens=100),
        ]
    )
    assert paula.get("/usage/").context["total"].input_tokens == 11
    assert peter.get("/usage/").context["total"].input_tokens == 100
    assert paula.get("/usage/", {"key": hers.public_id}).context["total"].input_tokens == 1
    for client, other in ((paula, his.public_id), (peter, hers.public_id), (peter, f"user-{paula_id}")):
        for wanted in ("", "json", "csv", "ndjson"):
            response = client.get("/usage/", {"key": other, "format": wanted})
            assert response.status_code == 404
    assert paula.get("/usage/", {"key": "no-such-key"}).status_code == 404
    assert his.public_id not in paula.get("/usage/").content.decode()
    exported = body(paula.get("/usage/", {"format": "csv"}))
    assert "hers" in exported
    assert "his" not in exported


def test_who_is_not_logged_in_gets_the_login_page_or_a_401() -> None:
    nobody = Client(headers={"host": "localhost:8000"})
    page = nobody.get("/usage/", {"from": "2026-03-01"})
    assert page.status_code == 302
    assert "next=/usage/%3Ffrom%3D2026-03-01" in page["Location"]
    assert nobody.get("/usage/", {"format": "json"}).status_code == 401
    assert nobody.get("/admin/usage/").status_code == 302


def test_the_report_over_all_keys_wants_the_right_to_see_usage() -> None:
    assert person("paula").get("/admin/usage/").status_code == 302
    staff = person("steve", is_staff=True)
    assert staff.get("/admin/usage/").status_code == 403
    user = get_user_model().objects.get(username="steve")
    user.user_permissions.add(Permission.objects.get(codename="view_usageevent"))
    assert staff.get("/admin/usage/").status_code == 200
    assert "/admin/usage/" in staff.get("/admin/").content.decode()


def test_markup_in_names_is_text(operator: Client) -> None:
    record_usage([make_event(started_at=database_now(), key_name="<script>x</script>", route="<b>m</b>")])
    html = operator.get("/admin/usage/").content.decode()
    assert "<script>x" not in html
    assert "<b>m" not in html
    assert "&lt;script&gt;x" in html


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ({"from": "yesterday"}, "from"),
        ({"from": "2026-03-02", "to": "2026-03-01"}, "to"),
        ({"from": "2020-01-01", "to": "2026-01-01"}, "from"),
        ({"from": "2026-01-01", "to": "2026-03-01", "width": "hour"}, "from"),
        ({"to": "0001-01-01"}, "from"),
        ({"zone": "Mars/Olympus"}, "zone"),
        ({"zone": "../../etc/passwd"}, "zone"),
        ({"width": "week"}, "width"),
        ({"split": "mood"}, "split"),
        ({"key": "x" * 17}, "key"),
        ({"model": "a\x00b"}, "model"),
        ({"project": "first"}, "project"),
        ({"project": "9" * 30}, "project"),
        ({"user": "nobody-here"}, "user"),
        ({"status": "6xx"}, "status"),
        ({"status": "4xx' OR 1=1"}, "status"),
        ({"view": "all"}, "view"),
        ({"view": "requests", "after": "1_x"}, "after"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused_by_name(
    operator: Client, words: dict[str, str], field: str
) -> None:
    page = operator.get("/admin/usage/", words)
    assert page.status_code == 400
    assert f"<b>{field}</b>" in page.content.decode()
    answer = operator.get("/admin/usage/", words | {"format": "json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{field}: ")


def test_an_empty_report_says_so_and_a_filter_without_hits_too(operator: Client) -> None:
    assert "Nothing was used in this time" in operator.get("/admin/usage/").content.decode()
    record_usage([make_event(started_at=database_now())])
    html = operator.get("/admin/usage/", {"model": "no-such-model"}).content.decode()
    assert "Nothing with these filters." in html
    # The filter stays chosen, and what there is can be chosen instead.
    assert '<option value="no-such-model" selected>' in html
    assert '<option value="chat">' in html
    assert 'id="charts"' not in html


def test_keys_that_are_gone_stay_in_the_report_and_say_so(operator: Client) -> None:
    from registry.actions.api_keys import revoke_api_key

    revoked, _ = make_api_key(name="one")
    revoke_api_key(api_key=revoked, by="olga")
    alive, _ = make_api_key(name="two")
    for public_id in (revoked.public_id, alive.public_id, "neverwas", "user-1"):
        record_usage([make_event(started_at=database_now(), key_public_id=public_id)])
    shown = {row.key: state for row, state, _ in operator.get("/admin/usage/").context["keys"]}
    assert shown == {revoked.public_id: "revoked", alive.public_id: "", "neverwas": "deleted", "user-1": ""}


def test_the_change_is_against_the_period_before(operator: Client) -> None:
    record_usage([make_event(started_at=START + 1.5 * DAY, prompt_tokens=100)])
    record_usage([make_event(started_at=START + 2.5 * DAY, prompt_tokens=150) for _ in range(2)])
    page = operator.get("/admin/usage/", {"from": "2026-03-03", "to": "2026-03-03"})
    changes = {label: change for label, _, change in page.context["tiles"]}
    assert changes["Requests"] == "+100 % against the period before"
    assert changes["Tokens in"] == "+200 % against the period before"
    assert changes["Errors"] == "as before"


def test_the_number_of_queries_does_not_grow_with_the_ledger(operator: Client) -> None:
    now = database_now()
    make_traffic(start=now - 20 * DAY, end=now, events=50, keys=KEYS)

    def asked() -> int:
        with CaptureQueriesContext(connection) as queries:
            assert operator.get("/admin/usage/").status_code == 200
        return len(queries)

    few = asked()
    many = [(f"key{number}", f"key {number}") for number in range(60)]
    make_traffic(start=now - 20 * DAY, end=now, events=400, keys=many, seed=2)
    in_half()
    # PostgreSQL is asked for the time too.
    assert asked() <= few <= (20 if connection.vendor == "sqlite" else 21)
    assert len(operator.get("/admin/usage/").context["keys"]) == 20
    assert operator.get("/admin/usage/").context["other_keys"][0] == 43


def test_reports_use_the_indexes() -> None:
    if connection.vendor != "sqlite":
        pytest.skip("PostgreSQL plans by the size of the tables, which are tiny here")
    make_traffic(start=START, end=START + DAY, events=50, keys=KEYS)
    in_half()
    with CaptureQueriesContext(connection) as queries:
        list(UsageQuery(start=START, end=START + 30 * DAY, width=Width.DAY).rows())
        list(UsageQuery(start=START, end=START + DAY, keys=frozenset({"user-7"})).rows())
    for one in queries:
        with connection.cursor() as cursor:
            cursor.execute("EXPLAIN QUERY PLAN " + one["sql"])
            plan = [row[3] for row in cursor.fetchall()]
        assert not [step for step in plan if step.startswith("SCAN registry_usage")], one["sql"]


def test_the_command_prints_a_table_and_names_what_it_cannot_use() -> None:
    record_usage([make_event(started_at=START, key_name="a\x1b[31mb", prompt_tokens=1234)])
    table = command("--from=2026-03-01", "--to=2026-03-01", "--by=key")
    columns = "key_id key requests errors aborted input_tokens cached_tokens output_tokens cost_micros"
    assert " ".join(table.splitlines()[0].split()) == columns
    assert "\x1b" not in table
    # Three millionths of the currency for each token, and eleven for the request.
    assert table.splitlines()[2].split() == ["total", "1", "0", "0", "1,234", "0", "0", "3,713"]
    assert command("--from=2020-03-01", "--to=2020-03-01") == "Nothing was used in this time.\n"
    with pytest.raises(CommandError, match="--by: 'mood'"):
        command("--by=mood")
    with pytest.raises(CommandError, match="--to"):
        command("--from=2026-03-02", "--to=2026-03-01")
    with pytest.raises(CommandError, match="--zone"):
        command("--zone=Mars/Olympus")


def test_every_filter_narrows_page_export_and_command_alike(operator: Client) -> None:
    events = make_traffic(start=START, end=START + 8 * HOUR, events=300, keys=KEYS, seed=9)
    in_half()
    words = {"from": "2026-03-01", "to": "2026-03-02"}
    filters: list[tuple[dict[str, str], Callable[[UsageEvent], bool]]] = [
        ({"key": "aaaaaaaaaaaa"}, lambda event: event.key_public_id == "aaaaaaaaaaaa"),
        ({"model": "org/large"}, lambda event: event.route == "org/large"),
        ({"endpoint": "/v1/embeddings"}, lambda event: event.endpoint == "/v1/embeddings"),
        ({"project": "1"}, lambda event: event.project_id == 1),
        ({"project": "2"}, lambda event: event.project_id == 2),
        ({"status": "429"}, lambda event: event.status == 429),
        ({"status": "4xx"}, lambda event: 400 <= event.status < 500),
        ({"status": "5xx"}, lambda event: event.status >= 500),
        ({"status": "errors"}, lambda event: event.outcome in ("failed", "interrupted")),
        (
            {"status": "2xx", "model": "small", "key": "user-7", "project": "1"},
            lambda event: (
                (event.status // 100, event.route, event.key_public_id, event.project_id)
                == (2, "small", "user-7", 1)
            ),
        ),
    ]
    for asked, passes in filters:
        expected = sums(event for event in events if passes(event))
        exported = json.loads(body(operator.get("/admin/usage/", words | asked | {"format": "json"})))
        assert exported["totals"] == expected, asked
        assert figures_of(operator.get("/admin/usage/", words | asked).context["total"]) == expected, asked
        options = [f"--{name}={value}" for name, value in asked.items()]
        told = command("--from=2026-03-01", "--to=2026-03-02", "--by=", "--format=json", *options)
        assert json.loads(told)["totals"] == expected, asked
        listed = json.loads(
            body(operator.get("/admin/usage/", words | asked | {"format": "json", "view": "requests"}))
        )["requests"]
        assert sorted(one["request_id"] for one in listed) == sorted(
            event.request_id for event in events if passes(event)
        )


def test_each_error_has_one_cause_and_is_shown_by_key(operator: Client) -> None:
    now = database_now()
    for status, outcome, count in (
        (400, "failed", 1),
        (429, "failed", 2),
        (503, "failed", 3),
        (500, "failed", 4),
        (200, "interrupted", 5),
        (503, "interrupted", 6),
        (499, "aborted", 7),
        (200, "ok", 8),
    ):
        record_usage([make_event(started_at=now, status=status, outcome=outcome) for _ in range(count)])
    page = operator.get("/admin/usage/")
    ((row, _, _),) = page.context["keys"]
    figures = row.figures
    causes = figures.client_errors, figures.limit_errors, figures.capacity_errors, figures.engine_errors
    assert causes == (1, 2, 3, 15)
    assert sum(causes) == figures.errors == 21
    assert "1 client, 2 limit, 3 capacity, 15 engine" in page.content.decode()


def test_a_persons_usage_is_that_of_their_keys_and_chats(operator: Client) -> None:
    paula = get_user_model().objects.create_user("paula", password="x")
    hers, _ = make_api_key(name="hers", by="paula")
    now = database_now()
    for key, tokens in ((hers.public_id, 1), (f"user-{paula.pk}", 10), ("somebody", 100)):
        record_usage([make_event(started_at=now, key_public_id=key, prompt_tokens=tokens)])
    assert operator.get("/admin/usage/", {"user": "paula"}).context["total"].input_tokens == 11
    one = operator.get("/admin/usage/", {"user": "paula", "key": hers.public_id})
    assert one.context["total"].input_tokens == 1
    assert operator.get("/admin/usage/", {"user": "paula", "key": "somebody"}).status_code == 404
    # Who is not asked for everybody cannot ask for another, nor learn who there is.
    peter = person("peter")
    assert [peter.get("/usage/", {"user": name}).status_code for name in ("paula", "nobody", "peter")] == (
        [404, 404, 200]
    )


def test_a_projects_days_are_days_of_its_time_zone(operator: Client) -> None:
    project = Project.objects.create(name="far away", time_zone="Pacific/Auckland")
    # The second of March there.
    instant = datetime(2026, 3, 1, 12, tzinfo=UTC)
    record_usage([make_event(started_at=instant, project_id=project.pk, project_name="far away")])
    words = {"from": "2026-03-01", "to": "2026-03-03"}
    for asked, day in (({"project": str(project.pk)}, "2026-03-02"), ({}, "2026-03-01")):
        page = operator.get("/admin/usage/", words | asked)
        assert [when for when, *_ in page.context["buckets"]] == [day]
    told = command("--from=2026-03-01", "--to=2026-03-03", f"--project={project.pk}", "--format=json")
    assert [row["day"] for row in json.loads(told)["rows"]] == ["2026-03-02"]


def test_single_requests_are_paged_without_a_gap_or_a_repeat(operator: Client) -> None:
    same = START + timedelta(hours=3)
    record_usage([make_event(started_at=same) for _ in range(70)])
    events = make_traffic(start=START, end=START + DAY, events=60, keys=KEYS)
    seen = []
    url = "/admin/usage/?from=2026-03-01&to=2026-03-01&view=requests"
    while url:
        page = operator.get(url)
        seen += [(event.started_at, event.request_id) for event, _ in page.context["requests"]]
        url = "/admin/usage/" + page.context["older"] if page.context["older"] else ""
    assert len(seen) == len(set(seen)) == 70 + len(events)
    assert [instant for instant, _ in seen] == sorted((instant for instant, _ in seen), reverse=True)
    assert "Report</a>" in page.content.decode()


def test_single_requests_are_shown_to_their_owner_only() -> None:
    paula = person("paula")
    hers, _ = make_api_key(name="hers", by="paula")
    now = database_now()
    record_usage([make_event(started_at=now, key_public_id=hers.public_id, request_id="req_hers")])
    record_usage([make_event(started_at=now, request_id="req_his")])
    assert "req_hers" in (html := paula.get("/usage/", {"view": "requests"}).content.decode())
    assert "req_his<" not in html
    for name in ("csv", "json", "ndjson"):
        exported = body(paula.get("/usage/", {"view": "requests", "format": name}))
        assert "req_hers" in exported
        assert "req_his" not in exported.replace("req_hers", "")


@pytest.mark.parametrize(
    "rolled", [lambda: 0, in_half, roll_up], ids=["from events", "mixed", "from rollups"]
)
def test_percentiles_are_within_a_tenth_of_the_exact_ones(
    operator: Client, rolled: Callable[[], object]
) -> None:
    events = make_traffic(start=START, end=START + 3 * DAY, events=400, keys=KEYS, seed=4)
    rolled()
    answered = [event for event in events if event.outcome == "ok"]
    exact: dict[str, list[float]] = {
        "ttft_ms": [event.ttft_ms for event in answered if event.ttft_ms is not None],
        "e2e_ms": [event.duration_ms for event in answered if event.duration_ms is not None],
        "tokens_per_second": [
            (event.completion_tokens - 1) * 1000 / (event.duration_ms - event.ttft_ms)
            for event in answered
            if event.ttft_ms is not None
            and event.duration_ms is not None
            and event.completion_tokens >= 2
            and event.duration_ms > event.ttft_ms
        ],
    }
    words = {"from": "2026-03-01", "to": "2026-03-03"}
    document = json.loads(body(operator.get("/admin/usage/", words | {"format": "json"})))
    for name, values in exact.items():
        found = document["latencies"][name]
        assert found["requests"] == len(values)
        for quantile, part in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            true = sorted(values)[math.ceil(part * len(values)) - 1]
            assert abs(found[quantile] - true) <= 0.1 * true + 0.5, (name, quantile)
    page = operator.get("/admin/usage/", words)
    shown = dict(page.context["latencies"])
    assert shown["First token, ms"] == document["latencies"]["ttft_ms"]
    one = json.loads(body(operator.get("/admin/usage/", words | {"format": "json", "key": "user-7"})))
    assert one["latencies"]["e2e_ms"]["requests"] == len(
        [event for event in answered if event.key_public_id == "user-7"]
    )


def test_the_page_tells_how_the_last_check_ended(operator: Client) -> None:
    from registry.actions.rollups import reconcile_usage
    from registry.models import UsageRollup

    record_usage([make_event(started_at=START)])
    roll_up()
    words = {"from": "2026-03-01", "to": "2026-03-01"}
    assert "agree with the ledger" not in operator.get("/admin/usage/", words).content.decode()
    reconcile_usage(since=START)
    assert (
        "The sums agree with the ledger, checked at" in operator.get("/admin/usage/", words).content.decode()
    )
    UsageRollup.objects.update(completion_tokens=10**6)
    reconcile_usage(since=START)
    html = operator.get("/admin/usage/", words).content.decode()
    assert "The sums differed from the ledger" in html
    assert "2026-03-01T00:00" in html


def test_a_correction_changes_the_cost_and_is_no_request(operator: Client) -> None:
    event = make_event(started_at=START, prompt_tokens=100)
    record_usage([event])
    assert event.cost_micros == 311
    correction = make_event(
        request_id=f"{event.request_id}#r1", started_at=START, corrects=event.request_id, cost_micros=-11
    )
    record_usage([correction])
    for rolled in (False, True):
        if rolled:
            roll_up()
        told = json.loads(command("--from=2026-03-01", "--to=2026-03-01", "--format=json"))
        assert told["totals"]["requests"] == 1
        assert told["totals"]["cost_micros"] == 300
        assert told["latencies"]["e2e_ms"]["requests"] == 0


def test_a_range_of_whole_days_reads_days_and_not_their_hours() -> None:
    make_traffic(start=START, end=START + 10 * DAY, events=200, keys=KEYS)
    roll_up()
    roll_up()
    query = UsageQuery(start=START, end=START + 10 * DAY, width=Width.DAY, by=frozenset({Dimension.KEY}))
    rows = list(query.rows())
    with CaptureQueriesContext(connection) as queries:
        assert list(query.rows()) == rows
    assert not [one["sql"] for one in queries if "registry_usagerollup" in one["sql"]]
    # What the days say is what the hours say.
    UsageDay.objects.update(stale=True)
    assert list(query.rows()) == rows


def test_the_command_checks_the_sums_against_the_ledger() -> None:
    from registry.models import UsageRollup

    out = io.StringIO()
    record_usage([make_event(started_at=database_now() - 2 * HOUR)])
    call_command("usage", "roll-up", stdout=out)
    call_command("usage", "check", stdout=out)
    assert out.getvalue() == "1 hour(s) added up.\nThe hourly sums of 30 day(s) agree with the ledger.\n"
    UsageRollup.objects.update(requests=9)
    with pytest.raises(CommandError, match=r"1 hour\(s\) differed"):
        call_command("usage", "check", stdout=out)
    assert "the ledger has 1 request(s), the sums said 9" in out.getvalue()


def test_every_usage_command_of_the_documentation_runs() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "accounting.md").read_text()
    lines = re.findall(r"^\.venv/bin/python manage\.py usage (.+)$", page, re.MULTILINE)
    assert len(lines) >= 5
    record_usage([make_event(started_at=database_now())])
    for line in lines:
        out = io.StringIO()
        call_command("usage", *shlex.split(line), stdout=out)
        assert out.getvalue()
