"""Streams: the server's last word in one is shown, one that ends early says so, and both offer to look again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import Route, expect

from tests.web.test_tasks import HOSTILE
from tests.web.watched import Watched

JOB = "20261130t000000000-0123456789ab"
LAST = {"error": f"The job was deleted: {HOSTILE}", "error_type": "validation", "code": "unknown_job", "remedy": "Ask."}
TOKEN = {"target": 0, "event": "token", "token": {"id": 5, "text": "Hello", "logprob": -0.1, "special": False}}
BASE: dict[str, Any] = {"id": JOB, "created_at": "2026-11-30T00:00:00Z", "state": "running", "task": "emotion"}
STATIC = {"verdict": "It is as it was.", "notes": [], "num_virtual_tokens": 0, "peft_type": "PROMPT_TUNING"}
PROGRESS: dict[str, Any] = {"done": 1, "total": 9}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "training": (
        f"/train/{JOB}",
        "/training/jobs",
        {"step": 1, "steps": 9, "spec": {"task": "emotion", "config": {}}, "metrics": {}},
    ),
    "evaluation": (
        f"/evaluate/{JOB}",
        "/evaluations",
        {"version": 1, "progress": PROGRESS, "data": "a.jsonl", "rows": 9, "contestants": ["emotion@1"]},
    ),
    "interpretation": (
        "/tasks/emotion/interpretation",
        "/interpretations",
        {"version": 1, "progress": PROGRESS, "data": "a.jsonl", "rows": 9, "digest": "0"},
    ),
}


def stream(*events: dict[str, Any]) -> dict[str, Any]:
    """A whole reply of a route that streams."""
    return {"content_type": "text/event-stream", "body": "".join(f"data: {json.dumps(one)}\n\n" for one in events)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_word_on_a_job_is_shown_and_it_is_watched_again(page: Watched, kind: str) -> None:
    place, path, fields = KINDS[kind]
    job = {**BASE, **fields}
    replies = [stream({"event": "state", "state": "running"}), stream(LAST)]
    asked: list[Route] = []

    def events(route: Route) -> None:
        asked.append(route)
        route.fulfill(**replies[len(asked) % len(replies)])

    page.page.route("**/prompts/emotion/interpretation*", lambda route: route.fulfill(json=STATIC))
    page.page.route(f"**{path}", lambda route: route.fulfill(json={"interpretations": [job]}))
    page.page.route(f"**{path}/{JOB}", lambda route: route.fulfill(json=job))
    page.page.route(f"**{path}/{JOB}/events", events)
    shown = page.open(place)
    alert = shown.get_by_role("alert")
    expect(alert).to_contain_text("The job was deleted: <img src=x")
    expect(alert).to_contain_text("Ask.")
    alert.get_by_role("button", name="Try again").click()
    expect(alert).to_contain_text("The connection ended before the job did.")
    alert.get_by_role("button", name="Try again").click()
    expect(alert).to_contain_text("The job was deleted")
    assert len(asked) == 3, "nothing is watched again by itself"
    assert shown.locator("main img").count() == 0


def test_the_last_word_on_all_columns_is_shown_beside_what_arrived(page: Watched) -> None:
    refusal = {"error": "The key has expired.", "error_type": "auth", "code": "unauthorized", "remedy": "Use another."}
    page.page.route("**/generate_many", lambda route: route.fulfill(**stream(TOKEN, refusal)))
    shown = page.open("/compare?with=e2e_nlg&with=&labels=0&text=hello")
    shown.keyboard.press("Control+Enter")
    expect(shown.get_by_role("alert").filter(has_text="The key has expired.")).to_contain_text("Use another.")
    expect(shown.get_by_role("button", name="Try again")).to_have_count(1)
    expect(shown.get_by_role("button", name="Enter a key")).to_be_visible()
    expect(shown.locator(".token")).to_have_text(["Hello"])
    expect(shown.locator("[aria-busy=true]")).to_have_count(0)


def test_the_last_word_on_one_column_offers_to_try_again(page: Watched) -> None:
    failure = {"target": 1, "event": "error", "status": 503, **LAST}
    page.page.route("**/generate_many", lambda route: route.fulfill(**stream(TOKEN, failure)))
    shown = page.open("/compare?with=e2e_nlg&with=&labels=0&text=hello")
    shown.keyboard.press("Control+Enter")
    first, second = shown.locator("section.column").all()
    expect(second.get_by_role("alert")).to_contain_text("The job was deleted")
    expect(second.get_by_role("button", name="Try again")).to_be_visible()
    expect(first.get_by_role("alert")).to_contain_text("The connection ended before the answer did.")
    expect(first.locator(".token")).to_have_text(["Hello"])


def test_a_reply_that_is_cut_off_is_reported_and_nothing_is_sent_twice(page: Watched) -> None:
    sent: list[str] = []

    def cut(route: Route) -> None:
        sent.append(route.request.method)
        route.fulfill(status=202, content_type="application/json", body='{"id": "2026')

    page.page.route(
        "**/training/jobs", lambda route: cut(route) if route.request.method == "POST" else route.continue_()
    )
    shown = page.open("/train")
    rows = b'{"input": "a", "target": "b"}\n{"input": "c", "target": "d"}'
    shown.locator("input[type=file]").first.set_input_files([{"name": "a.jsonl", "mimeType": "", "buffer": rows}])
    shown.get_by_label("Name", exact=True).fill("ui-cut")
    shown.get_by_role("button", name="Train", exact=True).click()
    expect(shown.get_by_role("alert")).to_contain_text("The connection ended before the reply did.")
    expect(shown.get_by_role("alert")).to_contain_text("Look whether the request was done")
    assert sent == ["POST"]
