"""What a view shows when its inputs are odd, or when what it shows disappears."""

from __future__ import annotations

import json
from pathlib import Path

from playwright.sync_api import expect

from tests.api.live import LiveServer
from tests.support import random_soft_prompt
from tests.web.test_tasks import HOSTILE, publish
from tests.web.watched import Watched

LONG = "w" * 600
LABELS = ["\u202eright to left", "\u200b\u200d\ufeff", LONG, HOSTILE, "<script>alert(2)</script>"]
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def test_labels_of_any_text_are_bars_that_fit_a_phone(page: Watched, site: LiveServer) -> None:
    manifest = {"labels": LABELS, "description": LONG, "examples": [LONG, "\u202e"]}
    site.publish("ui-odd", random_soft_prompt(site.model.spec, manifest=manifest))
    page.page.set_viewport_size({"width": 390, "height": 844})
    shown = page.open("/compare?with=ui-odd&text=hello")
    expect(shown.get_by_text("Score the 5 labels")).to_be_visible()
    page.run()
    expect(shown.locator("section.column tr")).to_have_count(len(LABELS))
    expect(shown.get_by_role("rowheader", name="U+200BU+200DU+FEFF")).to_be_visible()
    for place in ("/compare?with=ui-odd&text=hello", "/tasks", "/tasks/ui-odd"):
        shown = page.open(place)
        expect(shown.get_by_text(LONG).first).to_be_visible()
        assert shown.evaluate(OVERFLOW) <= 0, place
    assert shown.locator("main img, main script").count() == 0


def test_half_a_surrogate_pair_in_the_text_is_refused_with_a_reason(page: Watched) -> None:
    page.refusals.update({400, 422})
    shown = page.open("/compare?with=sms_spam&labels=0&max=2")
    shown.get_by_label("Text").evaluate(
        "box => { box.value = '\\ud83d half'; box.dispatchEvent(new Event('input', { bubbles: true })); }"
    )
    page.run()
    expect(shown.locator(".token, [role=alert]").first).to_be_visible()


def test_a_task_that_is_deleted_while_it_is_shown_is_reported_as_gone(page: Watched, site: LiveServer) -> None:
    publish(site, "ui-gone", "the first", "the second")
    page.refusals.update({404, 412})
    shown = page.open("/tasks/ui-gone")
    expect(shown.get_by_role("button", name="Activate")).to_be_visible()
    assert site.client.delete("/prompts/ui-gone").status_code == 204
    shown.get_by_role("button", name="Activate").click()
    expect(shown.get_by_role("alert")).to_contain_text("404")
    expect(shown.get_by_role("button", name="Activate")).to_have_count(0)
    expect(shown.get_by_role("button", name="Roll back")).to_have_count(0)


def test_a_link_is_followed_although_the_view_writes_its_own_address(page: Watched) -> None:
    shown = page.open("/compare?with=sms_spam")
    expect(shown.locator("section.column")).to_have_count(1)
    shown.evaluate(
        """() => {
          const box = document.querySelector('textarea');
          location.hash = '#/tasks';
          box.value = 'typed in the last moment';
          box.dispatchEvent(new Event('input', { bubbles: true }));
        }"""
    )
    expect(shown.get_by_role("heading", name="Tasks")).to_be_visible()
    assert shown.url.endswith("#/tasks")


def test_a_folder_that_is_dropped_or_chosen_is_found_with_its_name(
    page: Watched, site: LiveServer, tmp_path: Path
) -> None:
    folder = tmp_path / "ui-folder"
    folder.mkdir()
    for name, content in site.files(random_soft_prompt(site.model.spec, seed=9)).items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text(json.dumps(HOSTILE))
    shown = page.open("/upload")
    devtools = shown.context.new_cdp_session(shown)
    box = shown.get_by_role("group", name="Soft prompt").bounding_box()
    assert box is not None
    data = {"items": [], "files": [str(folder)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        event = {"type": kind, "x": box["x"] + 8, "y": box["y"] + 8, "data": data}
        devtools.send("Input.dispatchDragEvent", event)
    expect(shown.get_by_text("ui-folder is a new task")).to_be_visible()
    shown.reload()
    shown.locator("input[webkitdirectory]").set_input_files(folder)
    expect(shown.get_by_text("ui-folder is a new task")).to_be_visible()
    expect(shown.get_by_label("Publish as task")).to_have_value("ui-folder")
