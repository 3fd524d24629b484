"""Experiments over HTTP: the result of the shell, by a job like an evaluation."""

from __future__ import annotations

import pytest

from server.api.body_sizes import MAX_ORDER_BYTES, json_limit
from server.api.interpretations import work
from server.interpret.results import CausalInterpretation
from tests.api.evaluations.support import MANIFEST, PAIRS, jsonl
from tests.api.live import LiveServer, assert_error, wait_until

START = {"training": {"start": {"initial_token_ids": [5, 6, 7, 8, 9]}}}
FILES = {"data": ("test.jsonl", jsonl(*PAIRS))}


@pytest.fixture(scope="module")
def mood(server: LiveServer) -> str:
    server.publish_random("meaning-mood", 1, {**MANIFEST, **START})
    return "meaning-mood"


@pytest.mark.parametrize("path", ["/interpretations", "/prompts/meaning-mood/interpretation"])
def test_experiments_end_with_a_verdict_on_rows(server: LiveServer, mood: str, path: str) -> None:
    fields = {"limit": "4"} | ({"task": mood} if path == "/interpretations" else {})
    reply = server.client.post(path, data=fields, files=FILES)
    assert reply.status_code == 202, reply.text
    job = f"/interpretations/{reply.json()['id']}"
    assert reply.headers["location"] == job
    wait_until(lambda: "ended_at" in server.client.get(job).json(), 30)
    ended = server.client.get(job).json()
    assert (ended["state"], ended["rows"], ended["version"]) == ("done", 4, 1), ended
    assert ended["progress"]["done"] == ended["progress"]["total"] > 4
    found = CausalInterpretation.model_validate(ended["result"])
    assert found.necessity is not None
    assert (len(found.necessity.tokens), found.necessity.replaced_by) == (5, "its start")
    assert found.sufficiency is not None
    assert found.verdict
    assert "result" not in server.client.get("/interpretations").json()["interpretations"][0]
    assert server.client.delete(job).status_code == 204
    assert_error(server.client.get(job), 404, "unknown_interpretation")
    assert server.is_idle


def test_one_measure_alone_is_run_on_request_and_a_job_can_be_cancelled(server: LiveServer, mood: str) -> None:
    server.model.delay = 0.05
    try:
        reply = server.client.post("/interpretations", data={"task": mood, "measures": "necessity"}, files=FILES)
        job = f"/interpretations/{reply.json()['id']}"
        assert reply.json()["measures"] == ["necessity"]
        assert server.client.post(f"{job}/cancel").json()["state"] == "cancelled"
    finally:
        server.model.delay = 0.0
    wait_until(lambda: server.is_idle)


def test_what_cannot_be_run_is_refused_before_it_is_a_job(
    server: LiveServer, mood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/prompts/{mood}/interpretation"
    assert_error(server.client.post(path, json={}), 422, "invalid_request", "no `data`")
    assert_error(server.client.post(path, data={"task": "other"}, files=FILES), 422, "invalid_request", "path names")
    assert_error(server.client.post(path, data={"measures": "magic"}, files=FILES), 422, "invalid_request", "measures")
    assert_error(server.client.post("/prompts/nobody/interpretation", files=FILES), 404, "unknown_task")
    bad = {"data": ("test.jsonl", b"{}\n")}
    assert_error(server.client.post(path, files=bad), 422, "invalid_training_data", "test.jsonl, line 1")
    monkeypatch.setattr(work, "MOST_VARIANT_BYTES", 1000)
    assert_error(server.client.post(path, files=FILES), 422, "invalid_request", "variants")


def test_its_bodies_have_the_limit_of_jobs_under_either_path() -> None:
    for path in ("/interpretations", "/prompts/x/interpretation", "/prompts/x/interpretation/"):
        assert json_limit(f"POST {path}", ["/interpretations"]) == MAX_ORDER_BYTES
