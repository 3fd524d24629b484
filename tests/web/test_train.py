"""Train: rows are checked by line before they are sent, and a job is watched until its end."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields

from playwright.sync_api import expect

from server.train.config import TrainingConfig
from tests.api.live import LiveServer
from tests.web.watched import Watched

MARKUP = "<img src=x onerror=alert(1)>"


def rows(*extra: str) -> bytes:
    """Twenty rows of two labels, then other lines."""
    good = [{"input": f"{MARKUP} {number}", "target": ("ham", "spam")[number % 2]} for number in range(20)]
    return "\n".join([*map(json.dumps, good), *extra]).encode()


def test_bad_lines_are_named_and_defaults_are_the_servers(page: Watched) -> None:
    shown = page.open("/train")
    file = {"name": f"{MARKUP}.jsonl", "mimeType": "text/plain", "buffer": rows('{"input": "a"}', "{")}
    shown.locator("input[type=file]").first.set_input_files([file])
    expect(shown.get_by_role("alert")).to_contain_text("2 lines are wrong")
    expect(shown.get_by_role("alert")).to_contain_text("line 21 no text in “target”")
    expect(shown.get_by_role("button", name="Train", exact=True)).to_be_disabled()
    assert shown.locator("main img").count() == 0
    for field in fields(TrainingConfig):
        box = shown.locator(f'input[name="config.{field.name}"]')
        if box.count() and field.default is not None:
            default = field.default if field.default is not MISSING else None
            standard = getattr(default, "default", default)
            assert box.get_attribute("placeholder") == ("" if standard is None else str(standard)), field.name


def test_rows_are_pasted_after_a_click(page: Watched) -> None:
    shown = page.open("/train")
    shown.get_by_text("Drop or paste JSONL").click()
    shown.evaluate(
        """text => {
          const data = new DataTransfer();
          data.setData('text/plain', text);
          const pasted = new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true });
          document.activeElement.dispatchEvent(pasted);
        }""",
        rows().decode(),
    )
    expect(shown.get_by_text("· 20 rows")).to_be_visible()


def test_five_steps_are_trained_from_dropped_rows_and_watched(page: Watched, site: LiveServer) -> None:
    shown = page.open("/train")
    transfer = shown.evaluate_handle(
        "text => { const t = new DataTransfer(); t.items.add(new File([text], 'twenty.jsonl')); return t; }",
        rows().decode(),
    )
    shown.get_by_role("group", name="Rows to learn from").dispatch_event("drop", {"dataTransfer": transfer})
    expect(shown.get_by_text("· 20 rows")).to_be_visible()
    expect(shown.get_by_text("2 labels: ham 10 · spam 10")).to_be_visible()
    expect(shown.get_by_text("Chosen for 20 rows: 40 steps")).to_be_visible()
    for name, standard in {"steps": "40", "batch_size": "8", "learning_rate": "0.02"}.items():
        expect(shown.locator(f'input[name="config.{name}"]')).to_have_attribute("placeholder", standard)
    shown.get_by_label("Name", exact=True).fill("ui-trained")
    for name, value in {"steps": 5, "num_virtual_tokens": 2, "batch_size": 2, "learning_rate": 0.05}.items():
        shown.locator(f'input[name="config.{name}"]').fill(str(value))
    shown.get_by_role("button", name="Train", exact=True).click()
    expect(shown.get_by_role("status")).to_contain_text("v1 is staged", timeout=200_000)
    shown.reload()  # the whole curve comes again
    expect(shown.get_by_role("slider", name="Step of the curve")).to_have_attribute("aria-valuenow", "5")
    assert len((shown.locator("polyline.training").get_attribute("points") or "").split()) >= 2
    assert shown.locator("circle").count() >= 1
    expect(shown.get_by_role("link", name="Try it")).to_have_attribute("href", "#/compare?with=ui-trained%401&with=")
    assert site.client.get("/prompts/ui-trained").json()["versions"] == [1]
    config = site.client.get(f"/training/jobs/{shown.url.rpartition('/')[2]}").json()["spec"]["config"]
    assert (config["steps"], config["learning_rate"]) == (5, 0.05), "what a person types counts"
    shown.get_by_role("link", name="What it learned").click()
    expect(shown.locator(".verdict").first).to_be_visible()
    shown.get_by_role("link", name="Versions").click()
    shown.get_by_role("link", name="Interpretation").click()  # no version is live: the newest is shown
    expect(shown.locator(".verdict").first).to_be_visible()
    expect(shown.get_by_role("alert")).to_have_count(0)
    page.open("/train")
    expect(shown.get_by_role("link", name="ui-trained")).to_be_visible()
