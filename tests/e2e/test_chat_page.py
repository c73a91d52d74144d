"""The chat page in a real browser, against real processes: what a person does, and what hostile text does."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, WebSocketRoute, expect

from tests.browser import Watched, browser, watch
from tests.e2e.conftest import Roundhouse, eventually

__all__ = ["browser"]  # the fixture, found by its name

pytestmark = pytest.mark.e2e

MODEL = "talker"
HOSTILE = "hostile"
TOKEN_SECONDS = 0.05

HOSTILE_TEXT = """\
<script>alert(1)</script> <img src=x onerror=alert(2)> <svg onload=alert(3)></svg>
<iframe src="javascript:alert(4)"></iframe>

[link](javascript:alert(5)) [data](data:text/html,<script>alert(6)</script>) [ours](/logout/)
[quoted](https://example.invalid/"onmouseover="alert(7)) <https://example.invalid/<script>>

![stolen](https://example.invalid/pixel.png?chat=secret) ![x](data:image/svg+xml,<svg/onload=alert(8)>)

```html" onload="alert(9)
</code></pre><script>alert(10)</script>
```

```"><img src=x onerror=alert(11)>
plain
```

| a | b |
|:--|--:|
| <b style="position:fixed">x</b> | <a href="javascript:alert(12)">y</a> |

<math><mtext></form><form><mglyph><style></math><img src onerror=alert(13)>

[ref]: javascript:alert(14)
[ref] <x onclick=alert(15) style=color:red>
"""


@pytest.fixture(scope="module")
def served(roundhouse: Roundhouse) -> Roundhouse:
    roundhouse.deploy_simulated(MODEL, token_seconds=TOKEN_SECONDS)
    roundhouse.deploy_simulated(HOSTILE, token_seconds=0.005, text=HOSTILE_TEXT)
    return roundhouse


@pytest.fixture(scope="module")
def origin(roundhouse: Roundhouse) -> str:
    return str(roundhouse.credentials["chat_url"]).removesuffix("/chat/")


@pytest.fixture(scope="module")
def session(served: Roundhouse, browser: Browser, origin: str) -> Iterator[Watched]:
    """One person's browser, logged in; at the end nothing may have been reported."""
    watched = watch(browser, origin, viewport={"width": 1280, "height": 820})
    log_in(watched.page(), served, origin)
    yield watched
    watched.context.close()


@pytest.fixture
def page(session: Watched, origin: str) -> Iterator[Page]:
    """A new chat with the slow talker, in a tab of its own."""
    page = session.page()
    page.goto(f"{origin}/chat/")
    choose_model(page, MODEL)
    yield page
    page.close()
    assert session.faults == []


def log_in(page: Page, roundhouse: Roundhouse, origin: str) -> None:
    page.goto(f"{origin}/chat/")
    expect(page).to_have_url(re.compile(r"/login/\?next=/chat/$"))
    page.get_by_label("User name").fill(roundhouse.credentials["admin_username"])
    page.get_by_label("Password").fill(roundhouse.credentials["admin_password"])
    page.get_by_role("button", name="Log in").click()
    expect(page).to_have_url(f"{origin}/chat/")
    page.wait_for_load_state()  # its scripts have run


def choose_model(page: Page, name: str) -> None:
    page.locator("#model-button").click()
    page.get_by_role("menuitemradio").filter(has_text=name).click()
    expect(page.locator("#model-button")).to_contain_text(name)


def ask(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator(".message.assistant").last).to_be_visible()


def answer(page: Page) -> Any:
    return page.locator(".message.assistant").last


def ended(page: Page, state: str = "complete") -> None:
    expect(answer(page)).to_have_attribute("data-state", state, timeout=20_000)


def shown(page: Page) -> str:
    return str(answer(page).locator(".body").inner_text())


def stored(page: Page, origin: str) -> dict[str, Any]:
    """The conversation in view, as the server has it."""
    reply = page.request.get(f"{origin}/chat/api/conversations/{page.url.rstrip('/').rpartition('/')[2]}")
    assert reply.ok, reply.text()
    return json.loads(reply.text())  # type: ignore[no-any-return]


def words(page: Page, at_least: int) -> None:
    eventually(
        lambda: len(shown(page).split()) >= at_least, seconds=15, what=f"{at_least} words are in the page"
    )


def test_an_answer_is_seen_to_grow_in_steps(page: Page, origin: str) -> None:
    """At 50 ms per token a person sees many small steps, not one block at the end."""
    page.evaluate(
        """() => {
          window.steps = [];
          new MutationObserver(() => {
            const body = document.querySelector(".message.assistant .body");
            const length = body ? body.textContent.length : 0;
            if (length && length !== window.steps.at(-1)?.[1]) {
              window.steps.push([performance.now(), length]);
            }
          }).observe(
            document.querySelector("#thread"), {subtree: true, childList: true, characterData: true}
          );
        }"""
    )
    ask(page, "!tokens 40")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    ended(page)
    steps = page.evaluate("() => window.steps")
    assert len(steps) >= 15
    assert [length for _, length in steps] == sorted(length for _, length in steps)
    assert steps[-1][0] - steps[0][0] >= 0.6 * 40 * TOKEN_SECONDS * 1000
    assert max(after[0] - before[0] for before, after in itertools.pairwise(steps)) < 1000
    assert shown(page) == stored(page, origin)["messages"][-1]["content"]
    expect(answer(page).locator(".figures")).to_contain_text(re.compile(r"2 → 40 tokens .* tok/s"))
    expect(page.get_by_role("status").first).to_have_text("Answer ready")


def test_a_refresh_in_mid_answer_shows_the_same_text_once(page: Page, origin: str) -> None:
    ask(page, "!tokens 80")
    words(page, 15)
    before = shown(page)
    page.reload()
    expect(answer(page)).to_have_attribute("data-state", "generating")
    words(page, 20)
    assert shown(page).startswith(before)
    ended(page)
    content = stored(page, origin)["messages"][-1]["content"]
    assert len(content.split()) == 80
    assert shown(page) == content
    page.reload()
    ended(page)
    assert shown(page) == content


def test_a_connection_that_breaks_in_mid_answer_loses_and_repeats_nothing(
    session: Watched, origin: str
) -> None:
    page = session.page()
    sockets: list[WebSocketRoute] = []

    def pass_on(socket: WebSocketRoute) -> None:
        socket.connect_to_server()
        sockets.append(socket)

    page.route_web_socket("**/chat/ws", pass_on)
    page.goto(f"{origin}/chat/")
    choose_model(page, MODEL)
    ask(page, "!tokens 80")
    for count in (10, 30):
        words(page, count)
        sockets[-1].close()
    ended(page)
    assert len(sockets) >= 3
    assert shown(page) == stored(page, origin)["messages"][-1]["content"]
    page.close()
    assert session.faults == []


def test_escape_stops_the_answer_and_the_engine(page: Page, served: Roundhouse) -> None:
    ask(page, "!tokens 2000")
    words(page, 5)
    page.keyboard.press("Escape")
    ended(page, "stopped")
    expect(page.get_by_text("You stopped this answer.")).to_be_visible()
    worker = served.worker(MODEL)
    assert worker is not None
    eventually(lambda: served.running(worker) == 0, seconds=5, what="the engine has stopped")
    assert len(shown(page).split()) < 2000
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_an_answer_is_regenerated_beside_the_first_one(page: Page) -> None:
    ask(page, "!tokens 5")
    ended(page)
    page.get_by_role("button", name="Regenerate", exact=True).click()
    expect(answer(page).locator(".branch-count")).to_have_text("2/2", timeout=10_000)
    ended(page)
    assert page.locator(".message.assistant").count() == 1
    page.get_by_role("button", name="Regenerate with another model").click()
    page.get_by_role("menuitemradio").filter(has_text=HOSTILE).click()
    expect(answer(page).locator(".branch-count")).to_have_text("3/3", timeout=10_000)
    ended(page)
    expect(answer(page).locator(".figures")).to_contain_text(HOSTILE)
    page.get_by_role("button", name="Previous version").click()
    expect(answer(page).locator(".branch-count")).to_have_text("2/3")
    page.wait_for_load_state("networkidle")
    page.reload()
    expect(answer(page).locator(".branch-count")).to_have_text("2/3")


def test_a_question_is_edited_into_a_branch_of_its_own(page: Page) -> None:
    ask(page, "!tokens 3 first")
    ended(page)
    page.locator(".message.user").hover()
    page.get_by_role("button", name="Edit and ask again").click()
    page.get_by_label("Edit your message").fill("!tokens 4 second")
    page.get_by_role("button", name="Ask again", exact=True).click()
    expect(page.locator(".message.user .branch-count")).to_have_text("2/2", timeout=10_000)
    ended(page)
    expect(page.locator(".message.user .body")).to_have_text("!tokens 4 second")
    assert page.locator(".message").count() == 2
    page.get_by_role("button", name="Previous version").click()
    expect(page.locator(".message.user .body")).to_have_text("!tokens 3 first")


def test_a_conversation_is_found_renamed_and_deleted(page: Page, origin: str) -> None:
    ask(page, "!tokens 2 about wheels and axles")
    ended(page)
    row = page.locator("#conversations .row", has=page.locator("a[aria-current=page]"))
    expect(row).to_contain_text("about wheels")

    row.get_by_role("button").click()
    page.get_by_role("menuitem", name="Rename").click()
    page.get_by_label("New title").fill("<img src=x onerror=alert(1)> wheels")
    page.keyboard.press("Enter")
    expect(row).to_contain_text("<img src=x onerror=alert(1)> wheels")
    assert stored(page, origin)["title"] == "<img src=x onerror=alert(1)> wheels"
    expect(page).to_have_title("<img src=x onerror=alert(1)> wheels · Roundhouse")

    page.get_by_role("searchbox").fill("no such words anywhere")
    expect(page.get_by_text("Nothing found.")).to_be_visible()
    page.get_by_role("searchbox").fill("axles")
    expect(page.locator("#conversations .row")).to_have_count(1)
    page.get_by_role("searchbox").fill("")

    url = page.url
    row.get_by_role("button").click()
    page.get_by_role("menuitem", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    assert stored(page, origin)["id"] in url
    row.get_by_role("button").click()
    page.get_by_role("menuitem", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page).to_have_url(f"{origin}/chat/")
    expect(page.get_by_text("What would you like to know?")).to_be_visible()
    assert page.request.get(url).status == 404


def test_the_settings_of_a_chat_are_kept_and_used(page: Page, origin: str) -> None:
    page.get_by_role("button", name="Settings of this chat").click()
    page.get_by_label("System prompt").fill("Be brief and mind the gap.")
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Longest answer").fill("3")
    ask(page, "!tokens 50")
    ended(page)
    assert len(shown(page).split()) == 3
    # The system prompt's six words and the question's two are the prompt.
    expect(answer(page).locator(".figures")).to_contain_text("8 → 3 tokens")
    page.reload()
    page.get_by_role("button", name="Settings of this chat").click()
    expect(page.get_by_label("System prompt")).to_have_value("Be brief and mind the gap.")
    expect(page.get_by_label("Temperature")).to_have_value("0.3")
    page.get_by_label("Longest answer").fill("")
    page.get_by_label("Temperature").focus()
    expect(page.get_by_text("Saved")).to_be_visible()
    assert stored(page, origin)["settings"] == {"system": "Be brief and mind the gap.", "temperature": 0.3}


def test_hostile_text_of_a_model_stays_text(page: Page, origin: str) -> None:
    choose_model(page, HOSTILE)
    ask(page, "Hello <b>there</b> <script>alert(0)</script>")
    ended(page)
    for _ in range(2):  # as it was streamed, and as it is loaded
        body = answer(page).locator(".body")
        expect(body).to_contain_text("<script>alert(1)</script>")
        expect(body).to_contain_text("Image: stolen")
        assert body.locator("script, img, svg:not(.icon), iframe, form, style, math, b").count() == 0
        assert body.locator("[style], [onerror], [onload], [onclick], [onmouseover]").count() == 0
        links = body.locator("a[href]").evaluate_all("(all) => all.map((a) => [a.href, a.target, a.rel])")
        assert links
        for href, target, rel in links:
            assert href.startswith("https://example.invalid/")
            assert (target, rel) == ("_blank", "noopener noreferrer nofollow")
        expect(page.locator(".message.user .body")).to_have_text(
            "Hello <b>there</b> <script>alert(0)</script>"
        )
        page.reload()
        ended(page)


def test_garbage_that_breaks_careless_relays_is_shown_as_it_is(page: Page, origin: str) -> None:
    ask(page, "!garbage !slow 0.01")
    ended(page)
    assert "<script>alert(1)</script>" in shown(page)
    assert "x" * 1000 in shown(page)
    ask(page, "!tokens 3")
    ended(page)


def test_a_failure_is_told_in_words_and_the_next_try_works(page: Page) -> None:
    ask(page, "!error 2")
    expect(answer(page)).to_have_attribute("data-state", re.compile("failed|interrupted"), timeout=20_000)
    expect(answer(page).locator(".trouble p")).to_have_text(re.compile(r"^[A-Z].{10,}"))
    expect(answer(page).get_by_role("button", name="Try again")).to_be_visible()
    ask(page, "!tokens 3")
    ended(page)


def test_code_has_its_language_colours_and_a_copy_button(session: Watched, page: Page, origin: str) -> None:
    session.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=origin)
    choose_model(page, HOSTILE)
    ask(page, "code")
    ended(page)
    block = answer(page).locator(".code").first
    block.get_by_role("button", name="Copy code").click()
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert copied == "</code></pre><script>alert(10)</script>"
    expect(block.locator(".hljs-name").first).to_be_visible()


def test_a_draft_outlives_a_refresh_and_the_theme_is_kept(page: Page) -> None:
    page.get_by_label("Your message").fill("half a thought")
    page.get_by_role("button", name="Theme: system").click()
    page.get_by_role("button", name="Theme: light").click()
    page.reload()
    expect(page.get_by_label("Your message")).to_have_value("half a thought")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.get_by_role("button", name="Theme: dark").click()
    page.get_by_label("Your message").fill("")


def test_what_is_typed_before_the_scripts_have_run_is_kept(session: Watched, origin: str) -> None:
    page = session.page()
    late: list[Route] = []
    # Only the page's own: the theme's stands before the page, which would not be there without it.
    page.route(re.compile(r"/webchat/chat\b[^/]*\.js"), lambda route: late.append(route))
    page.goto(f"{origin}/chat/", wait_until="commit")
    page.get_by_label("Your message").fill("early words")
    eventually(lambda: page.wait_for_timeout(50) or late, seconds=10, what="the script is asked for")
    late[0].continue_()
    page.wait_for_load_state()
    expect(page.get_by_role("button", name="Send")).to_be_enabled()  # the script has run
    expect(page.get_by_label("Your message")).to_have_value("early words")
    page.unroute_all()
    page.reload()
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    expect(page.get_by_label("Your message")).to_have_value("early words")  # a draft like any other
    page.get_by_label("Your message").fill("")
    page.close()


def test_on_a_phone_enter_makes_a_new_line_and_the_list_is_a_drawer(
    served: Roundhouse, browser: Browser, origin: str
) -> None:
    watched = watch(browser, origin, viewport={"width": 400, "height": 780}, has_touch=True, is_mobile=True)
    page = watched.page()
    log_in(page, served, origin)
    choose_model(page, MODEL)
    page.get_by_label("Your message").fill("!tokens 3")
    page.keyboard.press("Enter")
    page.keyboard.type("two lines")
    expect(page.get_by_label("Your message")).to_have_value("!tokens 3\ntwo lines")
    page.get_by_role("button", name="Send").tap()
    ended(page)
    page.get_by_role("button", name="Conversations").tap()
    expect(page.locator("#conversations a").first).to_be_in_viewport()
    page.get_by_role("button", name="Close the list").tap()
    expect(page.locator("#conversations a").first).not_to_be_in_viewport()
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert watched.faults == []
    watched.context.close()


def test_a_wrong_password_is_told_and_logging_out_ends_the_session(
    served: Roundhouse, browser: Browser, origin: str
) -> None:
    watched = watch(browser, origin)
    page = watched.page()
    page.goto(f"{origin}/login/")
    page.get_by_label("User name").fill("nobody")
    page.get_by_label("Password").fill("wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_contain_text("correct username and password")
    log_in(page, served, origin)
    page.get_by_role("button", name="Log out").click()
    page.goto(f"{origin}/chat/")
    expect(page).to_have_url(re.compile("/login/"))
    assert watched.faults == []
    watched.context.close()
