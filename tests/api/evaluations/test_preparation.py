from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.jobs import in_process
from tests.api.evaluations.support import MANIFEST, PAIRS, finished, jsonl, start
from tests.api.live import LiveServer, live_server, wait_until

MANY = [f"label {number:04d}" for number in range(300)]


def test_a_row_of_very_many_labels_makes_no_live_request_be_refused(tmp_path: Path) -> None:
    with live_server(tmp_path, max_sequences=4, max_queue=4) as live:
        live.publish_random("many", 1, {**MANIFEST, "labels": MANY})
        reply = start(live, jsonl(*[(f"text {number}", f"label {number:04d}") for number in range(2)]), task="many")
        wait_until(lambda: live.worker.num_in_flight > 0, 20)
        assert [live.generate("hello", max_new_tokens=1).status_code for _ in range(8)] == [200] * 8
        ended = finished(live, reply)
        assert ended["state"] == "done", ended
        chosen = ended["result"]["contestants"]["many@1"]["accuracy_choices"]["value"]
        picked = [live.generate(f"text {n}", "many", choices=MANY[:100]) for n in range(2)]
        assert 0 <= chosen <= 1
        assert {reply.status_code for reply in picked} == {200}


class Slow:
    """Tokenising that takes its time, as it does for much more data."""

    def __init__(self, live: LiveServer, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.calls, self.seconds = 0, seconds
        encode = live.worker.text.encode

        def slowly(*given: Any, **options: Any) -> Any:
            self.calls += 1
            time.sleep(self.seconds)
            return encode(*given, **options)

        monkeypatch.setattr(live.worker.text, "encode", slowly)


def test_a_large_evaluation_is_answered_before_it_is_prepared_and_can_be_cancelled(
    own_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = own_server
    live.publish_random("mood", 1, MANIFEST)
    slow = Slow(live, monkeypatch, 0.05)
    monkeypatch.setattr(in_process, "REPLY_SECONDS", 0.2)
    began = time.monotonic()
    first, second = (start(live, jsonl(*PAIRS * 200), task="mood") for _ in range(2))
    assert time.monotonic() - began < 20, "1,200 rows take a minute to prepare"
    assert (first.status_code, first.json()["state"], first.json()["rows"]) == (202, "preparing", 0)
    assert second.json()["state"] == "waiting", "one is prepared at a time"
    assert first.json()["contestants"] == ["mood@1"]
    for reply in (first, second):
        assert live.client.delete(reply.headers["location"]).status_code == 204
        assert live.client.get(reply.headers["location"]).json()["state"] == "cancelled"
    calls = slow.calls
    time.sleep(0.3)
    assert slow.calls == calls, "nobody works on it any more"


def test_evaluations_in_preparation_count_among_those_that_may_wait(
    own_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = own_server
    live.publish_random("mood", 1, MANIFEST)
    Slow(live, monkeypatch, 0.05)
    monkeypatch.setattr(in_process, "REPLY_SECONDS", 0.05)
    monkeypatch.setattr(in_process, "MOST_WAITING", 2)
    replies = [start(live, jsonl(*PAIRS * 50), task="mood") for _ in range(5)]
    assert [reply.status_code for reply in replies] == [202, 202, 202, 429, 429]


def test_what_a_client_that_has_left_asked_for_is_cancelled(
    own_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = own_server
    live.publish_random("mood", 1, MANIFEST)
    slow = Slow(live, monkeypatch, 0.05)
    monkeypatch.setattr(in_process, "REPLY_SECONDS", 60.0)
    files = {"data": ("test.jsonl", jsonl(*PAIRS * 200))}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live.url}/evaluations", data={"task": "mood"}, files=files, timeout=1.0)

    def states() -> list[str]:
        return [job["state"] for job in live.client.get("/evaluations").json()["evaluations"]]

    wait_until(lambda: states() == ["cancelled"], 20)
    calls = slow.calls
    time.sleep(0.3)
    assert slow.calls == calls


def test_a_server_that_drains_ends_a_preparation_at_once(
    own_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = own_server
    live.publish_random("mood", 1, MANIFEST)
    Slow(live, monkeypatch, 0.05)
    monkeypatch.setattr(in_process, "REPLY_SECONDS", 0.05)
    reply = start(live, jsonl(*PAIRS * 200), task="mood")
    asyncio.run_coroutine_threadsafe(live.worker.drain(30), live.loop).result(30)
    ended = finished(live, reply)
    assert (ended["state"], ended["error"]["code"]) == ("aborted", "server_draining")


@pytest.mark.parametrize("phase", ["waiting", "preparing", "running"])
def test_an_evaluation_that_is_cancelled_while_the_server_drains_ends_once(
    own_server: LiveServer, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    live = own_server
    live.publish_random("mood", 1, MANIFEST)
    ends: list[str] = []
    end = in_process.InServerJob.end

    def counted(job: in_process.InServerJob[Any], *given: Any) -> None:
        ends.append(job.id)
        end(job, *given)

    monkeypatch.setattr(in_process.InServerJob, "end", counted)
    monkeypatch.setattr(in_process, "REPLY_SECONDS", 0.2)
    if phase == "preparing":
        Slow(live, monkeypatch, 0.05)
    live.model.delay = 0.005
    replies = [start(live, jsonl(*PAIRS * 30), task="mood") for _ in range(2 if phase == "waiting" else 1)]
    path = replies[-1].headers["location"]
    wait_until(lambda: live.client.get(path).json()["state"] == phase)
    draining = asyncio.run_coroutine_threadsafe(live.worker.drain(30), live.loop)
    assert live.client.delete(path).status_code == 204
    draining.result(30)
    assert live.client.get(path).status_code == 404 or finished(live, replies[-1])["state"] in ("cancelled", "aborted")
    assert ends.count(path.rpartition("/")[2]) == 1
    assert live.worker.num_in_flight == 0


def test_what_is_refused_later_is_the_evaluations_error(
    own_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = own_server
    live.publish_random("mood", 1, MANIFEST)
    monkeypatch.setattr(in_process, "REPLY_SECONDS", 0.0)
    Slow(live, monkeypatch, 0.05)
    ended = finished(live, start(live, jsonl(*PAIRS * 5, ("x" * 191, "no")), task="mood"))
    assert (ended["state"], ended["error"]["code"]) == ("failed", "invalid_training_data")
    assert "line 31" in ended["error"]["error"]
