"""The usage report in a real browser: light, dark and on a phone, and nothing against the policy."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.test import Client
from playwright.sync_api import Page, sync_playwright

from registry.actions.rollups import roll_up
from registry.querysets import database_now
from tests.api.conftest import process_serving
from tests.factories import make_api_key
from tests.usage import make_traffic

pytestmark = pytest.mark.django_db(transaction=True)

IMAGE = Path(__file__).resolve().parents[2] / "docs" / "images" / "usage.png"
CHROMIUM = shutil.which("chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
LISTEN = """
window.violations = [];
document.addEventListener("securitypolicyviolation", ({ violatedDirective }) =>
  window.violations.push(violatedDirective));
"""


@pytest.fixture
def cookie(transactional_db: None) -> str:
    """The session of an operator who made a key, with a month of traffic."""
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("olga", password="x"))
    now = database_now()
    mine, _ = make_api_key(name="search service", by="olga")
    keys = [(mine.public_id, "search service"), ("k2", "nightly batch"), ("user-7", "paula")]
    traffic = make_traffic(start=now - timedelta(days=29), end=now, events=900, keys=keys, seed=11)
    assert len(traffic) == 900
    roll_up()
    return client.cookies["sessionid"].value


@pytest.fixture
def port(cookie: str, tmp_path: Path) -> Iterator[int]:
    """A gateway as it runs in production, on the test's database."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
    with process_serving("manage.py", "gateway", f"--port={number}", port=number, data=tmp_path / "data"):
        yield number


@contextmanager
def browsing(port: int, cookie: str, **context: Any) -> Iterator[tuple[Page, list[str]]]:
    """A page of its own, and whatever goes wrong on it. No ORM inside: the browser runs an event loop."""
    problems: list[str] = []
    origin = f"http://127.0.0.1:{port}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_context(**context).new_page()
        page.context.add_cookies([{"name": "sessionid", "value": cookie, "url": origin}])
        page.add_init_script(LISTEN)
        page.on(
            "console",
            lambda message: problems.append(message.text) if message.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((origin, "data:")) else problems.append(request.url)
            ),
        )
        yield page, problems
        problems += page.evaluate("window.violations")
        browser.close()


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("light", {"viewport": {"width": 1100, "height": 900}, "color_scheme": "light"}),
        pytest.param(
            "dark",
            {"viewport": {"width": 1100, "height": 900}, "color_scheme": "dark"},
            marks=pytest.mark.full,
        ),
        ("phone", {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "device_scale_factor": 2}),
    ],
)
def test_the_report_is_drawn_without_breaking_the_policy(
    cookie: str, port: int, name: str, context: dict[str, Any], tmp_path: Path
) -> None:
    with browsing(port, cookie, **context) as (page, problems):
        page.goto(f"http://127.0.0.1:{port}/admin/usage/")
        page.wait_for_selector("#models canvas")
        assert page.locator(".tiles dd").first.inner_text() == "900"
        assert "search service" in page.inner_text("main")
        assert "Tokens per second" in page.inner_text("main")
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide == 0, "nothing makes the page wider than the screen"
        # Something other than the background was drawn.
        colours = page.evaluate(
            "new Set(new Uint32Array(document.querySelector('#tokens canvas').getContext('2d')"
            ".getImageData(0, 0, 400, 200).data.buffer)).size"
        )
        assert colours > 2
        shot = page.screenshot(path=tmp_path / f"usage-{name}.png")
        if name == "light" and not IMAGE.exists():
            IMAGE.write_bytes(shot)
        page.click(".stamp >> text=Single requests")
        page.wait_for_selector("text=Older")
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide == 0, "nothing makes the list wider than the screen"
        page.screenshot(path=tmp_path / f"requests-{name}.png")
        page.goto(f"http://127.0.0.1:{port}/admin/")
        page.click("text=Usage report")
        page.wait_for_selector("#requests canvas")
        page.click("a:text('nightly batch')")
        page.wait_for_selector("#requests canvas")
        assert "key=k2" in page.url
        page.select_option("select[name=width]", "hour")
        page.fill("input[name=from]", database_day(page, -3))
        page.click("text=Show")
        page.wait_for_selector("#requests canvas")
        assert problems == []


def database_day(page: Page, days: int) -> str:
    """A date some days from today, as the browser's clock has it."""
    day: str = page.evaluate(
        "(days) => new Date(Date.now() + days * 86400000).toISOString().slice(0, 10)", days
    )
    return day


def test_ones_own_page_shows_ones_own_key(cookie: str, port: int) -> None:
    with browsing(port, cookie) as (page, problems):
        page.goto(f"http://127.0.0.1:{port}/usage/")
        page.wait_for_selector("#requests canvas")
        text = page.inner_text("main")
        assert "search service" in text
        assert "nightly batch" not in text
        assert problems == []
