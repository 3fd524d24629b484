"""Evaluations over HTTP: what they come to, what they refuse, and that they are in nobody's way."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.api import body_sizes
from server.api.jobs import in_process
from server.keys import live as live_keys
from server.keys.file import add_key, revoke_key
from server.keys.key import Scope
from tests.api.evaluations.support import LABELS, MANIFEST, PAIRS, finished, jsonl, start
from tests.api.live import LiveServer, assert_error, live_server, wait_until
from tests.evaluation.support import CHAT
from tests.support import tiny_model


def test_an_upload_is_evaluated_to_the_figures_that_requests_would_give(server: LiveServer, mood: str) -> None:
    ended = finished(server, start(server, task=mood))
    assert (ended["state"], ended["version"], ended["rows"], ended["data"]) == ("done", 2, 6, "test.jsonl")
    assert ended["progress"] == {"done": 6, "total": 6}
    figures = ended["result"]["contestants"][f"{mood}@2"]
    chosen = [server.generate(text, mood, choices=LABELS).json()["generated_text"] for text, _ in PAIRS]
    right = sum(choice == target for choice, (_, target) in zip(chosen, PAIRS, strict=True))
    assert figures["accuracy_choices"]["value"] == round(right / len(PAIRS), 4)
    written = [server.text(text, mood) for text, _ in PAIRS]
    same = sum(text.strip() == target for text, (_, target) in zip(written, PAIRS, strict=True))
    assert figures["accuracy_generated"]["value"] == round(same / len(PAIRS), 4)
    assert server.is_idle


def test_versions_and_baselines_answer_the_same_rows(server: LiveServer, mood: str) -> None:
    shots = jsonl(("nice", "yes"), ("nasty", "no"))
    reply = start(server, task=mood, baselines="zero-shot, 2-shot", compare="2,1", shots=shots, instruction="Good?")
    ended = finished(server, reply)
    assert ended["contestants"] == [f"{mood}@1", f"{mood}@2", "zero-shot", "2-shot"]
    assert ended["progress"] == {"done": 24, "total": 24}
    difference = ended["result"]["contestants"][f"{mood}@2"]["difference"]["accuracy_choices"]
    assert difference["verdict"] in ("better", "worse", "no difference shown")
    assert ended["result"]["instruction"] == "Good?"


def test_the_card_comes_as_markdown_once_it_is_done(server: LiveServer, mood: str) -> None:
    ended = finished(server, start(server, task=f"{mood}@1"))
    reply = server.client.get(f"/evaluations/{ended['id']}/card")
    assert reply.headers["content-type"].startswith("text/markdown")
    assert reply.text.startswith(f"# {mood}\n")
    assert f"prelude eval {mood}@1 --data test.jsonl" in reply.text


def test_a_teacher_is_asked_beside_it_and_the_card_says_how_to_have_that_again(server: LiveServer, mood: str) -> None:
    ended = finished(server, start(server, task=mood, teacher="Is {input} good?\n"))
    assert ended["contestants"] == [f"{mood}@2", "teacher"]
    assert 0 <= ended["result"]["contestants"]["teacher"]["agreement"]["value"] <= 1
    card = server.client.get(f"/evaluations/{ended['id']}/card").text
    assert "--teacher teacher.txt" in card


def test_text_is_measured_with_references(server: LiveServer) -> None:
    server.publish_random("eval-text", 3, {"generation": {"max_new_tokens": 4}})
    written = [(text, f"{target}, {text}") for text, target in PAIRS]
    references = "".join(json.dumps({"references": [target, "other"]}) + "\n" for _, target in written)
    files = {"data": ("test.jsonl", jsonl(*written)), "references": ("r.jsonl", references.encode())}
    ended = finished(server, server.client.post("/evaluations", data={"task": "eval-text"}, files=files))
    figures = ended["result"]["contestants"]["eval-text@1"]
    assert set(figures) == {"exact_match", "rouge_l", "bleu", "perplexity", "seconds"}
    files["references"] = ("r.jsonl", b"{}\n")
    refused = server.client.post("/evaluations", data={"task": "eval-text"}, files=files)
    assert_error(refused, 422, "invalid_training_data", "r.jsonl, line 1")


def test_bad_rows_are_refused_by_file_and_line_before_anything_runs(server: LiveServer, mood: str) -> None:
    steps = server.engine.steps
    assert_error(start(server, jsonl(*PAIRS) + b"{}\n", task=mood), 422, "invalid_training_data", "test.jsonl, line 7")
    long = jsonl(PAIRS[0], ("x" * 191, "no"))
    assert_error(start(server, long, task=mood), 422, "invalid_training_data", "test.jsonl, line 2", "can never fit")
    strange = jsonl(PAIRS[0], ("x", "maybe"))
    assert_error(start(server, strange, task=mood), 422, "invalid_training_data", "test.jsonl, line 2", "'maybe'")
    body = assert_error(start(server, b"", task=mood), 422, "invalid_training_data", "test.jsonl holds no rows")
    assert tempfile.gettempdir() not in body["error"]
    assert server.engine.steps == steps


@pytest.mark.parametrize(
    ("fields", "status", "code", "part"),
    [
        ({}, 422, "invalid_request", "task"),
        ({"task": "nobody"}, 404, "unknown_task", "nobody"),
        ({"task": "eval-mood@9"}, 404, "unknown_task", ""),
        ({"task": "No Name"}, 422, "invalid_task_name", ""),
        ({"task": "eval-mood", "limit": "0"}, 422, "invalid_request", "limit"),
        ({"task": "eval-mood", "limits": "1"}, 422, "invalid_request", "unknown field limits"),
        ({"task": "eval-mood", "baselines": "zero"}, 422, "invalid_request", "no baseline 'zero'"),
        ({"task": "eval-mood", "baselines": "instruction"}, 422, "invalid_request", "needs an instruction"),
        ({"task": "eval-mood", "baselines": "2-shot"}, 422, "invalid_request", "needs training data"),
        ({"task": "eval-mood", "teacher": "Good?"}, 422, "invalid_request", "exactly once"),
        (
            {"task": "eval-mood", "teacher": "{input}" + "x" * 99_000},
            422,
            "invalid_request",
            "does not fit the context",
        ),
        ({"task": "eval-mood", "teacher": "{input}", "teacher_chat": "yes"}, 422, "invalid_request", "chat template"),
        ({"task": "eval-mood", "compare": "1"}, 422, "invalid_request", "compare"),
        ({"task": "eval-mood", "compare": "1,9"}, 404, "unknown_task", ""),
        ({"task": "eval-mood@1", "compare": "1,2"}, 422, "invalid_request", "names a version"),
        ({"task": "eval-mood", "shots": "x"}, 422, "invalid_request", "no folder of data files"),
    ],
)
def test_what_does_not_fit_is_refused(
    server: LiveServer, mood: str, fields: dict[str, str], status: int, code: str, part: str
) -> None:
    reply = server.client.post("/evaluations", data=fields, files={"data": ("test.jsonl", jsonl(*PAIRS))})
    assert_error(reply, status, code, part)


def test_a_body_that_is_no_order_is_refused(server: LiveServer, mood: str) -> None:
    post = server.client.post
    assert_error(post("/evaluations", json={"task": mood}), 422, "invalid_request", "no `data`")
    assert_error(post("/evaluations", json=[]), 422, "invalid_request", "body")
    assert_error(post("/evaluations", json={"task": mood, "data": "a", "limit": "3"}), 422, "invalid_request", "limit")
    assert_error(post("/evaluations", content=b"x"), 422, "invalid_request", "neither a multipart form nor JSON")
    broken = {"content-type": "application/json"}
    assert_error(post("/evaluations", content=b"{", headers=broken), 422, "invalid_request", "not valid JSON")
    twice = [("data", ("a.jsonl", jsonl(*PAIRS))), ("data", ("b.jsonl", jsonl(*PAIRS)))]
    assert_error(post("/evaluations", data={"task": mood}, files=twice), 422, "invalid_request", "comes twice")
    strange = [("data", ("a.jsonl", jsonl(*PAIRS))), ("extra", ("b.jsonl", b"x"))]
    assert_error(post("/evaluations", data={"task": mood}, files=strange), 422, "invalid_request", "'extra' is no file")
    assert_error(server.client.get("/evaluations/none"), 404, "unknown_evaluation")


def test_files_of_the_data_directory_are_named_and_nothing_outside(tmp_path: Path) -> None:
    folder = tmp_path / "data/moods"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_bytes(jsonl(*PAIRS))
    (folder / "train.jsonl").write_bytes(jsonl(("nice", "yes"), ("nasty", "no")))
    (folder / "meta.json").write_text('{"instruction": "Good?"}')
    (tmp_path / "secret.jsonl").write_bytes(jsonl(*PAIRS))
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    model = tiny_model(max_model_len=192)
    model.tokenizer.chat_template = CHAT
    with live_server(tmp_path, data_dir=tmp_path / "data", model=model) as live:
        live.publish_random("mood", 1, MANIFEST)
        order = {"task": "mood", "data": "moods/test.jsonl", "baselines": ["2-shot", "instruction"], "limit": 3}
        ended = finished(live, live.client.post("/evaluations", json=order))
        assert (ended["data"], ended["rows"]) == ("moods/test.jsonl", 3)
        assert ended["contestants"] == ["mood@1", "instruction", "2-shot"]
        assert ended["result"]["instruction"] == "Good?"
        for name in ("../secret.jsonl", str(tmp_path / "secret.jsonl"), "moods/link.jsonl", "moods/../../secret.jsonl"):
            refused = live.client.post("/evaluations", json={"task": "mood", "data": name})
            assert_error(refused, 422, "invalid_request", "data file")


def test_beside_an_evaluation_live_answers_are_what_they_were(own_server: LiveServer) -> None:
    live = own_server
    live.publish_random("mood", 1, MANIFEST)
    live.publish_random("busy", 2)
    texts = ["hello", "a longer text of somebody", "x" * 60]
    before = [live.text(text, "busy", max_new_tokens=20) for text in texts]
    live.model.delay = 0.002
    reply = start(live, jsonl(*PAIRS * 10), task="mood", baselines="zero-shot")
    during = [live.text(text, "busy", max_new_tokens=20) for text in texts]
    state = live.client.get(reply.headers["location"]).json()["state"]
    assert state == "running", "the test has seen nothing otherwise"
    assert during == before
    live.model.delay = 0.0
    assert finished(live, reply)["state"] == "done"


def test_cancelling_frees_everything_at_once(own_server: LiveServer) -> None:
    live = own_server
    live.publish_random("mood", 1, MANIFEST)
    live.model.delay = 0.005
    running, waiting = (start(live, jsonl(*PAIRS * 30), task="mood") for _ in range(2))
    wait_until(lambda: live.client.get(running.headers["location"]).json()["progress"]["done"] > 2)
    assert live.client.get(waiting.headers["location"]).json()["state"] == "waiting"
    for reply in (waiting, running):
        assert live.client.delete(reply.headers["location"]).status_code == 204
        assert live.client.get(reply.headers["location"]).json()["state"] == "cancelled"
    assert live.worker.num_in_flight == 0
    live.model.delay = 0.0
    wait_until(lambda: not live.engine.has_work)
    live.engine.check_integrity()
    assert not live.engine.kv_cache.allocator.used
    assert_error(live.client.get(running.headers["location"] + "/card"), 409, "evaluation_not_done")
    assert live.client.delete(running.headers["location"]).status_code == 204
    assert_error(live.client.get(running.headers["location"]), 404, "unknown_evaluation")
    assert finished(live, start(live, task="mood"))["state"] == "done"


def test_one_runs_at_a_time_and_too_many_are_refused(own_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_process, "MOST_WAITING", 1)
    monkeypatch.setattr(in_process, "MOST_KEPT", 2)
    live = own_server
    live.publish_random("mood", 1, MANIFEST)
    live.model.delay = 0.005
    first, second = (start(live, jsonl(*PAIRS * 3), task="mood") for _ in range(2))
    refused = start(live, task="mood")
    assert_error(refused, 429, "overloaded", "evaluations wait already")
    assert "retry-after" in refused.headers
    live.model.delay = 0.0
    one, two = finished(live, first), finished(live, second)
    assert one["ended_at"] <= two["started_at"]
    third = finished(live, start(live, task="mood"))
    listed = live.client.get("/evaluations").json()["evaluations"]
    assert [item["id"] for item in listed] == [third["id"], two["id"]], "the oldest is forgotten"
    assert "result" not in listed[0]


def test_a_server_that_drains_aborts_evaluations_and_says_so(own_server: LiveServer) -> None:
    live = own_server
    live.publish_random("mood", 1, MANIFEST)
    live.model.delay = 0.005
    running, waiting = (start(live, jsonl(*PAIRS * 30), task="mood") for _ in range(2))
    asyncio.run_coroutine_threadsafe(live.worker.drain(30), live.loop).result(30)
    for reply in (running, waiting):
        ended = finished(live, reply)
        assert (ended["state"], ended["error"]["code"]) == ("aborted", "server_draining")
    assert_error(start(live, task="mood"), 503, "server_draining")


def test_an_evaluation_takes_a_part_of_what_may_be_in_flight_and_waits_for_the_rest(tmp_path: Path) -> None:
    with live_server(tmp_path, max_per_task=4, max_queue=0, max_sequences=4) as live:
        live.publish_random("mood", 1, MANIFEST)
        live.model.delay = 0.005
        reply = start(live, task="mood")
        texts = [live.generate("hello", "mood", max_new_tokens=2).status_code for _ in range(4)]
        assert texts == [200] * 4, "live requests find room"
        live.model.delay = 0.0
        assert finished(live, reply)["state"] == "done"


def test_an_evaluation_has_bounds_and_says_which(
    server: LiveServer, mood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.jobs.in_process.REPLY_SECONDS", 30.0)  # the rows may take longer to read
    over = start(server, jsonl(*PAIRS * 4000), task=mood)
    assert_error(over, 422, "invalid_training_data", "24,000 rows are more than the server's 20,000")
    assert "limit" in over.json()["remedy"]
    files = {"data": ("d.jsonl", jsonl(*PAIRS)), "references": ("r.jsonl", b"[]\n" * 10**6)}
    refused = server.client.post("/evaluations", data={"task": mood}, files=files)
    assert_error(refused, 422, "invalid_training_data", "r.jsonl, line 1")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, dict[str, dict[str, str]]]]:
    directory = tmp_path_factory.mktemp("guarded")
    path = directory / "keys.json"
    kinds: dict[str, tuple[list[Scope], list[str] | None]] = {
        "admin": ([Scope.ADMIN], None),
        "generate": ([Scope.GENERATE], None),
        "team-a": ([Scope.PUBLISH], ["team-a-*"]),
    }
    headers = {
        name: {"Authorization": f"Bearer {add_key(path, name, scopes, tasks)[1]}"}
        for name, (scopes, tasks) in kinds.items()
    }
    with live_server(directory, api_keys_file=path) as live:
        live.client.headers.update(headers["admin"])
        for task in ("team-a-mood", "team-b-mood"):
            live.publish_random(task, 1, MANIFEST)
        yield live, headers


def test_a_key_evaluates_sees_and_cancels_its_tasks_alone(
    guarded: tuple[LiveServer, dict[str, dict[str, str]]],
) -> None:
    live, headers = guarded
    theirs = finished(live, start(live, task="team-b-mood"), headers["admin"])
    assert_error(start(live, headers=headers["team-a"], task="team-b-mood"), 403, "forbidden", "team-b-mood")
    mine = finished(live, start(live, headers=headers["team-a"], task="team-a-mood"), headers["team-a"])
    assert mine["state"] == "done"
    assert mine["by"] != theirs["by"]
    listed = live.client.get("/evaluations", headers=headers["team-a"]).json()["evaluations"]
    assert [item["id"] for item in listed] == [mine["id"]]
    for method, path in (("GET", ""), ("GET", "/card"), ("DELETE", "")):
        reply = live.client.request(method, f"/evaluations/{theirs['id']}{path}", headers=headers["team-a"])
        assert_error(reply, 404, "unknown_evaluation")
    assert_error(start(live, headers=headers["generate"], task="team-a-mood"), 403, "forbidden", "publish")


def test_an_evaluation_ends_with_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_keys, "LOOK_SECONDS", 0.0)
    path = tmp_path / "keys.json"
    _, admin = add_key(path, "admin", [Scope.ADMIN], None)
    key, secret = add_key(path, "team", [Scope.PUBLISH], ["mood"])
    with live_server(tmp_path, api_keys_file=path) as live:
        live.client.headers["Authorization"] = f"Bearer {admin}"
        live.publish_random("mood", 1, MANIFEST)
        live.model.delay = 0.005
        reply = start(live, jsonl(*PAIRS * 100), {"Authorization": f"Bearer {secret}"}, task="mood")
        revoke_key(path, key.id)
        ended = finished(live, reply)
    assert (ended["state"], ended["error"]["code"]) == ("failed", "forbidden")
    assert f"The key {key.id} was revoked." in ended["error"]["error"]


def test_an_upload_that_is_too_large_is_refused(server: LiveServer, mood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_sizes, "MAX_DATA_BYTES", 1000)
    assert_error(start(server, jsonl(("x", "no")) * 50, task=mood), 413, "payload_too_large")


def test_an_evaluation_is_followed_until_its_end(own_server: LiveServer) -> None:
    live = own_server
    live.publish_random("mood", 1, MANIFEST)
    live.model.delay = 0.005
    started = start(live, jsonl(*PAIRS * 3), task="mood")
    text = live.client.get(f"{started.headers['location']}/events", timeout=30).text
    events = [json.loads(line.removeprefix("data:")) for line in text.splitlines() if line.startswith("data:")]
    assert [event["state"] for event in events if event["event"] == "state"][-1] == "done"
    done = [event["done"] for event in events if event["event"] == "progress"]
    assert done == sorted(set(done))
    assert done[-1] == 18
    assert events[-1]["event"] == "end"
    assert events[-1]["job"] == live.client.get(started.headers["location"]).json()


def test_a_cancelled_evaluation_can_still_be_asked_for(own_server: LiveServer) -> None:
    live = own_server
    live.publish_random("mood", 1, MANIFEST)
    live.model.delay = 0.005
    path = start(live, jsonl(*PAIRS * 100), task="mood").headers["location"]
    assert live.client.post(f"{path}/cancel").json()["state"] == "cancelled"
    assert live.worker.num_in_flight == 0
    assert live.client.post(f"{path}/cancel").json()["state"] == "cancelled"
    assert live.client.get(path).json()["state"] == "cancelled"
