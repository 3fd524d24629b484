from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from server.errors import InvalidSoftPrompt, UnknownTask
from server.registry import commands as plans
from server.registry import registry as registry_module
from server.registry.events import Activate, Event
from server.registry.store import Store
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.registry.fakes import with_engine
from tests.registry.shelf import Shelf, content, put, serving, snapshot
from tests.registry.test_refusals import is_tidy


def test_what_goes_live_elsewhere_is_wanted_while_it_is_warmed_and_in_memory_after(shelf: Shelf) -> None:
    first, second = shelf.open(), shelf.open()
    engine, wanted = with_engine(second), list[bool]()
    engine.on_warm = lambda soft_prompt: wanted.append(second.is_referenced(soft_prompt.prefix_hash))
    put(first, "a", content(1))
    second.sync()
    assert wanted == [True], "else the engine would drop it as soon as it is warm"
    assert engine.dropped == []
    assert second.cached(second.resolve("a")) is not None
    assert is_tidy(second)


def test_only_what_answers_in_the_end_is_warmed(shelf: Shelf) -> None:
    first, second = shelf.open(), shelf.open()
    engine = with_engine(second)
    put(first, "a", content(1))
    put(first, "a", content(2))
    for seed in (3, 4):
        first.publish("b", [content(seed)], "api", activate=False)
    first.activate("b", 2)
    put(first, "c", content(5))
    first.delete("c")
    put(first, "d", content(6))
    put(first, "d", content(7))
    first.roll_back("d")
    second.sync()
    assert sorted(engine.warmed) == sorted(content(seed).prefix_hash for seed in (2, 4, 6))
    engine.warmed.clear()
    first.set_traffic("a", {1: 10, 2: 90})
    second.sync()
    assert engine.warmed == [content(1).prefix_hash], "the other answers already"


def test_what_cannot_be_warmed_is_live_all_the_same_and_reported_if_it_cannot_be_read(shelf: Shelf) -> None:
    first, second = shelf.open(), shelf.open()
    engine = with_engine(second)

    def refuse(soft_prompt: SoftPrompt) -> None:
        raise InvalidSoftPrompt("Not finite here.")

    engine.on_warm = refuse
    put(first, "a", content(1))
    put(first, "b", content(2))
    shelf.damage(content(2))
    second.sync()
    assert snapshot(second) == snapshot(first), "another server has acknowledged it"
    assert list(second.errors) == ["b"]


def test_an_event_that_does_not_follow_is_reported_and_changes_nothing(shelf: Shelf) -> None:
    first, second = shelf.open(), shelf.open()
    put(first, "a", content(1))
    put(first, "b", content(2))
    Store(shelf.objects).append(Event(3, "now", "api", None, Activate("a", 9)))
    for _ in range(2):
        second.sync()
        assert snapshot(second) == snapshot(first)
        assert "event 3" in second.errors["a"]
    opened = shelf.open()
    assert snapshot(opened) == snapshot(first)
    assert "event 3" in opened.errors["a"]
    put(opened, "b", content(3))


def test_what_another_server_deleted_is_in_no_memory(shelf: Shelf) -> None:
    first, second = shelf.open(), shelf.open()
    engine = with_engine(second)
    for task, seed in (("a", 1), ("a", 2), ("b", 2)):
        put(first, task, content(seed))
    second.sync()
    assert serving(second, "a@1")
    first.delete("a")
    second.sync()
    assert content(1).digest not in second.host
    assert content(2).digest in second.host
    assert engine.dropped == [content(1).prefix_hash]
    with pytest.raises(UnknownTask):
        second.resolve("a")
    assert is_tidy(second)


def test_a_prefix_that_a_publish_is_about_to_need_survives_a_delete(shelf: Shelf) -> None:
    registry, other = shelf.open(), shelf.open()
    engine = with_engine(registry)
    put(registry, "a", content(1))

    def meanwhile(key: str) -> None:
        if key.startswith("blobs/"):
            shelf.objects.before_create = lambda key: None
            other.delete("a")
            registry.sync()

    shelf.objects.before_create = meanwhile
    registry.publish("b", [content(1)], "api")
    assert engine.dropped == []
    registry.delete("b")
    assert engine.dropped == [content(1).prefix_hash]


def test_a_content_that_hangs_while_it_is_warmed_does_not_hide_later_changes(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "WARM_SECONDS", 0.2)
    first, second = shelf.open(), shelf.open()
    engine, door = with_engine(second), threading.Event()

    def wait(soft_prompt: SoftPrompt) -> None:
        if soft_prompt.digest == content(1).digest:
            assert door.wait(20)

    put(first, "b", content(2))
    second.sync()
    engine.on_warm = wait
    put(first, "a", content(1))
    put(first, "c", content(3))
    first.delete("b")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(second.sync).result(5)
        assert snapshot(second) == snapshot(first)
        assert content(3).prefix_hash in engine.warmed, "it did not have to wait for the other"
        door.set()
    assert serving(second, "a").digest == content(1).digest
    assert is_tidy(second)


def test_a_bug_while_warming_does_not_hide_changes(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    first, second = shelf.open(), shelf.open()
    engine = with_engine(second)

    def fail(soft_prompt: SoftPrompt) -> None:
        if soft_prompt.digest == content(1).digest:
            raise ZeroDivisionError("oops")

    engine.on_warm = fail
    for number in range(10):
        put(first, f"t{number}", content(number))
    second.sync()
    assert snapshot(second) == snapshot(first)
    assert len(engine.warmed) == 9
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_many_changes_are_taken_over_bit_by_bit(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "EVENTS_AT_ONCE", 8)
    first, second = shelf.open(), shelf.open()
    engine, seen = with_engine(second), list[int]()
    engine.on_warm = lambda soft_prompt: seen.append(len(second.tasks()))
    for number in range(40):
        put(first, f"t{number}", content(number))
    second.sync()
    assert snapshot(second) == snapshot(first)
    assert sorted(set(seen)) == [0, 8, 16, 24, 32], "else all their tensors would have to be held at once"
    shelf.objects.reads.clear()
    second.sync()
    assert sum(shelf.objects.reads.values()) == 1


def test_what_was_taken_over_meanwhile_is_not_warmed_any_more(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    first, second = shelf.open(), shelf.open()
    engine = with_engine(second)
    put(first, "a", content(1))
    get = shelf.objects.get

    def take_over_and_delete(key: str) -> bytes | None:
        found = get(key)
        if key == "events/000000000002.json" and found is None:  # the sync has read event 1
            shelf.objects.get = get  # type: ignore[method-assign]
            with second._changing:
                second._apply(second._store.events_after(0))
            second._change(lambda: plans.delete(second._state, "a", None), "api", None)
        return found

    shelf.objects.get = take_over_and_delete  # type: ignore[method-assign]
    second.sync()
    assert engine.warmed == []
    assert caplog.records == [], "nobody looked for its blob"
    assert snapshot(second) == {}
    assert is_tidy(second)


def test_many_who_look_at_once_warm_once(shelf: Shelf) -> None:
    first, second = shelf.open(), shelf.open()
    engine, door = with_engine(second), threading.Event()

    def wait(soft_prompt: SoftPrompt) -> None:
        assert door.wait(10)

    engine.on_warm = wait
    put(first, "a", content(1))
    with ThreadPoolExecutor(4) as pool:
        looking = [pool.submit(second.sync) for _ in range(4)]
        time.sleep(0.1)
        door.set()
        for future in looking:
            future.result(10)
    assert engine.warmed == [content(1).prefix_hash]


def test_no_reader_waits_for_a_change_that_waits_for_the_store(shelf: Shelf) -> None:
    registry, door, entered = shelf.open(), threading.Event(), threading.Event()
    with_engine(registry)
    put(registry, "a", content(1))
    put(registry, "b", content(2))
    registry.host.drop(content(2).digest)

    def hang(key: str) -> None:
        entered.set()
        assert door.wait(20)

    def read() -> None:
        assert registry.cached(registry.resolve("a")) is not None
        assert serving(registry, "b").digest == content(2).digest
        assert [task.name for task in registry.tasks()] == ["a", "b"]
        assert registry.task("a").traffic == ((1, 100),)
        assert registry.is_referenced(content(1).prefix_hash)
        assert registry.errors == {}
        registry.report("entry", None)
        for reference in ("c", "a@9"):
            with pytest.raises(UnknownTask):
                registry.resolve(reference)

    shelf.objects.before_create = hang
    with ThreadPoolExecutor(3) as pool:
        changes: list[Future[object]] = [
            pool.submit(registry.delete, "a"),
            pool.submit(registry.set_traffic, "b", {1: 100}),
        ]
        assert entered.wait(10)
        try:
            pool.submit(read).result(10)
        finally:
            door.set()
        for change in changes:
            change.result(10)
    with pytest.raises(UnknownTask):
        registry.resolve("a")
