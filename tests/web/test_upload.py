"""Upload: a dry run is shown before anything changes, then a person stages, publishes and gives traffic."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.api.live import LiveServer, zip_of
from tests.support import random_soft_prompt
from tests.web.test_tasks import HOSTILE, publish
from tests.web.watched import Watched


def choose(shown: Page, name: str, content: bytes) -> None:
    """Give the page a file, as the picker does."""
    shown.locator("input[type=file]").first.set_input_files(
        [{"name": name, "mimeType": "application/zip", "buffer": content}]
    )


def test_a_zip_is_checked_staged_given_traffic_and_rolled_back(page: Watched, site: LiveServer) -> None:
    publish(site, "ui-upload", "the first")
    files = site.files(random_soft_prompt(site.model.spec, seed=7, manifest={"description": HOSTILE}))
    shown = page.open("/upload")
    choose(shown, "ui-upload-1.zip", zip_of({**files, "<img src=x onerror=alert(1)>": b""}))
    report = shown.get_by_role("region", name="What a publish would change")
    expect(report).to_contain_text("This becomes v2 of ui-upload. v1 is live now.")
    expect(report).to_contain_text("<img src=x onerror=alert(1)>")
    expect(report).to_contain_text("no version of the task has them")
    assert site.client.get("/prompts/ui-upload").json()["versions"] == [1]
    shown.get_by_role("button", name="Stage v2").click()
    expect(shown.get_by_role("heading", name="ui-upload@2 is staged")).to_be_visible()
    shown.get_by_role("link", name="Give it traffic").click()
    shown.get_by_role("slider").fill("10")
    shown.get_by_role("button", name="Apply").click()
    expect(shown.locator("p[role=status]")).to_contain_text("v2 10 %")
    assert site.client.get("/prompts/ui-upload").json()["traffic"] == {"1": 90, "2": 10}
    shown.get_by_role("button", name="Roll back").click()
    expect(shown.locator("p[role=status]")).to_contain_text("live again")
    assert site.client.get("/prompts/ui-upload").json()["version"] == 1
    assert shown.locator("main img").count() == 0


def test_nothing_is_published_over_a_change_of_somebody_else(page: Watched, site: LiveServer) -> None:
    page.refusals.update({412, 422})
    shown = page.open("/upload")
    choose(shown, "<b>.zip", b"no zip")
    shown.get_by_label("Publish as task").fill("ui-upload-raced")
    shown.get_by_role("button", name="Check").click()
    expect(shown.get_by_role("alert")).to_contain_text("The zip cannot be read")
    choose(shown, "ui-upload-raced.zip", zip_of(site.files(random_soft_prompt(site.model.spec, seed=8))))
    expect(shown.get_by_text("ui-upload-raced is a new task")).to_be_visible()
    publish(site, "ui-upload-raced", "somebody else's")
    shown.get_by_role("button", name="Publish as v1").click()
    expect(shown.get_by_role("alert")).to_contain_text("Somebody else changed ui-upload-raced")
    shown.get_by_role("button", name="Publish as v2").click()
    expect(shown.get_by_role("heading", name="ui-upload-raced@2 is live")).to_be_visible()
