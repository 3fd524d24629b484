"""POST /generate_many: several tasks answer one text as one stream, and each fails on its own."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.keys.file import add_key
from server.keys.key import Scope
from tests.api.live import LiveServer, as_form, assert_error, live_server, parse_events, send_and_vanish, wait_until
from tests.api.telemetry.scrape import Scrape
from tests.support import random_soft_prompt

ROUTE = "/generate_many"


def ask(server: LiveServer, *tasks: str | None, inputs: str = "hello", **body: Any) -> httpx.Response:
    """Send a text to several tasks; None is the frozen model."""
    targets = [{} if task is None else {"task": task} for task in tasks]
    return server.client.post(ROUTE, json={"inputs": inputs, "targets": targets, **body})


def by_target(response: httpx.Response) -> dict[int, list[dict[str, Any]]]:
    """The events of each target, in their order."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in parse_events(response.content):
        found[event.pop("target")].append(event)
    return found


@pytest.fixture(scope="module")
def moods(server: LiveServer) -> LiveServer:
    """A server with two versions of a task."""
    for seed in (1, 2):
        server.publish_random("many-mood", seed=seed)
    return server


def test_each_target_answers_as_it_does_alone(moods: LiveServer) -> None:
    tasks = ("many-mood@1", "many-mood", None)
    parameters = {"max_new_tokens": 6, "top_n_tokens": 2, "details": True}
    answers = by_target(ask(moods, *tasks, parameters=parameters))
    assert sorted(answers) == [0, 1, 2]
    for number, (task, version) in enumerate(zip(tasks, (1, 2, None), strict=True)):
        start, *tokens = answers[number]
        named = {} if version is None else {"task": "many-mood", "version": version}
        assert start == {"event": "start", "model": moods.model.spec.name, **named}
        alone = moods.events("hello", task, **parameters)
        assert all(event["event"] == "token" and len(event["top_tokens"]) == 2 for event in tokens)
        for name in ("index", "generated_text", "details"):
            assert [event[name] for event in tokens] == [event[name] for event in alone]
        assert [event["token"]["id"] for event in tokens] == [event["token"]["id"] for event in alone]


def test_targets_answer_at_the_same_time(moods: LiveServer) -> None:
    response = ask(moods, "many-mood", None, parameters={"max_new_tokens": 20, "ignore_eos_token": True})
    targets = [event["target"] for event in parse_events(response.content)]
    assert targets.index(1) < len(targets) - 1 - targets[::-1].index(0)
    assert targets.index(0) < len(targets) - 1 - targets[::-1].index(1)


def test_the_failure_of_a_target_is_an_event_of_that_target_alone(moods: LiveServer) -> None:
    answers = by_target(ask(moods, "many-nobody", "many-mood", "no/name", parameters={"max_new_tokens": 3}))
    assert answers[1][-1]["generated_text"] is not None
    for number, status, code in ((0, 404, "unknown_task"), (2, 422, "invalid_task_name")):
        [error] = answers[number]
        assert (error["event"], error["status"], error["code"]) == ("error", status, code)
        assert error["error"]
        assert error["remedy"]


def test_choices_are_one_event_of_each_target(moods: LiveServer) -> None:
    parameters: dict[str, Any] = {"choices": ["yes", "no"]}
    answers = by_target(ask(moods, "many-mood", None, parameters=parameters))
    for number, task in enumerate(("many-mood", None)):
        _, chosen = answers[number]
        alone = moods.generate("hello", task, **parameters).json()
        assert (chosen["event"], chosen["generated_text"]) == ("choices", alone["generated_text"])
        assert [it["text"] for it in chosen["choices"]] == ["yes", "no"]
        virtual = 0 if task is None else 5
        assert chosen["details"] == {"virtual_tokens": virtual, "cached_tokens": virtual}
        assert sum(it["probability"] for it in chosen["choices"]) == pytest.approx(1)


@pytest.mark.parametrize("task", ["many-mood", None])
def test_an_answer_continues_after_given_tokens_as_it_would_have(moods: LiveServer, task: str | None) -> None:
    parameters = {"max_new_tokens": 8, "ignore_eos_token": True}
    whole = [event["token"] for event in by_target(ask(moods, task, parameters=parameters))[0][1:]]
    parameters["max_new_tokens"] = 5
    ids = [token["id"] for token in whole[:3]]
    rest = [event["token"] for event in by_target(ask(moods, task, parameters=parameters, answer_ids=ids))[0][1:]]
    assert [token["id"] for token in rest] == [token["id"] for token in whole[3:]]


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"targets": []}, "targets"),
        ({"targets": [{}] * 33}, "targets"),
        ({"targets": [{"tusk": "mood"}]}, "tusk"),
        ({"target": [{}]}, "targets"),
        ({"inputs": ["a", "b"]}, "inputs"),
        ({"parameters": {"adapter_id": "mood"}}, "adapter_id"),
        ({"parameters": {"best_of": 2, "do_sample": True}}, "best_of"),
        ({"parameters": {"decoder_input_details": True}}, "decoder_input_details"),
        ({"answer_ids": [1], "parameters": {"choices": ["a", "b"]}}, "choices"),
        ({"answer_ids": [1], "parameters": {"grammar": {"type": "regex", "value": "a"}}}, "grammar"),
        ({"answer_ids": [-1]}, "answer_ids"),
        ({"targets": [{}] * 32, "parameters": {"choices": [str(n) for n in range(65)]}}, "32 targets with 65 choices"),
    ],
)
def test_what_concerns_all_targets_is_refused_before_the_stream(
    server: LiveServer, body: dict[str, Any], part: str
) -> None:
    response = server.client.post(ROUTE, json={"inputs": "hello", "targets": [{}], **body})
    assert_error(response, 422, "invalid_request", part)


def test_a_token_that_the_model_does_not_have_is_refused_by_its_target(server: LiveServer) -> None:
    [_, error] = by_target(ask(server, None, answer_ids=[10**9]))[0]
    assert (error["event"], error["status"], error["code"]) == ("error", 422, "unknown_token")


def test_each_target_is_admitted_on_its_own(tmp_path: Path) -> None:
    with live_server(tmp_path, max_per_task=1) as live:
        live.publish_random("mood")
        parameters = {"max_new_tokens": 20, "ignore_eos_token": True}
        answers = by_target(ask(live, "mood", "mood", None, parameters=parameters))
        refused = answers[1][-1]
        assert (refused["event"], refused["status"], refused["code"]) == ("error", 429, "overloaded")
        assert refused["retry_after"] >= 1
        assert all(answers[number][-1]["generated_text"] is not None for number in (0, 2))


def test_a_key_reaches_only_the_targets_that_it_is_for(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    _, admin = add_key(path, "admin", [Scope.ADMIN], None)
    _, key = add_key(path, "user", [Scope.GENERATE], ["mood"])
    with live_server(tmp_path, api_keys_file=path) as live:
        headers = {"Authorization": f"Bearer {admin}"}
        files = live.files(random_soft_prompt(live.model.spec))
        for task in ("mood", "other"):
            assert live.client.put(f"/prompts/{task}", files=as_form(files), headers=headers).status_code == 201
        assert_error(ask(live, "mood"), 401, "unauthorized")
        live.client.headers["Authorization"] = f"Bearer {key}"
        answers = by_target(ask(live, "mood", "other", None, "nobody", parameters={"max_new_tokens": 2}))
        assert answers[0][-1]["generated_text"] is not None
        assert [answers[number][-1].get("status") for number in (1, 2, 3)] == [403, 403, 403]
        live.client.headers["Authorization"] = f"Bearer {admin}"


def test_all_targets_end_when_the_client_leaves(own_server: LiveServer) -> None:
    own_server.publish_random("mood")
    own_server.model.delay = 0.02
    parameters = {"max_new_tokens": 150, "ignore_eos_token": True}
    body = {"inputs": "a", "targets": [{"task": "mood"}, {"task": "mood@1"}, {}], "parameters": parameters}
    with send_and_vanish(own_server.port, ROUTE, json.dumps(body).encode()) as connection:
        connection.recv(1)
        wait_until(lambda: own_server.in_flight == 3)
    wait_until(lambda: own_server.is_idle, 20)


def test_a_step_that_breaks_is_an_error_of_each_target(own_server: LiveServer) -> None:
    own_server.publish_random("mood")
    own_server.model.fail_after = 0
    answers = by_target(ask(own_server, "mood", None, parameters={"max_new_tokens": 5}))
    assert {events[-1]["event"] for events in answers.values()} <= {"error", "token"}
    assert any(events[-1].get("status") == 500 for events in answers.values())
    assert own_server.is_idle


def test_each_target_counts_for_its_own_task(own_server: LiveServer) -> None:
    for task in ("mood", "tone"):
        own_server.publish_random(task)
    by_target(ask(own_server, "mood", "tone", None, parameters={"max_new_tokens": 3, "ignore_eos_token": True}))
    counted = Scrape.of(own_server).series("prelude_requests_total")
    assert counted == {("finished", "mood", "1"): 1, ("finished", "tone", "1"): 1, ("finished", "_model", ""): 1}
