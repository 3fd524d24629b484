"""Tokens, texts and keys that are hostile, and two people who change one task at the same time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, expect

from server.keys.file import add_key, revoke_key
from server.keys.key import Scope
from tests.api.live import LiveServer, SteeredModel, live_server
from tests.support import random_soft_prompt
from tests.web.test_hostile import OVERFLOW
from tests.web.test_streams import STATIC, stream
from tests.web.test_tasks import HOSTILE, publish
from tests.web.watched import Watched, watching

LONG = "w" * 10_000
WORDS = [HOSTILE, "\u202eright to left", "\u200b\u200d\ufeff", "\x00", LONG, "<script>alert(2)</script>", " ", "\n"]
PHONE = {"width": 390, "height": 844}


def token(text: str, number: int) -> dict[str, Any]:
    """A token of an answer."""
    return {"id": number, "text": text, "logprob": -0.5, "special": False}


def test_influence_on_hostile_tokens_is_a_picture_that_fits_a_phone(page: Watched) -> None:
    tokens = [token(text, number) for number, text in enumerate(WORDS)]
    events = [{"target": 0, "event": "token", "token": one, "top_tokens": tokens} for one in tokens]
    events[-1] |= {"generated_text": "".join(WORDS), "details": {"finish_reason": "length"}}
    influence = {"tokens": WORDS, "logprobs": [-0.5] * len(WORDS), "influence": [[0.1] * len(WORDS)] * 3}
    page.page.route("**/generate_many", lambda route: route.fulfill(**stream(*events)))
    page.page.route("**/generate?*", lambda route: route.fulfill(json={"details": {"influence": influence}}))
    page.page.set_viewport_size(PHONE)
    shown = page.open("/compare?with=e2e_nlg&labels=0&text=hello")
    shown.keyboard.press("Control+Enter")
    expect(shown.locator(".token")).to_have_count(len(WORDS))
    shown.locator(".token").nth(3).focus()
    expect(shown.locator(".alternatives li")).to_have_count(len(WORDS))
    expect(shown.locator(".alternatives")).to_contain_text("U+0000")
    assert shown.evaluate(OVERFLOW) <= 0
    shown.keyboard.press("Escape")
    shown.get_by_role("button", name="What drove this answer").click()
    dialog = shown.get_by_role("dialog")
    dialog.locator("[data-row='0'][data-column='1']").focus()
    expect(dialog.locator(".said")).to_contain_text("U+202Eright·to·left")
    dialog.locator("[data-row='0'][data-column='4']").focus()
    dialog.get_by_text("Table of the output tokens").click()
    for text in ("U+200BU+200DU+FEFF", "U+0000", "↵", "<script>alert(2)</script>"):
        expect(dialog.get_by_role("rowheader", name=text, exact=True)).to_be_visible()
    assert shown.evaluate(OVERFLOW) <= 0
    assert dialog.evaluate("box => box.scrollWidth - box.clientWidth") <= 0
    assert shown.locator("main img, main script, dialog img, dialog script").count() == 0


def test_the_interpretation_of_hostile_words_fits_a_phone(page: Watched) -> None:
    near = [{"token_id": at, "text": text, "cosine": 0.5} for at, text in enumerate(WORDS)]
    words = [
        {"learned": near[at : at + 3], "start": near[at:], "change": near[at:], "coherence": 0.1}
        for at in range(len(WORDS))
    ]
    spread = dict.fromkeys(("mean", "sd", "low", "high", "top"), 0.2)
    chance = dict.fromkeys(("random_cosine", "random_coherence", "row_cosine", "row_coherence"), spread)
    body = {**STATIC, "verdict": f"It is near {HOSTILE}.", "notes": WORDS, "start": LONG, "start_is_known": True}
    body |= {"num_virtual_tokens": len(WORDS), "nearest": {"tokens": words, "neighbours": 3, **chance}}
    page.page.route("**/prompts/emotion/interpretation*", lambda route: route.fulfill(json=body))
    page.page.set_viewport_size(PHONE)
    shown = page.open("/tasks/emotion/interpretation")
    expect(shown.locator(".verdict")).to_contain_text("<img src=x onerror=alert(1)>")
    expect(shown.get_by_role("region", name="Virtual tokens")).to_contain_text("U+202Eright·to·left")
    assert shown.evaluate(OVERFLOW) <= 0
    assert shown.locator("main img, main script").count() == 0


def test_a_description_and_an_address_as_long_as_they_may_be_fit_each_view(page: Watched, site: LiveServer) -> None:
    manifest = {"description": LONG[:990], "labels": [LONG[:200], "b"]}
    site.publish("ui-long", random_soft_prompt(site.model.spec, manifest=manifest))
    page.page.set_viewport_size(PHONE)
    for place in ("/tasks", "/tasks/ui-long", "/compare?with=ui-long&text=hello"):
        shown = page.open(place)
        expect(shown.get_by_text("wwwwwwww").first).to_be_visible()
        assert shown.evaluate(OVERFLOW) <= 0, place
    page.refusals.update({400, 404, 414, 422})
    page.open(f"/tasks/{LONG}")
    expect(shown.get_by_role("alert")).to_be_visible()
    assert shown.evaluate(OVERFLOW) <= 0


def test_a_key_that_is_revoked_during_an_answer_is_named_beside_what_arrived(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    made, key = add_key(path, "user", [Scope.ADMIN], None)
    add_key(path, "another", [Scope.ADMIN], None)
    model = SteeredModel()
    with live_server(tmp_path, api_keys_file=path, model=model) as live, watching(browser, live.url) as page:
        page.refusals.add(401)
        shown = page.open("/compare?with=&max=150&text=hello")
        shown.get_by_role("button", name="Enter a key").click()
        shown.get_by_label("Key, as").fill(key)
        shown.get_by_role("button", name="Use this key").click()
        shown.locator("section.column").first.wait_for()
        model.delay = 0.1
        shown.keyboard.press("Control+Enter")
        shown.locator(".token").nth(2).wait_for()
        revoke_key(path, made.id)
        expect(shown.get_by_role("button", name="Enter another key")).to_be_visible()
        expect(shown.get_by_role("button", name="Try again")).to_be_visible()
        expect(shown.locator("[aria-busy=true]")).to_have_count(0)
        assert shown.locator(".token").count() >= 3


def test_a_rollback_in_another_tab_is_reported_and_not_undone(page: Watched, site: LiveServer) -> None:
    publish(site, "ui-tabs", "the first", "the second")
    page.refusals.update({409, 412})
    shown = page.open("/tasks/ui-tabs")
    expect(shown.get_by_role("button", name="Activate")).to_be_visible()
    other = shown.context.new_page()
    other.goto(f"{page.url}/#/tasks/ui-tabs")
    other.get_by_role("button", name="Roll back").click()
    expect(other.locator("p[role=status]")).to_contain_text("v1 is live again")
    shown.get_by_role("button", name="Roll back").click()
    expect(shown.get_by_role("alert")).to_contain_text("Somebody else changed ui-tabs in the meantime")
    assert site.client.get("/prompts/ui-tabs").json()["version"] == 1
    other.close()


def test_a_refused_rollback_is_shown_as_the_server_wrote_it(page: Watched, site: LiveServer) -> None:
    publish(site, "ui-alone", "the only one")
    page.refusals.update({404, 409})
    shown = page.open("/tasks/ui-alone")
    shown.get_by_role("button", name="Roll back").click()
    alert = shown.get_by_role("alert")
    expect(alert).to_contain_text("ui-alone")
    expect(alert).to_contain_text("409")
    assert site.client.get("/prompts/ui-alone").json()["version"] == 1
