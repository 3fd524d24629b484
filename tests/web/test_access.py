"""Everybody can use the page: with a key, in both themes, on a phone, and with a screen reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from server.keys.file import add_key
from server.keys.key import Scope
from tests.api.live import LiveServer, live_server
from tests.web.watched import Watched, watching

AXE = Path(__file__).parents[2] / "web/node_modules/axe-core/axe.min.js"
PLACES = (
    "/compare?with=banking77&with=&text=Where+is+my+card",
    "/tasks",
    "/tasks/sms_spam",
    "/tasks/emotion/interpretation",
    "/upload",
    "/train",
    "/evaluate?task=sms_spam",
    "/server",
)


def violations(page: Page) -> list[str]:
    """What axe-core finds, as `rule: element`."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found: dict[str, Any] = page.evaluate("axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'wcag22aa']})")
    return [f"{one['id']}: {node['html'][:200]}" for one in found["violations"] for node in one["nodes"]]


@pytest.mark.skipif(not AXE.exists(), reason="needs axe-core: make lint installs it")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, site: LiveServer, theme: str) -> None:
    with watching(browser, site.url, color_scheme=theme, reduced_motion="reduce") as page:
        for place in PLACES:
            shown = page.open(place)
            if place.startswith("/compare"):
                expect(shown.get_by_text("Score the 77 labels")).to_be_visible()
                page.run()
                assert violations(shown) == []
                shown.get_by_text("Score the 77 labels").click()
                page.run()
                shown.locator(".token").first.focus()
            assert violations(shown) == []
            shown.keyboard.press("Escape")
        shown.get_by_role("button", name="Keyboard shortcuts").click()
        assert violations(shown) == []


@pytest.mark.parametrize("place", PLACES)
def test_a_phone_scrolls_in_one_direction_only(browser: Browser, site: LiveServer, place: str) -> None:
    with watching(browser, site.url, viewport={"width": 360, "height": 740}) as page:
        shown = page.open(place)
        shown.wait_for_timeout(300)
        assert shown.evaluate("document.documentElement.scrollWidth") == 360


def test_the_theme_and_the_shortcuts_are_at_hand(page: Watched) -> None:
    shown = page.open("/tasks")
    shown.get_by_role("button", name="Theme: system").click()
    shown.get_by_role("button", name="Theme: light").click()
    shown.reload()
    assert shown.evaluate("document.documentElement.dataset.theme") == "dark"
    shown.get_by_role("button", name="Theme: dark").wait_for()
    shown.keyboard.press("?")
    expect(shown.get_by_role("dialog", name="Keyboard")).to_be_visible()


def test_a_key_is_asked_for_and_stays_in_this_tab(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    _, key = add_key(path, "user", [Scope.ADMIN], None)
    with live_server(tmp_path, api_keys_file=path) as live, watching(browser, live.url) as page:
        page.refusals.add(401)
        shown = page.open("/tasks")
        expect(shown.get_by_text("This server requires a key.")).to_be_visible()
        for typed, button in (("prelude_wrong", "Enter a key"), (key, "Enter another key")):
            shown.get_by_role("button", name=button).click()
            shown.get_by_label("Key, as").fill(typed)
            shown.get_by_role("button", name="Use this key").click()
            expect(shown.get_by_text("This server requires a key.")).to_have_count(0)
            expect(shown.get_by_text("The server does not accept this key")).to_have_count(1 if typed != key else 0)
        expect(shown.get_by_text("No tasks yet")).to_be_visible()
        assert key not in shown.url
        assert (
            shown.evaluate("[document.cookie, ...Object.values(localStorage), ...Object.values(sessionStorage)].join()")
            == ""
        )
        shown.reload()
        expect(shown.get_by_text("This server requires a key.")).to_be_visible()
