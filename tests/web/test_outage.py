"""A server process that is killed in mid-answer: the page keeps what arrived, and works once it is back."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import Browser, expect

from tests.processes import prelude_serve
from tests.web.watched import watching


def test_an_answer_of_a_killed_server_is_kept_and_asked_again_once_it_is_back(
    browser: Browser, served_tiny: dict[str, str], tmp_path: Path
) -> None:
    slow = "import time; from server.engine.engine import Engine; step = Engine.step\n"
    slow += "Engine.step = lambda self: (time.sleep(0.05), step(self))[1]"  # an answer takes seconds, not a moment
    with prelude_serve(tmp_path, slow, **served_tiny) as server:
        port = server.client.base_url.port
        with watching(browser, f"http://127.0.0.1:{port}") as page:
            page.expected = ("net::ERR_",)
            shown = page.open("/compare?with=&max=100&text=hello")
            column = shown.locator("section.column").first
            column.wait_for()
            shown.keyboard.press("Control+Enter")
            column.locator(".token").nth(3).wait_for()
            server.popen.kill()
            alert = column.get_by_role("alert")
            expect(alert).to_contain_text("The connection ended before the answer did.")
            kept = column.locator(".token").count()
            assert 4 <= kept < 100
            shown.get_by_role("button", name="Try again").click()
            expect(shown.get_by_role("alert").first).to_contain_text("The server cannot be reached.")
            with prelude_serve(tmp_path, PRELUDE_PORT=str(port), **served_tiny):
                shown.get_by_role("button", name="Try again").first.click()
                expect(column.locator("dl")).to_contain_text(re.compile("length|end token"))
                assert column.locator(".token").count() > 0
                expect(shown.get_by_role("alert")).to_have_count(0)
