"""The Server view, and what a page does when the server, or its key, goes away."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import Browser, Page, expect

from server.keys.file import add_key, revoke_key
from server.keys.key import Scope
from tests.api.live import LiveServer, SteeredModel, live_server
from tests.web.watched import Watched, watching

HIDE = """(hidden) => {
  Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
  document.dispatchEvent(new Event('visibilitychange'));
}"""


def test_figures_are_read_only_while_the_page_is_visible(page: Watched, site: LiveServer) -> None:
    polls: list[str] = []
    page.page.on("request", lambda request: polls.append(request.url) if "/metrics" in request.url else None)
    shown = page.open("/server")
    expect(shown.locator("figure path[d^=M]")).to_have_count(4)
    site.text("Win a prize now!", "sms_spam", max_new_tokens=2)
    now = shown.get_by_label("Now")
    expect(now).to_contain_text(re.compile(r"first token, p95\s*[\d.]+\u202f(ms|s)"))
    expect(shown.get_by_text(site.model.spec.fingerprint)).to_be_visible()
    shown.evaluate(HIDE, True)
    shown.wait_for_timeout(200)
    before = len(polls)
    shown.wait_for_timeout(5500)
    assert len(polls) == before
    shown.evaluate(HIDE, False)
    shown.wait_for_timeout(1000)
    assert len(polls) > before
    shown.get_by_role("link", name="Tasks").click()
    shown.wait_for_timeout(200)
    before = len(polls)
    shown.wait_for_timeout(5500)
    assert len(polls) == before


def test_a_key_that_was_revoked_is_named_as_the_reason(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    made, key = add_key(path, "user", [Scope.ADMIN], None)
    add_key(path, "another", [Scope.ADMIN], None)
    with live_server(tmp_path, api_keys_file=path) as live, watching(browser, live.url) as page:
        page.refusals.add(401)
        shown = page.open("/tasks")
        shown.get_by_role("button", name="Enter a key").click()
        shown.get_by_label("Key, as").fill(key)
        shown.get_by_role("button", name="Use this key").click()
        expect(shown.get_by_text("No tasks yet")).to_be_visible()
        revoke_key(path, made.id)
        shown.get_by_role("link", name="Server").click()
        expect(shown.get_by_role("alert").first).to_contain_text("it was revoked", timeout=30_000)
        expect(shown.get_by_role("button", name="Enter another key")).to_be_visible()


def test_two_tabs_with_twelve_streams_leave_the_rest_of_the_page_at_work(browser: Browser, tmp_path: Path) -> None:
    model = SteeredModel()
    with live_server(tmp_path, max_sequences=16, model=model) as live, watching(browser, live.url) as page:
        model.delay = 0.03
        tabs: list[Page] = [page.page, page.page.context.new_page()]
        for tab in tabs:
            tab.goto(f"{live.url}/#/compare?{'&'.join(['with='] * 6)}&max=100&text=hello")
            expect(tab.locator("section.column")).to_have_count(6)
            tab.keyboard.press("Control+Enter")
        for tab in tabs:
            tab.locator("section.column").nth(5).locator(".token").first.wait_for()
            assert tab.evaluate("fetch('./info', {cache: 'no-store'}).then((reply) => reply.status)") == 200
        for tab in tabs:
            tab.locator("[aria-busy=true]").first.wait_for(state="detached")
            for column in tab.locator("section.column").all():
                expect(column.locator(".token").first).to_be_visible()
