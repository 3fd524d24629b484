"""GET /v1/models: what there is at this moment, and only what the key is for."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from server.keys.file import add_key
from server.keys.key import Scope
from tests.api.live import MAX_MODEL_LEN, LiveServer, assert_openai_error, live_server
from tests.api.openai.support import FROZEN, Body


def cards(server: LiveServer, **headers: str) -> dict[str, Body]:
    """What is listed, by id."""
    reply = server.client.get("/v1/models", headers=headers)
    assert reply.status_code == 200, reply.text
    assert reply.json()["object"] == "list"
    return {card["id"]: card for card in reply.json()["data"]}


def test_the_list_follows_every_change(own_server: LiveServer) -> None:
    assert list(cards(own_server)) == [FROZEN]
    for version in (1, 2):
        own_server.publish_random("mood", version)
        assert cards(own_server)["mood"]["root"] == f"mood@{version}"
    own_server.client.post("/prompts/mood/rollback")
    assert cards(own_server)["mood"]["root"] == "mood@1"
    own_server.client.delete("/prompts/mood")
    assert list(cards(own_server)) == [FROZEN]


def test_a_long_list_comes_in_pages(own_server: LiveServer) -> None:
    for name in ("a", "b", "c"):
        own_server.publish_random(name, 1)
    pages = [
        own_server.client.get(f"/v1/models?{query}").json()
        for query in ("limit=2", "limit=1&after=b", "limit=3", "after=c")
    ]
    assert [[card["id"] for card in page["data"]] for page in pages] == [
        [FROZEN, "a", "b"],
        ["c"],
        [FROZEN, "a", "b", "c"],
        [],
    ]
    assert [page["has_more"] for page in pages] == [True, False, False, False]


def test_a_card_says_what_stands_behind_a_name(own_server: LiveServer) -> None:
    own_server.publish_random("mood", 1)
    listed = cards(own_server)
    for name, card in listed.items():
        assert (card["object"], card["owned_by"], card["max_model_len"]) == ("model", "prelude", MAX_MODEL_LEN)
        assert abs(card["created"] - time.time()) < 600
        assert own_server.client.get(f"/v1/models/{name}").json() == card
    assert (listed[FROZEN]["root"], listed[FROZEN]["parent"]) == (FROZEN, None)
    assert (listed["mood"]["root"], listed["mood"]["parent"]) == ("mood@1", FROZEN)


def test_a_version_can_be_asked_for_by_its_reference(own_server: LiveServer) -> None:
    own_server.publish_random("mood", 1)
    own_server.publish_random("mood", 2)
    card = own_server.client.get("/v1/models/mood@1").json()
    assert (card["id"], card["root"]) == ("mood@1", "mood@1")
    assert_openai_error(own_server.client.get("/v1/models/mood@3"), 404, "unknown_task", "no version 3")


def test_a_staged_task_is_not_listed_but_its_version_is_found(own_server: LiveServer) -> None:
    soft_prompt = own_server.files(own_server.publish_random("other", 1))
    own_server.client.put("/prompts/staged?activate=false", files=[("files", item) for item in soft_prompt.items()])
    assert "staged" not in cards(own_server)
    assert_openai_error(own_server.client.get("/v1/models/staged"), 404, "unknown_task", "No version")
    assert own_server.client.get("/v1/models/staged@1").json()["root"] == "staged@1"


def test_in_a_canary_the_version_that_answers_most_is_shown(own_server: LiveServer) -> None:
    own_server.publish_random("canary", 1)
    own_server.publish_random("canary", 2)
    for most, least in (("1", "2"), ("2", "1")):
        own_server.client.put("/prompts/canary/traffic", json={most: 51, least: 49})
        assert cards(own_server)["canary"]["root"] == f"canary@{most}"
        assert own_server.client.get("/v1/models/canary").json() == cards(own_server)["canary"]


@pytest.mark.parametrize("name", ["nobody", "GPT 4", "org/model", "nobody@x", "%F0%9F%98%80", "x" * 200])
def test_what_there_is_not_is_not_found(server: LiveServer, name: str) -> None:
    error = assert_openai_error(server.client.get(f"/v1/models/{name}"), 404, "unknown_task")
    assert (error["param"], error["type"]) == ("model", "invalid_request_error")


def test_a_frozen_models_name_may_have_a_slash_in_it(own_server: LiveServer) -> None:
    object.__setattr__(own_server.model.spec, "name", "org/name")
    assert own_server.client.get("/v1/models/org/name").json()["id"] == "org/name"
    assert own_server.client.get("/v1/models/org%2Fname").json()["id"] == "org/name"


def test_a_key_with_patterns_sees_its_tasks_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    admin = {"Authorization": f"Bearer {add_key(path, 'admin', [Scope.ADMIN], None)[1]}"}
    team = {"Authorization": f"Bearer {add_key(path, 'team', [Scope.GENERATE], ['team-a-*'])[1]}"}
    with live_server(tmp_path, api_keys_file=path) as live:
        live.client.headers.update(admin)
        for task in ("team-a-mood", "team-b-mood"):
            live.publish_random(task, 1)
        assert list(cards(live)) == [FROZEN, "team-a-mood", "team-b-mood"]
        assert list(cards(live, **team)) == ["team-a-mood"]
        assert live.client.get("/v1/models/team-a-mood", headers=team).status_code == 200
        for name in ("team-b-mood", FROZEN, "nobody"):
            assert_openai_error(live.client.get(f"/v1/models/{name}", headers=team), 403, "forbidden", "team-a-*")
        error = assert_openai_error(live.client.get("/v1/models/team-a-x", headers=team), 404, "unknown_task")
        assert "mood" not in error["message"]
