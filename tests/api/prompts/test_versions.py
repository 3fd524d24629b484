"""Versions over HTTP: staged, activated, rolled back, shared by weight, downloaded, deleted; never a lost update."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.engine.model.frozen import FrozenModel
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.api.live import LiveServer, as_form, assert_error, engine_answer, live_server, wait_until
from tests.support import random_soft_prompt


def stage(server: LiveServer, task: str, seed: int, **manifest: Any) -> SoftPrompt:
    """Upload a version that nobody gets who does not ask for it."""
    soft_prompt = random_soft_prompt(server.model.spec, seed=seed, manifest=manifest)
    form = as_form(server.files(soft_prompt))
    reply = server.client.put(f"/prompts/{task}", params={"activate": "false"}, files=form)
    assert reply.status_code == 201, reply.text
    assert reply.json()["live"] is False
    return soft_prompt


def change(server: LiveServer, task: str, what: str, body: Any = None, **headers: str) -> httpx.Response:
    """POST or PUT one of a task's sub-resources."""
    method = "PUT" if what == "traffic" else "POST"
    return server.client.request(method, f"/prompts/{task}/{what}", json=body, headers=headers)


def versions(server: LiveServer, task: str) -> dict[str, Any]:
    """GET /prompts/{task}/versions."""
    reply = server.client.get(f"/prompts/{task}/versions")
    assert reply.status_code == 200, reply.text
    listed: dict[str, Any] = reply.json()
    return listed


def entry_of(server: LiveServer, task: str) -> dict[str, Any]:
    """The task in GET /prompts."""
    page = server.client.get("/prompts", params={"limit": 1000}).json()
    entry: dict[str, Any] = next(entry for entry in page["prompts"] if entry["task"] == task)
    return entry


def serving_version(server: LiveServer, reference: str, **body: Any) -> int:
    """The version that a request is answered by."""
    sent = {"inputs": "hello", "parameters": {"max_new_tokens": 1}, **body}
    reply = server.client.post("/generate", params={"task": reference}, json=sent)
    assert reply.status_code == 200, reply.text
    return int(reply.headers["prelude-version"])


def test_versions_come_in_pages(server: LiveServer) -> None:
    for seed in range(5):
        stage(server, "versions-pages", seed)
    pages, before = [], None
    while before != "end":
        query = {"limit": 2} if before is None else {"limit": 2, "before": before}
        page = server.client.get("/prompts/versions-pages/versions", params=query).json()
        pages.append([entry["version"] for entry in page["versions"]])
        before = page.get("next", "end")
    assert pages == [[5, 4], [3, 2], [1]]
    for wrong in ({"limit": 0}, {"limit": 101}, {"before": 0}):
        reply = server.client.get("/prompts/versions-pages/versions", params=wrong)
        assert_error(reply, 422, "invalid_request")


def test_the_versions_of_a_task_are_told_newest_first(server: LiveServer) -> None:
    first = server.publish_random("versions-list", 1, {"description": "one", "metrics": {"exact_match": 0.5}})
    second = server.publish_random("versions-list", 2)
    listed = versions(server, "versions-list")
    assert listed["live"] == 2
    assert [entry["version"] for entry in listed["versions"]] == [2, 1]
    newest, oldest = listed["versions"]
    assert newest["created_at"] >= oldest.pop("created_at")
    assert oldest == {
        "version": 1,
        "live": False,
        "digest": first.digest,
        "prefix_hash": first.prefix_hash,
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": 5,
        "bytes": first.num_bytes,
        "source": "api",
        "description": "one",
        "metrics": {"exact_match": 0.5},
    }
    assert (newest["live"], newest["digest"]) == (True, second.digest)


def test_a_staged_version_is_served_only_to_who_asks_for_it(server: LiveServer, tiny: FrozenModel) -> None:
    server.publish_random("versions-stage", 1)
    staged = stage(server, "versions-stage", 2)
    assert serving_version(server, "versions-stage") == 1
    assert serving_version(server, "versions-stage@2") == 2
    text = server.text("hello", "versions-stage@2", max_new_tokens=12)
    assert text == engine_answer(tiny, staged, "hello", max_new_tokens=12).text
    assert change(server, "versions-stage", "activate", {"version": 2}).json()["live"] == 2
    assert serving_version(server, "versions-stage") == 2


def test_a_task_that_is_only_staged_is_listed_and_not_served(server: LiveServer) -> None:
    stage(server, "versions-unborn", 1)
    assert_error(server.generate("hello", "versions-unborn"), 404, "unknown_task", "No version")
    assert serving_version(server, "versions-unborn@1") == 1
    listed = {entry["task"]: entry for entry in server.client.get("/prompts", params={"limit": 1000}).json()["prompts"]}
    assert listed["versions-unborn"] == {"task": "versions-unborn"}
    assert "live" not in versions(server, "versions-unborn")
    assert server.client.get("/prompts/versions-unborn").json()["versions"] == [1]


def test_a_dry_run_validates_and_changes_nothing(own_server: LiveServer) -> None:
    files = own_server.files(random_soft_prompt(own_server.model.spec, seed=1))
    reply = own_server.client.put("/prompts/dry", params={"dry_run": "true"}, files=as_form(files))
    assert (reply.status_code, reply.json()["version"], reply.json()["live"]) == (200, 1, False)
    published = own_server.client.put("/prompts/other", files=as_form(files)).json()
    version = own_server.client.get("/prompts/other/versions").json()["versions"][0]
    assert reply.json()["prefix_hash"] == version["prefix_hash"]
    assert reply.json()["manifest"] == own_server.client.get("/prompts/other").json()["manifest"]
    assert not {"manifest", "prefix_hash"} & set(published)
    assert own_server.client.delete("/prompts/other").status_code == 204
    assert_error(own_server.client.get("/prompts/dry"), 404, "unknown_task")
    del files["adapter_config.json"]
    reply = own_server.client.put("/prompts/dry", params={"dry_run": "true"}, files=as_form(files))
    assert_error(reply, 422, "invalid_soft_prompt", "adapter_config.json")
    wait_until(lambda: own_server.is_idle and len(own_server.engine.prefixes) == 0)


def test_rolling_back_twice_goes_back_twice(server: LiveServer) -> None:
    for seed in (1, 2, 3):
        server.publish_random("versions-back", seed)
    assert change(server, "versions-back", "rollback").json()["live"] == 2
    assert serving_version(server, "versions-back") == 2
    assert change(server, "versions-back", "rollback").json()["live"] == 1
    assert serving_version(server, "versions-back") == 1
    assert_error(change(server, "versions-back", "rollback"), 409, "nothing_to_roll_back_to")
    assert_error(change(server, "versions-nobody", "rollback"), 404, "unknown_task")


def test_a_version_that_is_not_there_cannot_be_activated(server: LiveServer) -> None:
    server.publish_random("versions-two", 1)
    assert_error(change(server, "versions-two", "activate", {"version": 2}), 404, "unknown_task", "no version 2")
    bodies: list[Any] = [{}, {"version": 0}, {"version": "x"}, {"version": 1, "versoin": 2}, []]
    bodies += [{"version": True}, {"version": 1.0}, {"version": "1"}]  # a slip must not decide what is live
    for body in bodies:
        assert_error(change(server, "versions-two", "activate", body), 422, "invalid_request")


def test_a_canary_shares_requests_by_weight_and_keeps_a_user_on_one_side(server: LiveServer) -> None:
    server.publish_random("versions-canary", 1)
    stage(server, "versions-canary", 2)
    reply = change(server, "versions-canary", "traffic", {"1": 70, "2": 30})
    assert reply.json()["traffic"] == {"1": 70, "2": 30}
    detail = server.client.get("/prompts/versions-canary").json()
    assert (detail["version"], detail["traffic"]) == (1, {"1": 70, "2": 30})
    assert entry_of(server, "versions-canary") == {
        name: value for name, value in detail.items() if name not in ("versions", "manifest")
    }
    sides = {user: serving_version(server, "versions-canary", user=user) for user in map(str, range(60))}
    assert 5 <= sum(side == 2 for side in sides.values()) <= 32
    assert {user: serving_version(server, "versions-canary", user=user) for user in sides} == sides
    assert {serving_version(server, "versions-canary") for _ in range(40)} == {1, 2}
    change(server, "versions-canary", "traffic", {"1": 40, "2": 60, "3": None})  # null counts as left out
    grown = {user: serving_version(server, "versions-canary", user=user) for user in sides}
    assert all(grown[user] == 2 for user, side in sides.items() if side == 2), "a growing share keeps its users"
    assert change(server, "versions-canary", "activate", {"version": 2}).json()["live"] == 2
    assert "traffic" not in versions(server, "versions-canary")
    assert "traffic" not in entry_of(server, "versions-canary")
    assert change(server, "versions-canary", "rollback").json()["traffic"] == {"1": 40, "2": 60}


@pytest.mark.parametrize(
    ("weights", "status"),
    [
        ({"1": 50, "2": 40}, 422),
        ({"1": 110, "2": -10}, 422),
        ({}, 422),
        ({"1": "90", "2": 10}, 422),
        ({"0": 100}, 422),
        ({"x": 100}, 422),
        ([1], 422),
        ({"1": 50, "999": 50}, 404),
    ],
)
def test_weights_that_are_not_shares_of_what_there_is_are_refused(
    server: LiveServer, weights: Any, status: int
) -> None:
    for seed in (1, 2):
        server.publish_random("versions-shares", seed)
    before = versions(server, "versions-shares")
    reply = change(server, "versions-shares", "traffic", weights)
    assert_error(reply, status, "unknown_task" if status == 404 else "invalid_request")
    assert versions(server, "versions-shares") == before


def test_a_version_can_be_deleted_unless_it_is_live(server: LiveServer) -> None:
    for seed in (1, 2, 3):
        server.publish_random("versions-less", seed)
    url = "/prompts/versions-less/versions"
    assert_error(server.client.delete(f"{url}/3"), 409, "version_in_use")
    assert server.client.delete(f"{url}/2").status_code == 204
    assert_error(server.client.delete(f"{url}/2"), 404, "unknown_task")
    assert_error(server.generate("hello", "versions-less@2"), 404, "unknown_task", "no version 2")
    assert change(server, "versions-less", "rollback").json()["live"] == 1, "what is gone is passed over"
    assert server.publish("versions-less", random_soft_prompt(server.model.spec, seed=2))["version"] == 4


def test_a_deleted_task_leaves_no_blob_no_host_copy_and_no_prefix(own_server: LiveServer) -> None:
    soft_prompt = own_server.publish_random("gone", 1)
    own_server.publish_random("stays", 2)
    own_server.model.delay = 0.1
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 60, "ignore_eos_token": True}}
    with own_server.client.stream("POST", "/generate_stream", params={"task": "gone"}, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert own_server.client.delete("/prompts/gone").status_code == 204
        assert soft_prompt.digest not in own_server.registry.host
        assert soft_prompt.prefix_hash in own_server.engine.prefixes, "a sequence still uses it"
        own_server.model.delay = 0.0
        assert [line for line in lines if "generated_text" in line][-1].count("error") == 0
    wait_until(lambda: own_server.is_idle)
    assert len(own_server.engine.prefixes) == 1
    assert soft_prompt.prefix_hash not in own_server.engine.prefixes
    blobs = [path.name for path in (own_server.settings.prompts_dir / ".store" / "blobs").iterdir()]
    assert len(blobs) == 1
    assert not blobs[0].startswith(soft_prompt.digest)


def test_the_first_request_of_a_new_version_finds_its_prefix(own_server: LiveServer) -> None:
    published = own_server.publish_random("warm", 1)
    assert published.prefix_hash in own_server.engine.prefixes
    computed = own_server.engine.prefixes.computed
    own_server.text("hello", "warm", max_new_tokens=2)
    assert own_server.engine.prefixes.computed == computed


def test_a_soft_prompt_whose_prefix_fails_never_goes_live(tmp_path: Path, tiny32: FrozenModel) -> None:
    # Finite by itself, but its keys lead every attention score out of float32's range.
    bad = SoftPrompt("PREFIX_TUNING", torch.full((5, tiny32.spec.kv_width), 3e38))
    with live_server(tmp_path, model=tiny32) as server:
        good = server.publish_random("fragile", 1)
        for query in ({}, {"activate": "false"}, {"dry_run": "true"}):
            reply = server.client.put("/prompts/fragile", params=query, files=as_form(server.files(bad)))
            assert_error(reply, 422, "invalid_soft_prompt", "not finite")
        [only] = versions(server, "fragile")["versions"]
        assert (only["version"], only["digest"], only["live"]) == (1, good.digest, True)
        assert server.generate("hello", "fragile", max_new_tokens=3).status_code == 200
        wait_until(lambda: set(server.engine.prefixes) == {good.prefix_hash})


def test_a_publish_during_which_the_engine_fails_changes_nothing(own_server: LiveServer) -> None:
    own_server.publish_random("steady", 1)
    own_server.model.fail_after = 0
    reply = own_server.put("steady", own_server.files(random_soft_prompt(own_server.model.spec, seed=2)))
    assert_error(reply, 500, "generation_failed")
    assert versions(own_server, "steady")["live"] == 1
    assert len(versions(own_server, "steady")["versions"]) == 1
    assert own_server.publish("steady", random_soft_prompt(own_server.model.spec, seed=2))["version"] == 2


# If-Match: no lost update


def test_every_change_tells_an_etag_and_takes_it(server: LiveServer) -> None:
    client = server.client
    server.publish_random("versions-etag", 1)
    server.publish_random("versions-etag", 2)
    seen = client.get("/prompts/versions-etag").headers["etag"]
    assert seen == client.get("/prompts/versions-etag/versions").headers["etag"]
    reply = change(server, "versions-etag", "rollback", **{"If-Match": seen})
    assert reply.status_code == 200
    assert reply.headers["etag"] != seen
    assert_error(change(server, "versions-etag", "rollback", **{"If-Match": seen}), 412, "precondition_failed", seen)
    now = reply.headers["etag"]
    changes: list[Callable[[str], httpx.Response]] = [
        lambda tag: change(server, "versions-etag", "activate", {"version": 2}, **{"If-Match": tag}),
        lambda tag: change(server, "versions-etag", "traffic", {"1": 50, "2": 50}, **{"If-Match": tag}),
        lambda tag: client.put(
            "/prompts/versions-etag",
            files=as_form(server.files(random_soft_prompt(server.model.spec, seed=3))),
            headers={"If-Match": tag},
        ),
        lambda tag: client.delete("/prompts/versions-etag/versions/1", headers={"If-Match": tag}),
        lambda tag: client.delete("/prompts/versions-etag", headers={"If-Match": tag}),
    ]
    for make in changes:
        assert_error(make(seen), 412, "precondition_failed")
        reply = make(now)
        assert reply.status_code < 300, reply.text
        now = reply.headers.get("etag") or client.get("/prompts/versions-etag").headers.get("etag", "")
    assert_error(client.get("/prompts/versions-etag"), 404, "unknown_task")


def test_a_change_can_ask_that_the_task_exists_or_does_not(server: LiveServer) -> None:
    def put(seed: int, **headers: str) -> httpx.Response:
        form = as_form(server.files(random_soft_prompt(server.model.spec, seed=seed)))
        return server.client.put("/prompts/versions-only", files=form, headers=headers)

    assert_error(put(1, **{"If-Match": "*"}), 412, "precondition_failed", "does not exist")
    assert_error(put(1, **{"If-Match": '"3"'}), 412, "precondition_failed", "does not exist")
    assert put(1, **{"If-None-Match": "*"}).status_code == 201
    assert_error(put(2, **{"If-None-Match": "*"}), 412, "precondition_failed")
    assert put(2, **{"If-Match": "*"}).status_code == 201
    for headers in ({"If-Match": "W/x"}, {"If-None-Match": '"1"'}, {"If-Match": "*", "If-None-Match": "*"}):
        assert_error(put(3, **headers), 422, "invalid_request")


@pytest.mark.parametrize("name", ["If-Match", "If-None-Match"])
def test_of_two_conditions_none_is_left_out(server: LiveServer, name: str) -> None:
    server.publish_random("versions-twice", 1)
    reply = server.client.delete("/prompts/versions-twice", headers=[(name, "*"), (name, '"0"')])
    assert_error(reply, 422, "invalid_request", f"{name} comes twice")


def test_of_racing_changes_with_one_etag_exactly_one_is_taken(own_server: LiveServer) -> None:
    for seed in range(6):
        own_server.publish_random("raced", seed)
    tag = own_server.client.get("/prompts/raced").headers["etag"]

    def activate(version: int) -> int:
        return change(own_server, "raced", "activate", {"version": version}, **{"If-Match": tag}).status_code

    with ThreadPoolExecutor(5) as pool:
        codes = sorted(pool.map(activate, range(1, 6)))
    assert codes == [200, 412, 412, 412, 412]


# Download


# Cold tasks
