"""Evaluate: rows are dropped, two versions are measured beside traffic, and their difference stays at its address."""

from __future__ import annotations

import json
import re

from playwright.sync_api import expect

from tests.api.live import LiveServer
from tests.support import random_soft_prompt
from tests.web.test_tasks import publish
from tests.web.watched import Watched

MARKUP = "<img src=x onerror=alert(1)>"
LABELS = ("ham", MARKUP)


def test_two_versions_are_measured_and_their_difference_survives_a_reload(page: Watched, site: LiveServer) -> None:
    for seed in range(2):
        manifest = {"generation": {"max_new_tokens": 3}}
        site.publish("ui-measured", random_soft_prompt(site.model.spec, seed=seed, manifest=manifest))
    rows = [{"input": f"{MARKUP} {number}", "target": LABELS[number % 2]} for number in range(6)]
    shown = page.open("/evaluate?task=ui-measured%402")
    shown.locator("input[type=file]").first.set_input_files(
        [{"name": f"{MARKUP}.jsonl", "mimeType": "text/plain", "buffer": "\n".join(map(json.dumps, rows)).encode()}]
    )
    expect(shown.get_by_text("6 rows", exact=False).first).to_be_visible()
    shown.get_by_label("Compared with").select_option("ui-measured@1")
    assert "against=1" in shown.url
    shown.get_by_label("zero-shot").check()
    shown.get_by_role("button", name="View code").click()
    code = shown.get_by_role("dialog").locator("pre")
    expect(code).to_contain_text("--form-string 'baselines=@1,zero-shot'")
    shown.get_by_role("button", name="Shell").click()
    expect(code).to_contain_text("prelude eval 'ui-measured@2'")
    shown.keyboard.press("Escape")
    shown.get_by_role("button", name="Evaluate", exact=True).click()
    expect(shown.get_by_role("status")).to_contain_text("95 % interval", timeout=60_000)
    shown.reload()
    status = shown.get_by_role("status")
    expect(status).to_contain_text("ui-measured@1: accuracy")
    expect(status).to_contain_text("zero-shot: accuracy")
    figures = shown.get_by_role("region", name="Figures")
    for name in ("ui-measured@2", "ui-measured@1", "zero-shot"):
        expect(figures.get_by_role("rowheader", name=name, exact=True).first).to_be_visible()
    job = shown.url.rpartition("/")[2]
    result = site.client.get(f"/evaluations/{job}").json()["result"]["contestants"]
    for name in ("ui-measured@2", "ui-measured@1"):
        expect(figures).to_contain_text(f"{100 * result[name]['accuracy_choices']['value']:.1f}")
    low, high = result["ui-measured@1"]["difference"]["accuracy_choices"]["interval"]
    written = f"{100 * low:.1f} to {100 * high:.1f}".replace("-", "−")
    expect(shown.get_by_role("region", name="Differences")).to_contain_text(written)
    shown.get_by_text("2 labels").click()
    expect(shown.get_by_role("rowheader", name=MARKUP)).to_be_visible()
    shown.get_by_text("Card, as Markdown").click()
    expect(shown.locator("article pre")).to_contain_text("ui-measured")
    page.open("/evaluate")
    expect(shown.get_by_role("link", name="ui-measured@2")).to_be_visible()
    shown.get_by_role("link", name="ui-measured@2").click()
    shown.get_by_role("button", name="Delete the record").click()
    expect(shown.get_by_role("heading", name="Evaluate")).to_be_visible()
    expect(shown.get_by_role("link", name="ui-measured@2")).to_have_count(0)
    assert shown.locator("main img").count() == 0


def test_an_error_of_the_server_and_wrong_lines_are_shown(page: Watched, site: LiveServer) -> None:
    page.refusals.add(404)
    shown = page.open("/evaluate?task=ui-absent")
    picker = shown.locator("input[type=file]").first
    picker.set_input_files([{"name": "a.jsonl", "mimeType": "text/plain", "buffer": b'{"input": "a"}'}])
    expect(shown.get_by_role("alert")).to_contain_text("line 1 no text in “target”")
    expect(shown.get_by_role("button", name="Evaluate", exact=True)).to_be_disabled()
    shown.get_by_role("button", name="Remove a.jsonl").click()
    picker.set_input_files([{"name": "a.jsonl", "mimeType": "text/plain", "buffer": b'{"input": "a", "target": "b"}'}])
    shown.get_by_role("button", name="Evaluate", exact=True).click()
    expect(shown.get_by_role("alert")).to_contain_text("ui-absent")
    page.open("/evaluate/0123456789abcdef")
    expect(shown.get_by_role("alert")).to_contain_text("0123456789abcdef")


def test_an_evaluation_is_cancelled_from_its_page(page: Watched, site: LiveServer) -> None:
    publish(site, "ui-endless", "the first")
    rows = "\n".join(json.dumps({"input": f"row {number}", "target": LABELS[number % 2]}) for number in range(4000))
    shown = page.open("/evaluate?task=ui-endless&against=1")
    expect(shown.get_by_label("Compared with")).to_contain_text("no other version")
    expect(shown).not_to_have_url(re.compile("against"))
    shown.locator("input[type=file]").first.set_input_files(
        [{"name": "a.jsonl", "mimeType": "text/plain", "buffer": rows.encode()}]
    )
    shown.get_by_role("button", name="Evaluate", exact=True).click()
    expect(shown.get_by_text("of 4,000 answers")).to_be_visible()
    shown.get_by_role("button", name="Cancel").click()
    expect(shown.get_by_role("status")).to_have_text("cancelled")
    shown.get_by_role("button", name="Delete the record").click()
    expect(shown.get_by_role("heading", name="Evaluate")).to_be_visible()
