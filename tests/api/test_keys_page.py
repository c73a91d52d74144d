"""Keys in a real browser: made, rotated while somebody watches who still uses the old secret, revoked."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.test import Client
from playwright.sync_api import Page, expect, sync_playwright

from registry.actions.projects import set_role
from tests import services
from tests.api.conftest import Served, process_serving, say
from tests.browser import ARGUMENTS, Watched, watch
from tests.factories import make_project

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def served(facts: str, tmp_path: Path) -> Iterator[Served]:
    """A gateway as it runs in production, on the test's database."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    with process_serving("manage.py", "gateway", f"--port={port}", port=port, data=tmp_path / "data"):
        yield Served(port, facts)


@pytest.fixture
def watched(served: Served) -> Iterator[Watched]:
    """A browser in which an operator, who is a member of a project, is logged in. From here on no ORM: the
    browser runs an event loop in this thread."""
    olga = get_user_model().objects.create_superuser("olga", password="x")
    set_role(project=make_project(name="web"), user=olga, role="owner", by="test")
    client = Client()
    client.force_login(olga)
    session = client.cookies["sessionid"].value
    path = services.chromium()
    if path is None:
        services.missing("Chromium is not installed")
    origin = f"http://127.0.0.1:{served.port}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        found = watch(browser, origin)
        found.context.add_cookies([{"name": "sessionid", "value": session, "url": origin}])
        yield found
        browser.close()


def shown(page: Page) -> str:
    text = page.locator(".messages code, .messagelist code").inner_text()
    assert re.fullmatch(r"sk-[0-9A-Za-z]{12}-[0-9A-Za-z]{49}", text)
    return text


def picture(page: Page, name: str, folder: Path, **how: Any) -> None:
    """Light, dark and on a phone; nothing sticks out to the side."""
    for scheme, width in (("light", 1200), ("dark", 1200), ("light", 360)):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.set_viewport_size({"width": width, "height": 800})
        page.screenshot(path=str(folder / f"{name}-{scheme}-{width}.png"), full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (name, width)
    page.set_viewport_size({"width": 1200, "height": 800})


def test_a_key_from_its_making_to_its_end(served: Served, watched: Watched, tmp_path: Path) -> None:
    page = watched.page()
    page.goto(f"{watched.origin}/keys/")
    expect(page.get_by_role("heading", name="No keys yet")).to_be_visible()
    picture(page, "none", tmp_path)
    page.get_by_label("Name:").fill("nightly <b>build</b>")
    page.get_by_label("chat completions").check()
    page.get_by_label("Addresses:").fill("127.0.0.0/8")
    page.get_by_role("button", name="Make key").click()
    first = shown(page)
    assert served.chat(say("hi"), key=first).status == 200
    page.reload()
    assert first not in page.content()
    page.get_by_label("The old secret ends:").select_option("after an hour")
    page.get_by_role("button", name="Make a new secret").click()
    second = shown(page)
    picture(page, "key", tmp_path)
    rows = page.locator("table.secrets tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.nth(0)).to_contain_text("never")
    # A program changes over while the page is open: it tells without being loaded again.
    page.evaluate("window.stays = true")
    assert served.chat(say("hi"), key=second).status == 200
    assert served.chat(say("hi"), key=first).status == 200
    expect(rows.nth(0)).to_contain_text("within the last minute", timeout=10_000)
    expect(rows.nth(1)).to_contain_text("works until")
    assert page.evaluate("window.stays") is True
    page.get_by_label("Programs that use it are refused").check()
    page.get_by_role("button", name="Revoke").click()
    expect(page.locator(".messages")).to_contain_text("is revoked")
    page.goto(f"{watched.origin}/keys/")
    expect(page.get_by_role("cell", name="revoked")).to_be_visible()
    picture(page, "list", tmp_path)
    assert served.chat(say("hi"), key=second).status == 401
    # The admin's page of it has the same table.
    page.goto(f"{watched.origin}/admin/registry/apikey/?q={second}")
    page.get_by_role("link", name="nightly <b>build</b>").click()
    expect(page.locator("table.secrets tbody tr")).to_have_count(2)
    page.goto(f"{watched.origin}/admin/registry/project/")
    page.get_by_role("link", name="web").click()
    expect(page.get_by_label("Time zone:")).to_have_value("UTC")
    page.screenshot(path=str(tmp_path / "project.png"), full_page=True)
    page.goto(f"{watched.origin}/admin/registry/apikey/add/")
    page.screenshot(path=str(tmp_path / "add.png"), full_page=True)
    assert watched.faults == []
