"""The inbox: what people put into `prompts/` is served, and what they took back through the API stays away."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from server.core import ModelSpec
from server.errors import UnknownTask
from server.registry.inbox import scan_inbox
from server.registry.registry import Registry
from server.registry.store import LocalStore
from server.soft_prompts.formats import save_soft_prompt
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.peft_files import CONFIG, TENSORS, peft_directory
from tests.support import random_soft_prompt


class Home:
    """A `prompts/` directory with its store, as one server after another finds it."""

    def __init__(self, prompts: Path, model: ModelSpec) -> None:
        self.prompts, self.model = prompts, model

    def drop(self, name: str, seed: int) -> SoftPrompt:
        """Put an entry into the inbox, or change it."""
        soft_prompt = random_soft_prompt(self.model, seed=seed)
        save_soft_prompt(self.prompts / name, soft_prompt, self.model)
        return soft_prompt

    def start(self, model: ModelSpec | None = None) -> Registry:
        """Open the registry and scan, as a server does when it starts."""
        registry = Registry(LocalStore(self.prompts / ".store"), model or self.model, 32)
        scan_inbox(self.prompts, registry)
        return registry

    def num_events(self) -> int:
        return len(list((self.prompts / ".store" / "events").iterdir()))


@pytest.fixture
def home(tmp_path: Path, spec: ModelSpec) -> Home:
    return Home(tmp_path, spec)


def live(registry: Registry) -> dict[str, int]:
    return {task.task: task.live for task in registry.tasks()}


def test_a_new_entry_is_published(home: Home) -> None:
    soft_prompt = home.drop("a", 1)
    seen: list[str] = []
    registry = Registry(LocalStore(home.prompts / ".store"), home.model, 32)
    scan_inbox(home.prompts, registry, seen.append)
    assert registry.resolve("a").soft_prompt.digest == soft_prompt.digest
    assert seen == ["a"]
    assert registry.errors == {}


def test_what_peft_saved_is_served_and_a_multitask_entry_as_one_task_per_row(home: Home) -> None:
    peft_directory(home.prompts / "plain")
    peft_directory(home.prompts / "many", "MULTITASK_PROMPT_TUNING")
    registry = home.start()
    assert list(live(registry)) == ["many-0", "many-1", "many-2", "plain"]
    assert home.num_events() == 2
    assert live(home.start()) == live(registry)
    assert home.num_events() == 2


def test_an_entry_that_did_not_change_is_published_once(home: Home) -> None:
    home.drop("a", 1)
    registry = home.start()
    scan_inbox(home.prompts, registry)
    home.drop("a", 1)
    scan_inbox(home.prompts, registry)
    assert live(home.start()) == {"a": 1}
    assert home.num_events() == 1


def test_an_entry_that_changed_is_a_new_version_live_or_after_a_restart(home: Home) -> None:
    home.drop("a", 1)
    registry = home.start()
    changed = home.drop("a", 2)
    scan_inbox(home.prompts, registry)
    assert registry.resolve("a").soft_prompt.digest == changed.digest
    changed = home.drop("a", 3)
    registry = home.start()
    assert live(registry) == {"a": 3}
    assert registry.resolve("a").soft_prompt.digest == changed.digest


def test_a_broken_entry_is_reported_and_the_others_are_served(home: Home) -> None:
    for name in ("a", "b", "c"):
        home.drop(name, 1)
    (home.prompts / "b" / TENSORS).write_bytes(b"\0" * 100)
    registry = home.start()
    assert live(registry) == {"a": 1, "c": 1}
    assert list(registry.errors) == ["b"]
    assert "not a safetensors file" in registry.errors["b"]


def test_an_entry_that_broke_leaves_its_last_good_version_live(home: Home) -> None:
    good = home.drop("a", 1)
    registry = home.start()
    (home.prompts / "a" / CONFIG).write_text("{")
    for opened in (registry, home.start()):
        scan_inbox(home.prompts, opened)
        assert opened.resolve("a").soft_prompt.digest == good.digest
        assert "not valid JSON" in opened.errors["a"]
    home.drop("a", 1)
    scan_inbox(home.prompts, registry)
    assert registry.errors == {}
    assert live(registry) == {"a": 1}


def test_a_task_deleted_by_the_api_stays_away_until_its_entry_changes(home: Home) -> None:
    home.drop("a", 1)
    registry = home.start()
    registry.delete("a")
    for opened in (registry, home.start()):
        scan_inbox(home.prompts, opened)
        with pytest.raises(UnknownTask):
            opened.resolve("a")
    home.drop("a", 2)
    assert live(home.start()) == {"a": 2}


def test_an_upload_over_an_entry_is_not_reverted_by_a_restart(home: Home) -> None:
    home.drop("a", 1)
    registry = home.start()
    uploaded = random_soft_prompt(home.model, seed=2)
    registry.publish("a", [uploaded], "api")
    scan_inbox(home.prompts, registry)
    registry = home.start()
    assert registry.resolve("a").soft_prompt.digest == uploaded.digest
    assert live(registry) == {"a": 2}


def test_an_upload_is_not_reverted_by_an_entry_that_was_live_before_its_first_scan(home: Home) -> None:
    registry = home.start()
    registry.publish("a", [home.drop("a", 1)], "api")
    scan_inbox(home.prompts, registry)
    assert live(registry) == {"a": 1}, "the entry's content was live already"
    uploaded = random_soft_prompt(home.model, seed=2)
    registry.publish("a", [uploaded], "api")
    scan_inbox(home.prompts, registry)
    assert home.start().resolve("a").soft_prompt.digest == uploaded.digest


def test_what_the_store_lost_comes_back_from_the_inbox(home: Home) -> None:
    soft_prompt = home.drop("a", 1)
    home.start()
    blob = home.prompts / ".store" / "blobs" / f"{soft_prompt.digest}.safetensors"
    blob.write_bytes(b"")
    registry = home.start()
    assert registry.resolve("a").soft_prompt.digest == soft_prompt.digest
    assert registry.errors == {}
    assert home.start().errors == {}


def test_a_lost_upload_stays_reported_although_the_entry_under_it_is_sound(home: Home) -> None:
    home.drop("a", 1)
    registry = home.start()
    uploaded = random_soft_prompt(home.model, seed=2)
    registry.publish("a", [uploaded], "api")
    (home.prompts / ".store" / "blobs" / f"{uploaded.digest}.safetensors").unlink()
    registry = home.start()
    assert live(registry) == {}
    assert uploaded.digest in registry.errors["a"]


def test_only_visible_directories_with_files_are_entries(home: Home) -> None:
    home.drop("a", 1)
    home.drop(".hidden", 2)
    (home.prompts / "README.md").write_text("words")
    (home.prompts / "empty").mkdir()
    (home.prompts / "dangling").symlink_to("nowhere")
    registry = home.start()
    assert live(registry) == {"a": 1}
    assert registry.errors == {}


def test_a_directory_whose_name_no_task_can_have_is_reported(home: Home) -> None:
    home.drop("My Task", 1)
    home.drop(home.model.name, 1)
    home.drop("a", 1)
    registry = home.start()
    assert live(registry) == {"a": 1}
    assert "[a-z0-9]" in registry.errors["My Task"]
    assert "frozen model" in registry.errors[home.model.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
def test_a_directory_that_cannot_be_read_is_reported(home: Home) -> None:
    home.drop("a", 1)
    home.drop("b", 1)
    (home.prompts / "a").chmod(0)
    registry = home.start()
    (home.prompts / "a").chmod(0o700)
    assert live(registry) == {"b": 1}
    assert "Permission" in registry.errors["a"]


def test_an_inbox_that_is_not_there_is_empty(home: Home) -> None:
    registry = Registry(LocalStore(home.prompts / "store"), home.model, 32)
    scan_inbox(home.prompts / "nowhere", registry)
    assert registry.tasks() == []


def test_a_task_outlives_its_entry(home: Home) -> None:
    home.drop("a", 1)
    home.start()
    shutil.rmtree(home.prompts / "a")
    assert live(home.start()) == {"a": 1}


def test_an_entry_whose_name_is_not_text_is_reported_as_text(home: Home) -> None:
    entry = os.fsencode(home.prompts) + b"/bad\xff"
    os.makedirs(entry)  # noqa: PTH103
    Path(os.fsdecode(entry), CONFIG).write_text("{}")
    registry = home.start()
    assert [name.encode() for name in registry.errors] == [b"bad\\xff"]
    registry.errors["bad\\xff"].encode()


def test_what_a_killed_writer_left_is_removed_a_day_later(home: Home) -> None:
    home.start()
    old, new = (home.prompts / ".store" / "blobs" / f".tmp-{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    home.start()
    assert not old.exists()
    assert new.exists()
