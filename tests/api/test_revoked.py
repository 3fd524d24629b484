"""A key that is revoked, or loses what a request needs, ends what runs for it, with an error that says so."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api import sse
from server.api.jobs import followers
from server.keys import live as live_keys
from server.keys.file import add_key, revoke_key
from server.keys.key import Scope
from tests.api.live import LiveServer, live_server, parse_events, wait_until
from tests.jobs.support import SECONDS

BODY: dict[str, Any] = {"inputs": "hello", "parameters": {"max_new_tokens": 150, "ignore_eos_token": True}}
CHAT = {"model": "mood", "prompt": "hello", "max_tokens": 150, "stream": True, "ignore_eos": True}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LiveServer, Path]]:
    """A slow server whose keys are followed closely, and the keys file."""
    monkeypatch.setattr(live_keys, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(sse, "KEY_SECONDS", 0.05)
    path = tmp_path / "keys.json"
    _, admin = add_key(path, "admin", [Scope.ADMIN], None)
    with live_server(tmp_path, api_keys_file=path) as live:
        live.client.headers["Authorization"] = f"Bearer {admin}"
        live.publish_random("mood", 1)
        live.model.delay = 0.1
        yield live, path
        live.model.delay = 0.0


def answer_after_revocation(
    site: tuple[LiveServer, Path], path: str, body: dict[str, Any], tasks: list[str] | None = None
) -> httpx.Response:
    """What a request is answered with whose key is revoked while it runs."""
    live, keys_file = site
    key, text = add_key(keys_file, "guest", [Scope.GENERATE], tasks)
    replies: list[httpx.Response] = []

    def ask() -> None:
        headers = {"Authorization": f"Bearer {text}"}
        replies.append(httpx.post(f"{live.url}{path}", json=body, headers=headers, timeout=60))

    thread = threading.Thread(target=ask)
    began = time.monotonic()
    thread.start()
    wait_until(lambda: live.worker.num_in_flight == 1, 10)
    revoke_key(keys_file, key.id)
    thread.join(60)
    assert time.monotonic() - began < 12, "150 tokens take 15 seconds"
    wait_until(lambda: live.worker.num_in_flight == 0)
    assert f"The key {key.id} was revoked." in replies[0].text
    return replies[0]


def test_a_stream_ends_with_an_error_event(site: tuple[LiveServer, Path]) -> None:
    reply = answer_after_revocation(site, "/generate_stream?task=mood", BODY)
    assert reply.status_code in (200, 401)
    last = parse_events(reply.content)[-1] if reply.status_code == 200 else reply.json()
    assert last["code"] == "unauthorized"


def test_a_stream_in_openais_words_ends_with_an_error_event(site: tuple[LiveServer, Path]) -> None:
    reply = answer_after_revocation(site, "/v1/completions", {k: v for k, v in CHAT.items() if k != "ignore_eos"})
    assert "invalid_api_key" in reply.text
    assert "[DONE]" not in reply.text


def test_an_answer_that_is_awaited_whole_is_refused(site: tuple[LiveServer, Path]) -> None:
    assert answer_after_revocation(site, "/generate?task=mood", BODY).status_code == 401


def test_a_follower_of_a_job_is_told(site: tuple[LiveServer, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # Its look would also see the end of the job, which needs the key too.
    monkeypatch.setattr(followers, "LOOK_SECONDS", 60.0)
    live, keys_file = site
    key, text = add_key(keys_file, "trainer", [Scope.PUBLISH], ["mood"])
    headers = {"Authorization": f"Bearer {text}"}
    rows = "".join(json.dumps({"input": f"text {n}", "target": "ab"[n % 2]}) + "\n" for n in range(20)).encode()
    config = {"steps": 100_000, "learning_rate": 0.01, "num_virtual_tokens": 4, "batch_size": 2}
    form = {"spec": json.dumps({"task": "mood", "config": config})}
    job = live.client.post("/training/jobs", data=form, files={"data": ("d.jsonl", rows)}, headers=headers)
    assert job.status_code == 202, job.text
    job_id = job.json()["id"]
    began = time.monotonic()
    with live.client.stream("GET", f"/training/jobs/{job_id}/events", headers=headers, timeout=60) as stream:
        received = b""
        for piece in stream.iter_bytes():
            if not received:
                revoke_key(keys_file, key.id)
            received += piece
    assert time.monotonic() - began < 30
    assert parse_events(received)[-1]["code"] == "unauthorized", "it ends with the key, not with the job's own end"
    wait_until(lambda: live.client.get(f"/training/jobs/{job_id}").json()["state"] == "failed", SECONDS)


def test_a_key_that_loses_the_task_loses_the_stream(site: tuple[LiveServer, Path]) -> None:
    live, keys_file = site
    key, text = add_key(keys_file, "guest", [Scope.GENERATE], ["mood"])
    headers = {"Authorization": f"Bearer {text}"}
    with live.client.stream("POST", "/generate_stream?task=mood", json=BODY, headers=headers, timeout=60) as stream:
        received = b""
        for piece in stream.iter_bytes():
            if not received:
                content = keys_file.read_text()
                keys_file.write_text(content.replace('"mood"', '"other"'))
            received += piece
    assert f"The key {key.id} is no longer for the task 'mood'." in parse_events(received)[-1]["error"]
