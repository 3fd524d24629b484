"""What a soft prompt means, and what drove an answer: pictures with text, by keyboard."""

from __future__ import annotations

import json
import re
from pathlib import Path

from playwright.sync_api import Route, expect

from tests.api.live import LiveServer
from tests.web.watched import Watched


def test_the_interpretation_of_emotion_begins_with_its_verdict(page: Watched, site: LiveServer) -> None:
    verdict = site.client.get("/prompts/emotion/interpretation", timeout=120).json()["verdict"]
    shown = page.open("/tasks/emotion")
    shown.get_by_role("link", name="Interpretation").click()
    expect(shown.locator(".verdict").first).to_have_text(verdict)
    table = shown.get_by_role("region", name="Virtual tokens").get_by_role("table")
    expect(table.locator("tbody tr")).to_have_count(20)
    expect(table.locator("tbody tr").first).to_contain_text(re.compile(r"its start.*0\.\d\d"))
    expect(shown.get_by_role("region", name="What it raises")).to_contain_text("control: the start alone")
    shown.get_by_role("button", name="View code").click()
    expect(shown.get_by_role("dialog").locator("pre")).to_contain_text("/prompts/emotion/interpretation")


def test_an_experiment_is_started_watched_and_cancelled(page: Watched, site: LiveServer, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"input": f"I feel fine {n}", "target": "gratitude"}) for n in range(200)))
    shown = page.open("/tasks/emotion/interpretation")
    shown.get_by_label("Choose a file").set_input_files(rows)
    shown.get_by_role("button", name="Run experiments").click()
    expect(shown.get_by_role("progressbar")).to_be_visible()
    shown.get_by_role("button", name="Cancel").click()
    expect(shown.get_by_role("status").filter(has_text="Experiments cancelled.")).to_be_attached()
    assert [job["state"] for job in site.client.get("/interpretations").json()["interpretations"]] == ["cancelled"]


def test_the_influence_on_an_answer_opens_and_is_read_by_keyboard(page: Watched) -> None:
    shown = page.open("/compare?with=e2e_nlg&with=&labels=0&max=6&text=name[The+Punter],+eatType[pub]")
    page.run()
    expect(shown.get_by_role("button", name="What drove this answer")).to_have_count(1)
    shown.get_by_role("button", name="What drove this answer").focus()
    shown.keyboard.press("Enter")
    grid = shown.get_by_role("dialog").get_by_role("grid")
    cell = grid.locator("[data-row='0'][data-column='0']")
    cell.focus()
    for key in ("ArrowDown", "ArrowRight"):
        shown.keyboard.press(key)
    expect(grid.locator("[data-row='1'][data-column='1']")).to_be_focused()
    expect(shown.locator(".said")).to_contain_text(re.compile(r"virtual token 1, output token .+: [+−]?\d\.\d\d nats"))
    shown.keyboard.press("Escape")
    expect(shown.get_by_role("dialog")).to_have_count(0)
    expect(shown.get_by_role("button", name="What drove this answer")).to_be_focused()


def test_a_refusal_to_measure_has_its_remedy_and_its_request(page: Watched) -> None:
    page.refusals.add(503)
    body = {"error": "It is broken.", "error_type": "generation", "code": "broken", "remedy": "Mend <b>it</b>."}

    def refuse(route: Route) -> None:
        route.fulfill(status=503, json=body, headers={"X-Request-Id": "request-7"})

    page.page.route("**/prompts/sms_spam/interpretation*", refuse)
    shown = page.open("/tasks/sms_spam/interpretation")
    for part in ("It is broken.", "Mend <b>it</b>.", "503", "request-7"):
        expect(shown.get_by_role("alert")).to_contain_text(part)
    expect(shown.get_by_role("button", name="Try again")).to_be_visible()
