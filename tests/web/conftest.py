"""One server with the embedded model and one browser for all tests of the page."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from server.engine.model.frozen import FrozenModel
from tests.api.live import LiveServer, live_server, wait_until
from tests.web.watched import Watched, watching

if TYPE_CHECKING:
    from playwright.sync_api import Browser

collect_ignore_glob = [] if importlib.util.find_spec("playwright") else ["test_[!b]*.py"]
"""An environment that is older than these tests still runs all others."""

ROOT = Path(__file__).parents[2]
TASKS = ("banking77", "e2e_nlg", "emotion", "sms_spam")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium; Playwright brings none."""
    path = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium-headless-shell")
    if not (ROOT / "server/web/dist/index.html").exists():
        pytest.skip("needs the page: make page")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        loop = asyncio.get_running_loop()
        asyncio._set_running_loop(None)  # it would be in the way of all other tests; `watching` sets it again
        yield browser
        asyncio._set_running_loop(loop)
        browser.close()


@pytest.fixture(scope="session")
def site(
    browser: Browser, served_smollm2: FrozenModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server with four of the shipped tasks, which tests do not change: they publish tasks of their own."""
    folder = tmp_path_factory.mktemp("site")
    for task in TASKS:
        shutil.copytree(ROOT / "prompts" / task, folder / "prompts" / task)
    with live_server(folder, model=served_smollm2, max_upload_bytes=2**26) as live:
        wait_until(lambda: len(live.client.get("/prompts").json()["prompts"]) == len(TASKS), 60)
        yield live


@pytest.fixture
def page(browser: Browser, site: LiveServer) -> Iterator[Watched]:
    """A page of that server; at the end of the test it must have had no error and no foreign request."""
    with watching(browser, site.url) as page:
        yield page
