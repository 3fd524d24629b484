from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.contracts import ModelSpec
from tests.peft_files import CONFIG, peft_directory
from tests.registry.inbox import Home, digest, live
from tests.support import random_soft_prompt


def test_removing_an_entry_retires_its_tasks_also_the_last_one(home: Home) -> None:
    home.drop("a", 1)
    peft_directory(home.prompts / "many", "MULTITASK_PROMPT_TUNING")
    server = home.server()
    server.scan()
    home.remove("many")
    assert live(server.scan()) == {"a": 1}
    home.remove("a")
    assert live(server.scan()) == {}
    assert list(server.registry.task("a").versions) == [1], "it can be activated again"


def test_a_retired_entry_that_is_put_back_is_served_again(home: Home) -> None:
    soft_prompt = home.drop("a", 1)
    server = home.server()
    server.scan()
    for _ in range(2):
        os.rename(home.prompts / "a", home.prompts / ".aside")
        assert live(server.scan()) == {}
        os.rename(home.prompts / ".aside", home.prompts / "a")
        assert digest(server.scan(), "a") == soft_prompt.digest


def test_renaming_an_entry_renames_its_task(home: Home) -> None:
    soft_prompt = home.drop("a", 1)
    server = home.server()
    server.scan()
    os.rename(home.prompts / "a", home.prompts / "b")
    registry = server.scan()
    assert live(registry) == {"b": 1}
    assert digest(registry, "b") == soft_prompt.digest


def test_removing_an_entry_that_an_upload_replaced_retires_nothing(home: Home) -> None:
    home.drop("a", 1)
    server = home.server()
    server.scan().publish("a", [random_soft_prompt(home.model, seed=2)], "api")
    home.remove("a")
    assert live(server.scan()) == {"a": 2}
    assert live(home.restart()) == {"a": 2}
    again = home.drop("a", 1)
    assert digest(server.scan(), "a") == again.digest, "it was put there after the upload"


def test_removing_an_entry_that_broke_retires_what_it_was(home: Home) -> None:
    home.drop("a", 1)
    server = home.server()
    server.scan()
    (home.prompts / "a" / CONFIG).write_text("{")
    server.scan()
    home.remove("a")
    assert live(server.scan()) == {}


def test_a_store_that_refuses_to_retire_is_asked_again_and_logged_once(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    home.drop("a", 1)
    server = home.server()
    server.scan()
    home.remove("a")
    home.objects.fails = lambda action, key: action == "create"
    for _ in range(3):
        server.scan()
    assert len(caplog.records) == 1
    assert live(server.registry) == {"a": 1}
    home.objects.fails = lambda action, key: False
    assert live(server.scan()) == {}


def test_what_was_removed_while_no_server_ran_is_retired_at_start(home: Home) -> None:
    for name in ("a", "b", "c"):
        home.drop(name, 1)
    home.restart().publish("b", [random_soft_prompt(home.model, seed=2)], "api")
    home.remove("a")
    home.remove("b")
    assert live(home.restart()) == {"b": 2, "c": 1}


def test_a_start_retires_nothing_that_an_unreadable_entry_may_hold(home: Home) -> None:
    peft_directory(home.prompts / "many", "MULTITASK_PROMPT_TUNING")
    home.drop("a", 1)
    home.restart()
    for name in ("many", "a"):
        (home.prompts / name / CONFIG).write_text("{")
    assert list(live(home.restart())) == ["a", "many-0", "many-1", "many-2"]


def test_a_store_that_refuses_at_start_is_asked_to_retire_later(home: Home) -> None:
    for name in ("a", "b"):
        home.drop(name, 1)
    home.restart()
    home.remove("a")
    home.objects.fails = lambda action, key: action == "create"
    server = home.server()
    assert live(server.scan()) == {"a": 1, "b": 1}
    home.objects.fails = lambda action, key: False
    assert live(server.scan()) == {"b": 1}


def test_inboxes_on_one_store_leave_each_others_tasks_alone(tmp_path: Path, spec: ModelSpec) -> None:
    here, there = Home(tmp_path / "here", spec), Home(tmp_path / "there", spec)
    there.objects = here.objects
    for name, home, seed in (("a", here, 1), ("b", there, 1), ("c", here, 1), ("same", here, 1), ("same", there, 1)):
        home.drop(name, seed)
    ours = here.server()
    ours.scan()
    theirs = there.server()
    theirs.scan()
    replaced = there.drop("c", 2)
    theirs.scan()
    here.remove("c")
    there.remove("same")
    for server in (ours, theirs, here.server(), there.server()):
        assert live(server.scan()) == {"a": 1, "b": 1, "c": 2, "same": 1}
    assert digest(ours.registry, "c") == replaced.digest


def test_inboxes_with_other_content_under_one_name_do_not_take_turns_at_each_restart(
    tmp_path: Path, spec: ModelSpec
) -> None:
    here, there = Home(tmp_path / "here", spec), Home(tmp_path / "there", spec)
    there.objects = here.objects
    here.drop("a", 1)
    theirs = there.drop("a", 2)
    here.restart()
    there.restart()
    events = here.num_events
    for home in (here, there, here):
        registry = home.restart()
        assert digest(registry, "a") == theirs.digest
        assert live(registry) == {"a": 2}
    assert here.num_events == events == 2
    changed = here.drop("a", 3)
    assert digest(here.restart(), "a") == changed.digest
    assert digest(there.restart(), "a") == changed.digest
    there.remove("a")
    there.drop("b", 1)  # a directory with nothing in it may be one that is not mounted
    assert digest(there.restart(), "a") == changed.digest, "what is live is not theirs"


def test_what_two_inboxes_hold_is_served_until_both_have_let_go_of_it(tmp_path: Path, spec: ModelSpec) -> None:
    here, there = Home(tmp_path / "here", spec), Home(tmp_path / "there", spec)
    there.objects = here.objects
    servers = []
    for home in (here, there):
        home.drop("a", 1)
        home.drop("b", 1)
        servers.append(home.server())
        servers[-1].scan()
    here.remove("a")
    for server in (*servers, here.server(), there.server()):
        assert live(server.scan()) == {"a": 1, "b": 1}
    there.remove("a")
    assert live(there.restart()) == {"b": 1}, "it was removed while no server ran"


def test_a_container_with_another_name_brings_nothing_back(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        home.drop(name, 1)
    home.restart().delete("a")
    for host in ("second", "third"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        assert live(home.restart()) == {"b": 1}
    changed = home.drop("b", 2)
    assert digest(home.restart(), "b") == changed.digest
    monkeypatch.setattr("socket.gethostname", lambda: "fourth")
    assert live(home.restart()) == {"b": 2}
    assert home.num_events == 4, "two published, one deleted, one changed"


def test_a_container_with_another_name_may_retire_what_it_published_before(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.drop("a", 1)
    home.restart()
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    server = home.server()
    server.scan()
    home.remove("a")
    assert live(server.scan()) == {}
