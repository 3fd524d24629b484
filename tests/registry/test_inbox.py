"""The inbox: what people put into `prompts/` is served, and what they took back through the API stays away.

Most is tried with `scan`, which waits for nothing; what needs a thread, or time, is at the end.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.registry import inbox as inbox_module
from tests.peft_files import TENSORS, peft_directory
from tests.registry.inbox import Home, digest, live
from tests.support import random_soft_prompt

# What is published.


def test_a_new_entry_is_published_after_it_was_warmed(home: Home) -> None:
    soft_prompt = home.drop("a", 1)
    server = home.server()
    seen: list[str] = []
    server.inbox.scan(seen.append, settle_seconds=0)
    assert seen == ["a"]
    assert digest(server.registry, "a") == soft_prompt.digest
    assert server.engine.warmed == [soft_prompt.prefix_hash]
    assert server.registry.errors == {}
    version = server.registry.task("a").versions[1]
    assert version.source == "inbox"
    assert version.by is not None
    assert version.by.endswith(f":{home.prompts}")


def test_what_an_entry_holds_and_nobody_uses_is_logged_once(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    home.drop("a", 1, lables="x")
    for name in ("README.md", "lens.svg", "tokenizer.json"):
        (home.prompts / "a" / name).write_text("{}")
    server = home.server()
    server.scan()
    server.scan()
    field, file = [record.message for record in caplog.records]
    assert "lables" in field
    assert file.endswith("a: not used: tokenizer.json")


def test_what_peft_saved_is_served_and_a_multitask_entry_as_one_task_per_row(home: Home) -> None:
    peft_directory(home.prompts / "plain")
    peft_directory(home.prompts / "many", "MULTITASK_PROMPT_TUNING")
    served = live(home.restart())
    assert list(served) == ["many-0", "many-1", "many-2", "plain"]
    assert home.num_events == 2
    assert live(home.restart()) == served
    assert home.num_events == 2


def test_an_entry_that_did_not_change_is_published_once(home: Home) -> None:
    home.drop("a", 1)
    server = home.server()
    server.scan()
    server.scan()
    home.drop("a", 1)
    assert live(server.scan()) == {"a": 1}
    assert live(home.restart()) == {"a": 1}
    assert home.num_events == 1


def test_an_entry_that_did_not_change_is_not_read_again(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.drop("a", 1)
    server = home.server()
    server.scan()
    monkeypatch.setattr(inbox_module, "load_soft_prompts", lambda *args: pytest.fail("it was read"))
    server.scan()
    assert server.registry.errors == {}


def test_an_entry_that_changed_is_a_new_version_live_or_after_a_restart(home: Home) -> None:
    home.drop("a", 1)
    server = home.server()
    server.scan()
    changed = home.drop("a", 2)
    assert digest(server.scan(), "a") == changed.digest
    changed = home.drop("a", 3)
    registry = home.restart()
    assert live(registry) == {"a": 3}
    assert digest(registry, "a") == changed.digest


def test_a_manifest_that_changed_is_a_new_version(home: Home) -> None:
    home.drop("a", 1)
    server = home.server()
    server.scan()
    home.drop("a", 1, description="for reviews")
    assert live(server.scan()) == {"a": 2}


def test_a_file_that_is_written_over_is_noticed_even_if_its_size_and_time_are_the_same(home: Home) -> None:
    home.drop("a", 1)
    server = home.server()
    server.scan()
    changed = home.drop(".aside", 2)
    path = home.prompts / "a" / TENSORS
    before = path.stat()
    path.write_bytes((home.prompts / ".aside" / TENSORS).read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_ino == before.st_ino
    assert digest(server.scan(), "a") == changed.digest


def test_rows_that_a_multitask_entry_has_no_more_are_retired(home: Home) -> None:
    peft_directory(home.prompts / "many", "MULTITASK_PROMPT_TUNING")
    server = home.server()
    server.scan()
    home.drop("many", 1)
    assert live(server.scan()) == {"many": 1}


def test_of_two_entries_that_make_the_same_task_one_is_served_until_it_goes(home: Home) -> None:
    peft_directory(home.prompts / "many", "MULTITASK_PROMPT_TUNING")
    soft_prompt = home.drop("many-1", 1)
    server = home.server()
    registry = server.scan()
    assert "already makes the task 'many-1'" in registry.errors["many-1"]
    home.restart()
    assert home.num_events == 1, "they must not take turns"
    home.remove("many")
    server.scan()
    server.scan()
    assert live(registry) == {"many-1": 2}
    assert digest(registry, "many-1") == soft_prompt.digest
    assert registry.errors == {}


def test_a_link_to_a_directory_is_an_entry(home: Home, tmp_path: Path) -> None:
    soft_prompt = home.drop("a", 1)
    os.rename(home.prompts / "a", tmp_path / "elsewhere")
    (home.prompts / "b").symlink_to(tmp_path / "elsewhere")
    server = home.server()
    assert digest(server.scan(), "b") == soft_prompt.digest
    other = home.drop("a", 2)
    (home.prompts / "new").symlink_to(home.prompts / "a")
    os.replace(home.prompts / "new", home.prompts / "b")
    assert digest(server.scan(), "b") == other.digest


def test_only_visible_directories_with_files_are_entries(home: Home) -> None:
    home.drop("a", 1)
    home.drop(".hidden", 2)
    (home.prompts / "README.md").write_text("words")
    (home.prompts / "link.md").symlink_to("README.md")
    (home.prompts / "empty").mkdir()
    home.drop("lost+found", 1)
    registry = home.restart()
    assert live(registry) == {"a": 1}
    assert registry.errors == {}


# What the API changed meanwhile.


def test_a_task_deleted_by_the_api_stays_away_until_its_entry_changes(home: Home) -> None:
    home.drop("a", 1)
    server = home.server()
    server.scan().delete("a")
    for registry in (server.scan(), home.restart()):
        assert live(registry) == {}
    home.drop("a", 2)
    assert live(home.restart()) == {"a": 2}


def test_a_task_deleted_by_the_api_comes_back_if_its_entry_is_removed_and_put_there_again(home: Home) -> None:
    soft_prompt = home.drop("a", 1)
    server = home.server()
    server.scan().delete("a")
    home.remove("a")
    server.scan()
    home.drop("a", 1)
    assert digest(server.scan(), "a") == soft_prompt.digest
    assert home.num_events == 4, "published, deleted, retired, published"


def test_an_upload_over_an_entry_is_not_reverted(home: Home) -> None:
    home.drop("a", 1)
    server = home.server()
    uploaded = random_soft_prompt(home.model, seed=2)
    server.scan().publish("a", [uploaded], "api")
    for registry in (server.scan(), home.restart()):
        assert digest(registry, "a") == uploaded.digest
        assert live(registry) == {"a": 2}


def test_an_upload_is_not_reverted_by_an_entry_that_was_live_before_its_first_scan(home: Home) -> None:
    server = home.server()
    server.registry.publish("a", [home.drop("a", 1)], "api")
    assert live(server.scan()) == {"a": 1}, "the entry's content was live already"
    uploaded = random_soft_prompt(home.model, seed=2)
    server.registry.publish("a", [uploaded], "api")
    server.scan()
    assert digest(home.restart(), "a") == uploaded.digest
