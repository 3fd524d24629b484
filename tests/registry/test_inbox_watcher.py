from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from server.registry import inbox as inbox_module
from server.registry import inbox_watcher as folder_module
from server.registry.inbox_entry import Missing
from server.registry.inbox_watcher import Signature
from server.registry.registry import Registry
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.api.live import wait_until
from tests.peft_files import CONFIG, TENSORS
from tests.registry.inbox import PATIENCE, Home, digest, live


def is_served(registry: Registry, task: str, soft_prompt: SoftPrompt) -> Callable[[], bool]:
    return lambda: digest(registry, task) == soft_prompt.digest


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
