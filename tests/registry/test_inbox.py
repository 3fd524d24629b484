"""The inbox: what people put into `prompts/` is served, and what they took back through the API stays away.

Most is tried with `scan`, which waits for nothing; what needs a thread, or time, is at the end.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from server.contracts import ModelSpec
from server.errors import InvalidSoftPrompt, ServerDraining, StoreError, UnknownTask
from server.registry import inbox as inbox_module
from server.registry import inbox_watcher as folder_module
from server.registry.inbox import Inbox
from server.registry.inbox_entry import Missing
from server.registry.inbox_watcher import Signature
from server.registry.registry import Registry
from server.registry.store import Store
from server.soft_prompts import formats
from server.soft_prompts.formats import save_soft_prompt
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.api.live import wait_until
from tests.peft_files import CONFIG, TENSORS, peft_directory
from tests.registry.fakes import MemoryObjects, NotingEngine
from tests.support import random_soft_prompt

PATIENCE = 10.0
"""Seconds until a test gives up, where how long it takes does not matter."""


class Server:
    """A registry and its inbox, as one server after another opens them."""

    def __init__(self, prompts: Path, objects: MemoryObjects, model: ModelSpec) -> None:
        self.engine = NotingEngine()
        self.registry = Registry(Store(objects), model, 32)
        self.registry.connect(self.engine)
        self.inbox = Inbox(prompts, self.registry)

    def scan(self) -> Registry:
        """Look once, waiting for nothing."""
        self.inbox.scan(settle_seconds=0)
        return self.registry

    @contextmanager
    def watching(self) -> Iterator[Registry]:
        """Scan as a server that starts, and watch until the block ends."""
        self.inbox.scan(settle_seconds=0)
        self.inbox.start()
        try:
            yield self.registry
        finally:
            self.inbox.stop()
            wait_until(lambda: not self.inbox._thread.is_alive(), PATIENCE)


class Home:
    """A `prompts/` directory, and a store beside it."""

    def __init__(self, prompts: Path, model: ModelSpec) -> None:
        self.prompts, self.model, self.objects = prompts, model, MemoryObjects()

    def drop(self, name: str, seed: int, **manifest: str) -> SoftPrompt:
        """Put an entry into the inbox, or replace its files."""
        soft_prompt = random_soft_prompt(self.model, seed=seed, manifest=manifest)
        aside = self.prompts.parent / f"{self.prompts.name}.aside"
        save_soft_prompt(aside, soft_prompt, self.model)
        (self.prompts / name).mkdir(exist_ok=True, parents=True)
        for file in aside.iterdir():
            os.replace(file, self.prompts / name / file.name)
        return soft_prompt

    def server(self) -> Server:
        return Server(self.prompts, self.objects, self.model)

    def restart(self) -> Registry:
        return self.server().scan()

    def remove(self, name: str) -> None:
        shutil.rmtree(self.prompts / name)

    @property
    def num_events(self) -> int:
        return len(self.objects.list("events"))


@pytest.fixture
def home(tmp_path: Path, spec: ModelSpec) -> Home:
    (tmp_path / "prompts").mkdir()
    return Home(tmp_path / "prompts", spec)


def live(registry: Registry) -> dict[str, int]:
    return {task.name: task.live.number for task in registry.tasks() if task.live is not None}


def digest(registry: Registry, task: str) -> str | None:
    try:
        return registry.resolve(task).content.digest
    except UnknownTask:
        return None


def is_served(registry: Registry, task: str, soft_prompt: SoftPrompt) -> Callable[[], bool]:
    return lambda: digest(registry, task) == soft_prompt.digest


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
    for name in ("README.md", "tokenizer.json"):
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


# What cannot be served.


def test_a_broken_entry_is_reported_and_the_others_are_served(home: Home) -> None:
    for name in ("a", "b", "c"):
        home.drop(name, 1)
    (home.prompts / "b" / TENSORS).write_bytes(b"\0" * 100)
    registry = home.restart()
    assert live(registry) == {"a": 1, "c": 1}
    assert list(registry.errors) == ["b"]
    assert "not a safetensors file" in registry.errors["b"]


@pytest.mark.timeout(20)  # what waits for a writer waits for ever
def test_a_pipe_in_the_place_of_a_file_holds_up_nobody(home: Home) -> None:
    for name in ("a", "b"):
        home.drop(name, 1)
    (home.prompts / "a" / CONFIG).unlink()
    os.mkfifo(home.prompts / "a" / CONFIG)
    server = home.server()
    assert live(server.scan()) == {"b": 1}
    assert "not a regular file" in server.registry.errors["a"]
    home.drop("a", 1)
    assert live(server.scan()) == {"a": 1, "b": 1}
    assert server.registry.errors == {}


def test_an_entry_that_broke_leaves_its_last_good_version_live(home: Home) -> None:
    good = home.drop("a", 1)
    server = home.server()
    server.scan()
    (home.prompts / "a" / CONFIG).unlink()
    for registry in (server.scan(), home.restart()):
        assert digest(registry, "a") == good.digest
        assert "adapter_config.json is missing" in registry.errors["a"]
    home.drop("a", 1)
    registry = server.scan()
    assert registry.errors == {}
    assert live(registry) == {"a": 1}


def test_an_entry_that_is_gone_is_no_longer_reported(home: Home) -> None:
    home.drop("a", 1)
    (home.prompts / "a" / CONFIG).write_text("{")
    server = home.server()
    assert list(server.scan().errors) == ["a"]
    home.remove("a")
    assert server.scan().errors == {}


def test_a_directory_whose_name_no_task_can_have_is_reported(home: Home) -> None:
    for name in ("My Task", home.model.name, "a"):
        home.drop(name, 1)
    registry = home.restart()
    assert live(registry) == {"a": 1}
    assert "[a-z0-9]" in registry.errors["My Task"]
    assert "frozen model" in registry.errors[home.model.name]


def test_an_entry_whose_name_is_not_text_is_reported_as_text(home: Home) -> None:
    entry = os.fsencode(home.prompts) + b"/bad\xff"
    os.makedirs(entry)  # noqa: PTH103
    Path(os.fsdecode(entry), CONFIG).write_text("{}")
    registry = home.restart()
    assert [name.encode() for name in registry.errors] == [b"bad\\xff"]
    registry.errors["bad\\xff"].encode()


def test_an_entry_that_cannot_be_read_for_now_is_reported_and_not_retired(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.drop("a", 1)
    home.drop("b", 1)
    server = home.server()
    server.scan()
    changed = home.drop("b", 2)

    def refusing(real: Callable[[Path], object]) -> Callable[[Path], object]:
        def refuse(path: Path) -> object:
            if path == home.prompts / "a":
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        return refuse

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refusing(os.scandir))
        patch.setattr(os, "listdir", refusing(os.listdir))
        server.scan()
        registry = server.scan()
        assert "Permission denied" in registry.errors["a"]
        assert digest(registry, "b") == changed.digest
    assert live(registry) == {"a": 1, "b": 2}
    assert server.scan().errors == {}


def test_a_link_that_leads_nowhere_for_now_is_reported_and_not_retired(home: Home, tmp_path: Path) -> None:
    home.drop("a", 1)
    os.rename(home.prompts / "a", tmp_path / "elsewhere")
    (home.prompts / "a").symlink_to(tmp_path / "elsewhere")
    (home.prompts / "loop").symlink_to("loop")
    server = home.server()
    server.scan()
    os.rename(tmp_path / "elsewhere", tmp_path / "away")
    server.scan()
    registry = server.scan()
    assert live(registry) == {"a": 1}
    assert "No such file" in registry.errors["a"]
    assert "symbolic links" in registry.errors["loop"]
    os.rename(tmp_path / "away", tmp_path / "elsewhere")
    assert "a" not in server.scan().errors
    assert home.num_events == 1


def test_a_bug_in_reading_one_entry_does_not_keep_the_others_from_being_served(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        home.drop(name, 1)

    def fail(path: Path, *args: object) -> list[SoftPrompt]:
        if path.name == "a":
            raise ZeroDivisionError("oops")
        return formats.load_soft_prompts(path, home.model, 32)

    monkeypatch.setattr(inbox_module, "load_soft_prompts", fail)
    server = home.server()
    server.scan()
    registry = server.scan()
    assert live(registry) == {"b": 1}
    assert "oops" in registry.errors["a"]
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize("error", [StoreError, ServerDraining])
def test_an_error_that_is_not_the_entrys_fault_is_tried_again_and_logged_once(
    home: Home, caplog: pytest.LogCaptureFixture, error: type[StoreError | ServerDraining]
) -> None:
    home.drop("a", 1)
    server = home.server()
    attempts: list[str] = []

    def refuse(soft_prompt: SoftPrompt) -> None:
        attempts.append(soft_prompt.digest)
        raise error(f"Not now, {len(attempts)}.")

    server.engine.on_warm = refuse
    for _ in range(3):
        server.scan()
    assert len(attempts) == 3
    assert len(caplog.records) == 1
    assert "Not now, 3" in server.registry.errors["a"]
    server.engine.on_warm = lambda soft_prompt: None
    assert live(server.scan()) == {"a": 1}
    assert server.registry.errors == {}


def test_what_the_engine_cannot_use_is_tried_once(home: Home) -> None:
    home.drop("a", 1)
    server = home.server()
    attempts: list[str] = []

    def refuse(soft_prompt: SoftPrompt) -> None:
        attempts.append(soft_prompt.digest)
        raise InvalidSoftPrompt("It is not finite.")

    server.engine.on_warm = refuse
    server.scan()
    server.scan()
    assert len(attempts) == 1
    assert "not finite" in server.registry.errors["a"]


def test_an_entry_that_is_written_to_while_it_is_read_is_read_again(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.drop("a", 1)
    server = home.server()
    changed: list[SoftPrompt] = []

    def load(path: Path, *args: object) -> list[SoftPrompt]:
        found = formats.load_soft_prompts(path, home.model, 32)
        if not changed:
            changed.append(home.drop("a", 2))
        return found

    monkeypatch.setattr(inbox_module, "load_soft_prompts", load)
    assert live(server.scan()) == {}
    assert digest(server.scan(), "a") == changed[0].digest
    assert home.num_events == 1


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


# What is removed.


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


# An inbox that is not there.


def test_an_inbox_that_is_not_there_is_empty_until_it_is(home: Home) -> None:
    home.prompts.rmdir()
    server = home.server()
    assert server.scan().tasks() == []
    home.drop("a", 1)
    assert live(server.scan()) == {"a": 1}


@pytest.mark.parametrize("leaves_a_mount_point", [False, True])
def test_an_inbox_that_is_unmounted_retires_nothing(home: Home, tmp_path: Path, leaves_a_mount_point: bool) -> None:
    for name in ("a", "b"):
        home.drop(name, 1)
    server = home.server()
    server.scan()
    os.rename(home.prompts, tmp_path / "device")
    if leaves_a_mount_point:
        home.prompts.mkdir()
    server.scan()
    assert live(server.scan()) == {"a": 1, "b": 1}
    assert live(home.restart()) == {"a": 1, "b": 1}, "nor does a server that starts before the device is there"
    if leaves_a_mount_point:
        home.prompts.rmdir()
    os.rename(tmp_path / "device", home.prompts)
    home.remove("a")
    assert live(server.scan()) == {"b": 1}
    assert home.num_events == 3


def test_what_was_removed_from_an_inbox_that_is_mounted_late_is_retired_then(home: Home, tmp_path: Path) -> None:
    for name in ("a", "b"):
        home.drop(name, 1)
    home.restart()
    os.rename(home.prompts, tmp_path / "device")
    shutil.rmtree(tmp_path / "device" / "a")
    server = home.server()
    assert live(server.scan()) == {"a": 1, "b": 1}
    os.rename(tmp_path / "device", home.prompts)
    assert live(server.scan()) == {"b": 1}


# On its thread.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is written at once, so that nobody need wait until it is whole."""
    monkeypatch.setattr(inbox_module, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(inbox_module, "LOOK_SECONDS", 0.5)


def test_a_directory_that_is_copied_in_is_served_within_two_seconds_or_so(home: Home) -> None:
    home.drop("a", 1)
    with home.server().watching() as registry:
        copied = home.drop(".aside", 2)
        began = time.monotonic()
        shutil.copytree(home.prompts / ".aside", home.prompts / "b", copy_function=shutil.copy2)
        wait_until(is_served(registry, "b", copied), PATIENCE)
        assert time.monotonic() - began < 4, "two seconds, and as much again for a busy machine"
        changed = home.drop("b", 3)
        wait_until(is_served(registry, "b", changed), PATIENCE)
        home.remove("a")
        wait_until(lambda: "a" not in live(registry), PATIENCE)
    assert live(registry) == {"b": 2}


def test_a_half_copied_directory_waits_until_it_is_whole(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "SETTLE_SECONDS", 1.0)
    source = home.drop(".aside", 1)
    data = (home.prompts / ".aside" / TENSORS).read_bytes()
    with home.server().watching() as registry:
        (home.prompts / "a").mkdir()
        shutil.copy(home.prompts / ".aside" / CONFIG, home.prompts / "a")
        partial = home.prompts / "a" / f".{TENSORS}.X1y2Z3"  # as rsync does
        with partial.open("wb") as file:
            for start in range(0, len(data), len(data) // 8 + 1):
                file.write(data[start : start + len(data) // 8 + 1])
                file.flush()
                time.sleep(0.2)
        os.utime(partial, (1, 1))
        os.rename(partial, home.prompts / "a" / TENSORS)
        assert registry.errors == {}, "nobody asked for a half-copied one"
        wait_until(is_served(registry, "a", source), PATIENCE)
        assert registry.errors == {}
    assert live(registry) == {"a": 1}


def test_replacing_a_directory_does_not_retire_it_in_between(home: Home) -> None:
    home.drop("a", 1)
    changed = home.drop(".aside", 2)
    server = home.server()
    with server.watching() as registry:
        home.remove("a")
        wait_until(lambda: isinstance(server.inbox._entries["a"].state, Missing), PATIENCE)
        shutil.copytree(home.prompts / ".aside", home.prompts / "a")
        wait_until(is_served(registry, "a", changed), PATIENCE)
    assert live(registry) == {"a": 2}
    assert home.num_events == 2, "published twice, never retired"


def test_a_deleted_task_comes_back_if_its_directory_is_replaced_at_once(home: Home) -> None:
    soft_prompt = home.drop("a", 1)
    with home.server().watching() as registry:
        time.sleep(0.5)  # until the directory is watched
        registry.delete("a")
        os.rename(home.prompts / "a", home.prompts / ".aside")
        os.rename(home.prompts / ".aside", home.prompts / "a")
        wait_until(is_served(registry, "a", soft_prompt), PATIENCE)


def raise_error() -> Iterator[set[object]]:
    raise OSError(28, "OS file watch limit reached")


def tell_nothing() -> Iterator[set[object]]:
    while True:
        time.sleep(0.05)
        yield set()


def end_at_once() -> Iterator[set[object]]:
    return iter(())


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("watch", [raise_error, tell_nothing, end_at_once])
def test_a_file_system_that_tells_nothing_is_polled(
    home: Home, monkeypatch: pytest.MonkeyPatch, watch: Callable[..., Iterator[set[object]]]
) -> None:
    calls: list[object] = []

    def count(*paths: object, **options: object) -> Iterator[set[object]]:
        calls.append(paths)
        return watch()

    monkeypatch.setattr(folder_module, "watch", count)
    with home.server().watching() as registry:
        added = home.drop("a", 1)
        wait_until(is_served(registry, "a", added), PATIENCE)
        changed = home.drop("a", 2)
        wait_until(is_served(registry, "a", changed), PATIENCE)
        home.remove("a")
        wait_until(lambda: live(registry) == {}, PATIENCE)
    assert len(calls) <= 3, "once for each new set of entries"


def test_what_the_file_system_tells_is_enough(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "LOOK_SECONDS", 1000.0)
    monkeypatch.setattr(inbox_module, "SETTLE_SECONDS", 0.1)
    with home.server().watching() as registry:
        for name in ("a", "b"):
            added = home.drop(name, 1)
            wait_until(is_served(registry, name, added), PATIENCE)
            time.sleep(0.5)  # until the new directory is watched
            changed = home.drop(name, 2)
            wait_until(is_served(registry, name, changed), PATIENCE)


@pytest.mark.usefixtures("impatient")
def test_an_inbox_that_appears_later_is_watched(home: Home) -> None:
    home.prompts.rmdir()
    with home.server().watching() as registry:
        time.sleep(0.3)
        soft_prompt = home.drop("a", 1)
        wait_until(is_served(registry, "a", soft_prompt), PATIENCE)


@pytest.mark.usefixtures("impatient")
def test_names_that_are_not_text_do_not_end_the_watch(home: Home) -> None:
    with home.server().watching() as registry:
        os.makedirs(os.fsencode(home.prompts) + b"/bad\xff")  # noqa: PTH103
        soft_prompt = home.drop("a", 1)
        wait_until(is_served(registry, "a", soft_prompt), PATIENCE)
        (home.prompts / "a" / os.fsdecode(b"bad\xff")).write_text("")
        changed = home.drop("a", 2)
        wait_until(is_served(registry, "a", changed), PATIENCE)


@pytest.mark.usefixtures("impatient")
def test_stopping_does_not_wait_for_a_publish_that_waits_for_the_engine(home: Home) -> None:
    server = home.server()
    let_go, is_waiting = threading.Event(), threading.Event()

    def hang(soft_prompt: SoftPrompt) -> None:
        is_waiting.set()
        assert let_go.wait(PATIENCE)

    server.engine.on_warm = hang
    with server.watching() as registry:
        home.drop("a", 1)
        home.drop("b", 1)
        assert is_waiting.wait(PATIENCE)
        began = time.monotonic()
        server.inbox.stop()
        assert time.monotonic() - began < 2, "one second, and as much again for a busy machine"
        let_go.set()
    assert list(live(registry)) == ["a"], "nothing is begun after the stop"


def test_stopping_at_rest_is_prompt(home: Home) -> None:
    server = home.server()
    with server.watching():
        time.sleep(0.1)
        began = time.monotonic()
        server.inbox.stop()
        assert not server.inbox._thread.is_alive()
        assert time.monotonic() - began < 0.7


def test_an_inbox_that_never_started_can_be_stopped(home: Home) -> None:
    home.server().inbox.stop()


@pytest.mark.usefixtures("impatient")
def test_a_bug_does_not_end_the_thread_nor_flood_the_log(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inbox_module, "BUG_SECONDS", 1.5)
    server = home.server()
    fail = threading.Event()
    entries = server.inbox._folder.entries

    def maybe_fail(*, anew: bool) -> list[str] | None:
        if fail.is_set():
            raise ZeroDivisionError("oops")
        return entries(anew=anew)

    monkeypatch.setattr(server.inbox._folder, "entries", maybe_fail)
    with caplog.at_level(logging.ERROR), server.watching() as registry:
        fail.set()
        wait_until(lambda: bool(caplog.records), PATIENCE)
        time.sleep(0.5)  # two wake-ups and more
        fail.clear()
        soft_prompt = home.drop("a", 1)
        wait_until(is_served(registry, "a", soft_prompt), PATIENCE)
    assert len(caplog.records) == 1


def test_the_store_that_lies_in_the_inbox_wakes_nobody(home: Home) -> None:
    events = home.prompts / ".store" / "events"
    events.mkdir(parents=True)
    home.drop("a", 1)
    server = home.server()
    server.scan()
    seen: list[dict[str, bool]] = []
    stop = threading.Event()
    for changes in server.inbox._folder.wake_ups(stop):
        (events / f"{len(seen)}.json").write_text("{}")
        seen.append(changes)
        if len(seen) == 4:
            (home.prompts / "a" / CONFIG).touch()  # the watch works
        if changes.get("a") is not None or len(seen) == 50:
            stop.set()
    assert set().union(*seen) == {"a"}


def test_looking_at_every_file_is_done_less_often_the_longer_it_takes(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(inbox_module, "LOOK_SHARE", 1e-9)
    home.drop("a", 1)
    server = home.server()
    looks: list[str] = []
    signature = server.inbox._folder.signature

    def look(name: str) -> Signature:
        looks.append(name)
        return signature(name)

    monkeypatch.setattr(server.inbox._folder, "signature", look)
    with server.watching():
        time.sleep(1)
    assert len(looks) <= 3, "to read it, to check that nobody wrote meanwhile, and when the watch began"


def test_many_entries_at_rest_cost_next_to_nothing(home: Home) -> None:
    home.drop("a0", 1)
    for number in range(1, 150):
        shutil.copytree(home.prompts / "a0", home.prompts / f"a{number}")
    server = home.server()
    with server.watching() as registry:
        assert len(live(registry)) == 150
        time.sleep(0.5)
        before = seconds_of(server.inbox._thread)
        time.sleep(1)
        spent = seconds_of(server.inbox._thread) - before
    assert spent < 0.1, "a tenth of a core at most, of which it takes a fiftieth"


def seconds_of(thread: threading.Thread) -> float:
    """What a thread has had of a core."""
    return next(t.user_time + t.system_time for t in psutil.Process().threads() if t.id == thread.native_id)
