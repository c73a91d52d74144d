"""The admin in a real browser: every page opens, nothing breaks the content security policy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.e2e.conftest import ROOT, Roundhouse, eventually
from tests.engines.tiny_model import make_tiny_llama

pytestmark = pytest.mark.e2e

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
IMAGE = ROOT / "docs" / "images" / "admin.png"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM) if CHROMIUM.exists() else None, args=ARGUMENTS
        )
        yield browser
        browser.close()


class Watched:
    """A page, and whatever went wrong on it."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.origin = origin
        self.problems: list[str] = []
        page.on("console", lambda message: self._hear(message))
        page.on("pageerror", lambda error: self.problems.append(f"{page.url}: {error}"))
        page.on("request", lambda request: self._see(request))

    def _hear(self, message: Any) -> None:
        # A policy violation is told on the console as an error.
        if message.type in ("error", "warning"):
            self.problems.append(f"{self.page.url}: {message.type}: {message.text}")

    def _see(self, request: Any) -> None:
        if not request.url.startswith((self.origin, "data:")):
            self.problems.append(f"{self.page.url}: asked for {request.url}")

    def open(self, path: str) -> None:
        answer = self.page.goto(self.origin + path)
        assert answer is not None
        assert answer.status == 200, f"{path}: {answer.status}"

    def links(self, pattern: str) -> list[str]:
        found = self.page.eval_on_selector_all("a[href]", "all => all.map(one => one.getAttribute('href'))")
        return sorted({one for one in found if re.fullmatch(pattern, one)})


@pytest.fixture
def watched(roundhouse: Roundhouse, browser: Browser) -> Iterator[Watched]:
    """Logged in as an operator."""
    roundhouse.manage(
        "shell",
        "-v0",
        "-c",
        "from django.contrib.auth import get_user_model as users\n"
        "olga, _ = users().objects.get_or_create(username='olga', is_staff=True, is_superuser=True)\n"
        "olga.set_password('a long enough phrase')\n"
        "olga.save()",
    )
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    watched = Watched(context.new_page(), roundhouse.credentials["base_url"].removesuffix("/v1"))
    watched.open("/admin/login/")
    watched.page.get_by_label("Username").fill("olga")
    watched.page.get_by_label("Password").fill("a long enough phrase")
    watched.page.get_by_role("button", name="Log in").click()
    expect(watched.page.locator("#dashboard")).to_be_visible()
    yield watched
    context.close()


def test_every_page_of_the_admin_opens_without_a_complaint_of_the_browser(
    roundhouse: Roundhouse, watched: Watched
) -> None:
    assert roundhouse.answers(roundhouse.credentials["chat_model"])
    watched.open("/admin/")
    lists = watched.links(r"/admin/[a-z_]+/[a-z_]+/")
    adds = watched.links(r"/admin/[a-z_]+/[a-z_]+/add/")
    assert len(lists) >= 10, lists
    assert len(adds) >= 5, adds
    for path in [*lists, *adds]:
        watched.open(path)
    for path in lists:
        watched.open(path)
        for form in watched.links(re.escape(path) + r"\d+/change/.*")[:1]:
            watched.open(form)
            watched.page.wait_for_load_state("networkidle")
    assert watched.problems == []


def test_a_worker_is_replaced_from_its_page_and_the_page_follows_by_itself(
    roundhouse: Roundhouse, watched: Watched
) -> None:
    roundhouse.deploy_simulated("watched")
    worker = roundhouse.worker("watched")
    assert worker is not None
    watched.open(f"/admin/registry/worker/{worker.id}/change/")
    page = watched.page
    badge = page.locator(f"#live-worker-{worker.id}-now")
    expect(badge).to_contain_text("ready")
    page.get_by_role("link", name="Drain and replace").click()
    expect(page.locator(".rh-effects")).to_contain_text("0 request(s) in flight")
    page.get_by_role("button", name="Drain and replace").click()
    expect(page.locator(".messagelist")).to_contain_text("finishes its requests")
    expect(badge).to_contain_text("stopped", timeout=30_000)
    expect(page.locator(f"#live-worker-{worker.id}-events")).to_contain_text("draining")

    def replaced() -> bool:
        newest = roundhouse.worker("watched")
        return newest is not None and newest.id != worker.id and newest.state == "ready"

    eventually(replaced, seconds=40, what="another worker is ready in its place")
    watched.open("/admin/registry/deployment/")
    page.get_by_role("link", name="watched").click()
    page.get_by_role("link", name="Stop", exact=True).click()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("[id$=-status]")).to_contain_text("stopped")
    assert watched.problems == []


def test_the_first_page_shows_what_runs(roundhouse: Roundhouse, watched: Watched, tmp_path: Path) -> None:
    assert roundhouse.answers(roundhouse.credentials["chat_model"])
    watched.open("/admin/")
    page = watched.page
    expect(page.locator("#dashboard")).to_contain_text("1 of 1")
    expect(page.locator("#dashboard")).to_contain_text("ready")
    # A row of the ledger comes within a quarter second; the block asks again every five.
    expect(page.locator("#dashboard")).to_contain_text(re.compile(r"[1-9]\d*\s+\d+ failed"), timeout=10_000)
    assert watched.problems == []
    # The image of the documentation is made anew only on request: a test leaves the clone as it was.
    image = IMAGE if "ROUNDHOUSE_SAVE_IMAGES" in os.environ else tmp_path / IMAGE.name
    page.screenshot(path=str(image))
    assert image.stat().st_size < 300_000


def test_a_model_is_added_checked_and_deployed_on_one_page_which_leads_to_its_progress(
    roundhouse: Roundhouse, watched: Watched, tmp_path: Path
) -> None:
    folder = make_tiny_llama(tmp_path / "vicuna-tiny")
    about = folder / "tokenizer_config.json"
    about.write_text(about.read_text().replace('"chat_template"', '"no_template"'))
    watched.open("/admin/registry/languagemodel/")
    page = watched.page
    page.get_by_role("link", name="Add language model").first.click()
    kinds = page.get_by_label("Where the files come from")
    for kind in ("ModelScope", "Python package", "One line", "Folder on the nodes"):
        kinds.get_by_role("link", name=kind).click()
        expect(kinds.locator("[aria-current=page]")).to_have_text(kind)
    page.get_by_label("Folder", exact=False).first.fill(str(folder))
    page.get_by_label("Name:").fill("page-tiny")
    page.get_by_label("Engine:").select_option("simulated")
    page.get_by_role("button", name="Check first").click()
    known = page.get_by_label("What is known of it")
    expect(known).to_contain_text("LlamaForCausalLM")
    expect(known).to_contain_text("users × 512 tokens")
    expect(known).to_contain_text("vicuna fits its name")
    page.get_by_label("Chat template:").select_option("vicuna")
    page.screenshot(path=str(tmp_path / "add.png"), full_page=True)
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.locator(".messagelist")).to_contain_text("Added page-tiny and deployed it")
    expect(page.locator("[id$=-deployed]")).to_contain_text("ready", timeout=40_000)
    # What an agent tells while it fetches; a real fetch of so little is over before it is seen.
    roundhouse.manage(
        "shell",
        "-v0",
        "-c",
        "from datetime import timedelta\n"
        "from registry.actions.language_models import record_copy\n"
        "from registry.models import LanguageModel, ModelCopy, Node\n"
        "model = LanguageModel.objects.get(name='page-tiny')\n"
        "facts = {'step': 'download', 'total': 2_800_000_000, 'files_done': 1, 'files_total': 5}\n"
        "record_copy(node=Node.objects.get(), language_model_id=model.pk, state='fetching', "
        "done=1_200_000_000, **facts)\n"
        "copy = ModelCopy.objects.get(language_model=model)\n"
        "copy.step_began_at, copy.step_began_done = copy.updated_at - timedelta(seconds=60), 0\n"
        "copy.save()",
    )
    expect(page.locator("[id$=-files]")).to_contain_text(
        "download, file 2 of 5, 1.2 GB of 2.8 GB, 42 %, 80 s left", timeout=10_000
    )
    page.screenshot(path=str(tmp_path / "follow.png"), full_page=True)
    roundhouse.manage("scale", "page-tiny", "0", "--wait", "30")
    assert watched.problems == []
