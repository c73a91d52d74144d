"""S46: no cell of an export is a formula to a spreadsheet, in sums and in single requests."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime

import pytest
from django.contrib.auth import get_user_model
from django.test import Client

from registry.actions.usage import record_usage
from tests.usage import make_event

pytestmark = pytest.mark.django_db

START = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "name",
    [
        "=1+1",
        "+1",
        "-1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "=cmd|' /C calc'!A0",
        '=HYPERLINK("http://x")',
        "+cmd",
        "-2+3",
        "@x",
        '="a",b',
    ],
)
@pytest.mark.parametrize(
    ("view", "columns"),
    [("", ("key", "model", "project")), ("requests", ("key_name", "route", "project_name"))],
    ids=["sums", "single requests"],
)
def test_no_cell_of_a_csv_is_a_formula(name: str, view: str, columns: tuple[str, ...]) -> None:
    client = Client(headers={"host": "localhost:8000"})
    client.force_login(get_user_model().objects.create_superuser("olga", password="x"))
    record_usage([make_event(started_at=START, key_name=name, route=name, project_name=name)])
    words = {"from": "2026-03-01", "to": "2026-03-01", "format": "csv", "split": "project,key,model"}
    answer = client.get("/admin/usage/", words | {"view": view})
    text = b"".join(answer.streaming_content).decode()
    line = next(csv.DictReader(io.StringIO(text, newline="")))
    assert [line[column] for column in columns] == ["'" + name] * 3
    # Numbers stay numbers.
    assert line["cost_micros"] == "0"
