"""A real Chromium for the tests of pages.

    from tests.browser import browser  # noqa: F401 - a fixture

`Watched` opens pages that note everything a careful page never does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Dialog,
    Page,
    Request,
    sync_playwright,
)

from tests import services

ARGUMENTS = [
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. Of one module only: while it is open its event loop runs, and async tests could not."""
    path = services.chromium()
    if path is None:
        services.missing(
            "Chromium is not installed and cannot be installed here; install the package `chromium`"
        )
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield found
        found.close()


@dataclass
class Watched:
    """A browser's profile whose pages tell on themselves: see `faults`."""

    context: BrowserContext
    origin: str
    faults: list[str] = field(default_factory=list)
    """CSP reports, faults of scripts, errors on the console, dialogs, requests to other origins."""

    def page(self) -> Page:
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.faults.append(f"script: {error}"))
        page.on("console", self._hear)
        page.on("dialog", self._dismiss)
        page.on("request", self._see)
        page.expose_function("reportViolation", lambda text: self.faults.append(f"policy: {text}"))
        page.add_init_script(
            "document.addEventListener('securitypolicyviolation', (event) => "
            "reportViolation(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`))"
        )
        return page

    def _hear(self, said: ConsoleMessage) -> None:
        if said.type == "error":
            self.faults.append(f"console: {said.text}")

    def _dismiss(self, dialog: Dialog) -> None:
        self.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _see(self, request: Request) -> None:
        if not request.url.startswith((self.origin, "data:", "blob:")):
            self.faults.append(f"request: {request.url}")


def watch(browser: Browser, origin: str, **options: Any) -> Watched:
    """A new profile: nothing is logged in."""
    return Watched(context=browser.new_context(**options), origin=origin)
