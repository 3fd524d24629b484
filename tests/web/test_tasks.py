"""The list of tasks and the page of one: versions, difference, canary, rollback, download, deletion."""

from __future__ import annotations

import json
import re

from playwright.sync_api import Browser, Route, expect

from tests.api.live import LiveServer
from tests.support import random_soft_prompt
from tests.web.watched import Watched, watching

HOSTILE = "<img src=x onerror=alert(1)>{@html '<b>'}&amp;\u202e\u0000 `${alert(1)}`"


def publish(site: LiveServer, task: str, *descriptions: str) -> None:
    """Versions of a task, one for each description."""
    for seed, description in enumerate(descriptions):
        manifest = {"description": description, "metrics": {"test_accuracy": 0.5 + seed / 10}}
        site.publish(task, random_soft_prompt(site.model.spec, seed=seed, manifest=manifest))


def test_a_canary_is_divided_by_a_slider_and_rolled_back(page: Watched, site: LiveServer) -> None:
    publish(site, "ui-canary", "the first", "the second")
    shown = page.open("/tasks/ui-canary")
    slider = shown.get_by_role("slider")
    slider.fill("10")
    shown.get_by_role("button", name="Apply").click()
    expect(shown.locator("p[role=status]")).to_contain_text("v2 90 %")
    assert site.client.get("/prompts/ui-canary").json()["traffic"] == {"1": 10, "2": 90}
    shown.get_by_role("button", name="Roll back").click()
    expect(shown.locator("p[role=status]")).to_contain_text("live again")
    assert site.client.get("/prompts/ui-canary").json()["version"] == 2


def test_a_change_of_somebody_else_is_not_overwritten(page: Watched, site: LiveServer) -> None:
    publish(site, "ui-raced", "the first", "the second")
    page.refusals.add(412)
    shown = page.open("/tasks/ui-raced")
    expect(shown.get_by_role("button", name="Activate")).to_be_visible()
    assert site.client.post("/prompts/ui-raced/activate", json={"version": 1}).status_code == 200
    shown.get_by_role("button", name="Activate").click()
    expect(shown.get_by_role("alert")).to_contain_text("Somebody else changed ui-raced")
    assert site.client.get("/prompts/ui-raced").json()["version"] == 1


def test_two_versions_are_compared_field_by_field(page: Watched, site: LiveServer) -> None:
    publish(site, "ui-diff", "the first", "the second")
    shown = page.open("/tasks/ui-diff")
    for version in (1, 2):
        shown.get_by_label(f"Select v{version} for a difference").check()
    section = shown.get_by_role("region", name="Difference of v1 and v2")
    expect(section).to_contain_text("The vectors differ.")
    expect(section.locator("pre").first).to_contain_text("the first")
    expect(section.locator("pre").nth(1)).to_contain_text("the second")


def test_a_version_is_downloaded_and_a_task_deleted_by_typing_its_name(page: Watched, site: LiveServer) -> None:
    publish(site, "ui-doomed", "the only one")
    shown = page.open("/tasks/ui-doomed")
    with shown.expect_download() as download:
        shown.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "ui-doomed-1.zip"
    shown.get_by_role("button", name="Delete…").click()
    delete = shown.get_by_role("dialog").get_by_role("button", name="Delete")
    shown.get_by_label("Type the task's name").fill("ui-doome")
    expect(delete).to_be_disabled()
    shown.get_by_label("Type the task's name").fill("ui-doomed")
    delete.click()
    expect(shown.get_by_role("heading", name="Tasks")).to_be_visible()
    assert site.client.get("/prompts/ui-doomed").status_code == 404


def test_a_version_is_deleted_only_once_it_is_confirmed(page: Watched, site: LiveServer) -> None:
    publish(site, "ui-pruned", "the first", "the second")
    shown = page.open("/tasks/ui-pruned")
    shown.get_by_role("button", name="Delete… v1").click()
    shown.get_by_role("dialog").get_by_role("button", name="Keep it").click()
    expect(shown.get_by_role("dialog")).to_have_count(0)
    assert site.client.get("/prompts/ui-pruned").json()["versions"] == [1, 2]
    shown.get_by_role("button", name="Delete… v1").click()
    shown.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
    expect(shown.locator("p[role=status]")).to_contain_text("v1 is deleted")
    assert site.client.get("/prompts/ui-pruned").json()["versions"] == [2]


def test_the_lines_of_a_list_that_differ_are_marked(page: Watched, site: LiveServer) -> None:
    for labels in (["ham", "spam"], ["ham", "spam", "unsure"]):
        site.publish("ui-marked", random_soft_prompt(site.model.spec, manifest={"labels": labels}))
    shown = page.open("/tasks/ui-marked")
    for version in (1, 2):
        shown.get_by_label(f"Select v{version} for a difference").check()
    expect(shown.locator("mark")).to_have_text(['"unsure"'])


def test_hostile_texts_stay_texts(page: Watched, site: LiveServer) -> None:
    manifest = {"description": HOSTILE, "labels": [HOSTILE, "<script>alert(2)</script>"], "<b>": {"<i>": HOSTILE}}
    site.publish("ui-hostile", random_soft_prompt(site.model.spec, manifest=manifest))
    shown = page.open("/tasks")
    expect(shown.get_by_text("<img src=x onerror=alert(1)>").first).to_be_visible()
    shown = page.open("/tasks/ui-hostile")
    expect(shown.get_by_text("<img src=x onerror=alert(1)>").first).to_be_visible()
    page.open("/compare?with=ui-hostile&text=%3Cimg%20src%3Dx%20onerror%3Dalert(3)%3E")
    expect(shown.get_by_text("Score the 2 labels")).to_be_visible()
    page.run()
    expect(shown.get_by_text("<script>alert(2)</script>").first).to_be_visible()
    assert shown.locator("main img, main script, main b").count() == 0


def test_ten_thousand_tasks_scroll_without_a_long_task(browser: Browser, site: LiveServer) -> None:
    names = [f"task-{number:05d}" for number in range(10_000)]

    def prompts(route: Route) -> None:
        after = re.search(r"after=([\w-]+)", route.request.url)
        first = 0 if after is None else names.index(after[1]) + 1
        found = names[first : first + 1000]
        body = {"prompts": [{"task": name, "version": 1, "description": f"the task {name}"} for name in found]}
        if first + 1000 < len(names):
            body["next"] = found[-1]  # type: ignore[assignment]
        route.fulfill(json=body)

    detail = {"task": "x", "version": 1, "versions": [1], "manifest": {"metrics": {"test_accuracy": 0.9}}}
    with watching(browser, site.url) as page:
        page.page.route("**/prompts?*", prompts)
        page.page.route("**/prompts/task-*", lambda route: route.fulfill(body=json.dumps(detail)))
        shown = page.open("/tasks")
        expect(shown.get_by_text("10,000")).to_be_visible()
        late = shown.evaluate(
            """async () => {
              const list = document.querySelector('.list'), times = [];
              let before = performance.now();
              for (let at = 0; at < 90; at += 1) {
                list.scrollTop += 6400;
                await new Promise(requestAnimationFrame);
                times.push(performance.now() - before);
                before = performance.now();
              }
              return times.toSorted((a, b) => a - b)[80];
            }"""
        )
        assert late < 100, "nine frames of ten within a tenth of a second, on a machine that does much else"
        assert shown.locator(".row").count() < 60
        shown.get_by_label("Search tasks").fill("09999")
        expect(shown.locator(".row")).to_have_count(1)
        expect(shown.locator(".row")).to_contain_text("90.0")
