"""A browser's page that notes everything which must never happen on it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request

WAIT_MS = 60_000


class Watched:
    """A page, and what went wrong on it."""

    def __init__(self, page: Page, url: str) -> None:
        """Start to watch a page of the server at `url`."""
        self.page = page
        self.url = url
        self.problems: list[str] = []
        self.refusals: set[int] = set()
        """Statuses that the test provokes; the browser reports each on the console."""
        self.expected: tuple[str, ...] = ()
        """Parts of other messages that the test provokes."""
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}"))
        page.on("request", self._request)

    def open(self, place: str) -> Page:
        """Open a view by what stands after # in its address."""
        self.page.goto(f"{self.url}/#{place}")
        self.page.locator("main h1").first.wait_for(state="attached")
        return self.page

    def run(self) -> None:
        """Press what runs a comparison, and wait for its end."""
        self.page.keyboard.press("Control+Enter")
        self.page.locator(".token, table, [role=alert]").first.wait_for()
        self.page.locator("[aria-busy=true]").first.wait_for(state="detached")

    def _console(self, message: ConsoleMessage) -> None:
        if message.type not in ("error", "warning"):
            return
        provoked = (*(f"status of {status} " for status in self.refusals), *self.expected)
        if any(part in message.text for part in provoked):
            return
        self.problems.append(f"console: {message.text}")

    def _request(self, request: Request) -> None:
        if not request.url.startswith((f"{self.url}/", "blob:", "data:")):
            self.problems.append(f"foreign request: {request.url}")


@contextmanager
def watching(browser: Browser, url: str, **options: Any) -> Iterator[Watched]:
    """A new page in a context of its own, which must have had no problem at the end of the block."""
    from playwright.sync_api import expect

    expect.set_options(timeout=WAIT_MS)  # its own default, 5 s, is too short for an answer on a busy machine
    asyncio._set_running_loop(browser._loop)  # other tests of this process may run loops of their own in between
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    context.set_default_timeout(WAIT_MS)
    try:
        watched = Watched(context.new_page(), url)
        yield watched
        assert not watched.problems, watched.problems
    finally:
        context.close()
        asyncio._set_running_loop(None)
