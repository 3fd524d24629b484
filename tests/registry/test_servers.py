"""Several servers on one store: each decides on what is so in the store, however old its own view is."""

from __future__ import annotations

import datetime
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from server.errors import NothingToRollBackTo, PreludeError
from server.registry.events import VersionContent
from server.registry.registry import Registry
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.registry.fakes import with_engine
from tests.registry.shelf import Shelf, content, identity, put, serving, snapshot
from tests.registry.test_refusals import is_tidy, named_blobs

# A view that is old


def test_what_was_live_once_is_not_taken_for_live(shelf: Shelf) -> None:
    first, second = shelf.open(), shelf.open()
    put(first, "a", content(1))
    second.sync()
    put(first, "a", content(2))
    assert put(second, "a", content(1)) == (3, True), "not the no-op that its old view suggests"
    put(first, "a", content(4))
    assert second.activate("a", 3).traffic == ((3, 100),)
    first.sync()
    assert snapshot(first) == snapshot(second) == snapshot(shelf.open())


def test_a_change_finds_what_another_server_has_just_made(shelf: Shelf) -> None:
    first, second = shelf.open(), shelf.open()
    for seed in (1, 2, 3):
        put(first, "a", content(seed))
    assert second.roll_back("a").traffic == ((2, 100),)
    put(first, "b", content(1))
    first.publish("b", [content(2)], "api", activate=False)
    assert second.set_traffic("b", {1: 50, 2: 50}).traffic == ((1, 50), (2, 50))
    first.publish("c", [content(3)], "inbox")
    assert second.retire({"c": identity(content(3))}) == ("c",)
    assert second.task("c").traffic == ()
    put(first, "d", content(4))
    second.delete("d")
    put(first, "e", content(4))
    put(first, "e", content(5))
    second.delete_version("e", 1)
    with pytest.raises(NothingToRollBackTo):
        first.roll_back("e")
    first.sync()
    assert snapshot(first) == snapshot(second) == snapshot(shelf.open())


def test_changes_are_counted_on_every_server_since_its_own_start(shelf: Shelf) -> None:
    first, second = shelf.open(), shelf.open()
    put(first, "a", content(1))
    put(second, "a", content(2))
    second.roll_back("a")
    late = shelf.open()
    first.delete("a")
    late.sync()
    assert first.changes == {"publish": 2, "rollback": 1, "delete": 1}
    assert (late.changes, second.changes) == ({"delete": 1}, {"publish": 2, "rollback": 1})


def test_who_answers_a_task_can_be_asked_of_any_name(shelf: Shelf) -> None:
    registry = shelf.open()
    put(registry, "a", content(1))
    put(registry, "a", content(2))
    registry.publish("b", [content(1)], "api", activate=False)
    asked = [registry.answering(name) for name in ("a", "b", "c", "A b")]
    assert asked == [frozenset({2}), frozenset(), None, None]
    registry.set_traffic("a", {1: 50, 2: 50})
    assert registry.answering("a") == frozenset({1, 2})
    registry.delete("a")
    assert (registry.answering("a"), registry.num_tasks) == (None, 1)


def test_a_condition_that_another_server_told_the_client_holds(shelf: Shelf) -> None:
    first, second = shelf.open(), shelf.open()
    put(first, "a", content(1))
    etag = first.publish("a", [content(2)], "api").etag
    assert second.publish("a", [content(3)], "api", expected=etag).etag == etag + 1


def test_the_etag_of_a_publish_is_its_own_events(shelf: Shelf) -> None:
    registry = shelf.open()
    put(registry, "b", content(1))
    published = registry.publish("a", [content(1)], "api")
    assert published.etag == registry.task("a").etag == 2
    assert registry.publish("a", [content(1)], "api").etag == 2
    assert registry.publish("a", [content(2)], "api", dry_run=True).etag == 2
    assert registry.publish("c", [content(2)], "api", dry_run=True).etag == 0


def test_a_publisher_who_lost_to_the_same_content_has_nothing_left_to_do(shelf: Shelf) -> None:
    first, second = shelf.open(), shelf.open()

    def meanwhile(key: str) -> None:
        if key.startswith("events/"):
            shelf.objects.before_create = lambda key: None
            put(first, "a", content(1))

    shelf.objects.before_create = meanwhile
    published = second.publish("a", [content(1)], "api")
    assert (published.created, published.live, published.tasks[0].version) == (False, True, 1)
    assert published.etag == first.task("a").etag
    assert set(shelf.objects.blobs()) == named_blobs(second), "the blob that was not needed is removed"
    assert snapshot(first) == snapshot(second)


# Inboxes


def test_a_retire_that_another_server_was_faster_than_takes_nothing_from_it(shelf: Shelf) -> None:
    for place in ("one:/prompts", "two:/prompts", "one:/other"):  # a container's new name, and another directory
        for is_late in (False, True):
            first, second, task = shelf.open(), shelf.open(), f"a{shelf.num_events()}"
            first.publish(task, [content(1)], "inbox", by="one:/prompts")

            def meanwhile(second: Registry = second, task: str = task, place: str = place) -> None:
                second.publish(task, [content(2)], "inbox", by=place)

            def before(key: str, meanwhile: Callable[[], None] = meanwhile) -> None:
                if key.startswith("events/"):
                    shelf.objects.before_create = lambda key: None
                    meanwhile()

            if is_late:
                shelf.objects.before_create = before
            else:
                meanwhile()
            first.retire({task: identity(content(1))}, by="one:/prompts")
            for registry in (first, second, shelf.open()):
                registry.sync()
                assert serving(registry, task).digest == content(2).digest, (place, is_late)


def test_what_two_inboxes_hold_answers_until_neither_does(shelf: Shelf) -> None:
    first, second = shelf.open(), shelf.open()
    tasks = {"a": identity(content(1))}
    first.publish("a", [content(1)], "inbox", by="one:/prompts")
    assert not second.is_from_inbox("a", content(1), "two:/other")
    marked = second.publish("a", [content(1)], "inbox", by="two:/other")
    assert (marked.created, marked.tasks[0].version) == (False, 1)
    assert first.retire(tasks, by="one:/prompts") == ("a",)
    assert first.task("a").traffic == ((1, 100),)
    assert first.retire(tasks, by="one:/prompts") == ()
    assert second.retire(tasks, by="two:/other") == ("a",)
    assert second.task("a").traffic == ()


# The same at the same moment


def test_two_servers_that_go_back_in_the_same_millisecond_go_back_twice(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedClock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> StoppedClock:
            return cls(2026, 1, 1, tzinfo=tz)

    first, second = shelf.open(), shelf.open()
    for seed in (1, 2, 3):
        put(first, "a", content(seed))
    monkeypatch.setattr(datetime, "datetime", StoppedClock)

    def meanwhile(key: str) -> None:
        shelf.objects.before_create = lambda key: None
        first.roll_back("a")

    shelf.objects.before_create = meanwhile
    assert second.roll_back("a").traffic == ((1, 100),)
    assert snapshot(shelf.open()) == snapshot(second)


@pytest.mark.parametrize("change", ["activate", "traffic", "roll back"])
def test_a_change_answers_what_it_led_to_and_not_what_came_after(shelf: Shelf, change: str) -> None:
    registry = shelf.open()
    for seed in (1, 2):
        put(registry, "a", content(seed))
    wishes = {
        "activate": partial(registry.activate, "a", 1),
        "traffic": partial(registry.set_traffic, "a", {1: 100}),
        "roll back": partial(registry.roll_back, "a"),
    }
    remove_blobs = registry._store.remove_blobs

    def delete_at_once(contents: Iterable[VersionContent]) -> None:
        registry._store.remove_blobs = remove_blobs  # type: ignore[method-assign]
        remove_blobs(contents)
        registry.delete("a")

    registry._store.remove_blobs = delete_at_once  # type: ignore[method-assign]
    task = wishes[change]()
    assert (task.traffic, task.etag) == (((1, 100),), 3), "an ETag of what came later would let it be overwritten"
    assert registry.tasks() == []


# Everything at once


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Let threads take turns a thousand times as often as usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty_threads")
def test_a_crowd_on_two_servers_gets_answers_or_documented_errors_and_leaves_all_tidy(shelf: Shelf) -> None:
    registries = [shelf.open(), shelf.open()]
    for registry in registries:
        with_engine(registry)
    contents = [content(seed) for seed in range(3)]
    end = time.monotonic() + 2

    def change(seed: int) -> None:
        dice = random.Random(seed)
        while time.monotonic() < end:
            registry, task, version = dice.choice(registries), dice.choice("ab"), dice.randint(1, 40)
            wishes: list[Callable[[], object]] = [
                partial(registry.publish, task, [dice.choice(contents)], "api"),
                partial(registry.publish, task, [dice.choice(contents)], "api", expected="any"),
                partial(registry.publish, task, [contents[0]], "inbox"),
                partial(registry.activate, task, version),
                partial(registry.roll_back, task),
                partial(registry.delete, task),
                partial(registry.delete_version, task, version),
                partial(registry.set_traffic, task, {version: 50, version + 1: 50}),
                partial(registry.retire, {task: identity(contents[0])}),
                registry.sync,
            ]
            try:
                dice.choice(wishes)()
            except PreludeError:
                continue

    def look(seed: int) -> None:
        dice = random.Random(seed)
        while time.monotonic() < end:
            registry, task = dice.choice(registries), dice.choice("ab")
            assert set(registry.errors) <= {"a", "b"}
            assert all(seen.live is None or seen.live.number in seen.versions for seen in registry.tasks())
            registry.is_from_inbox(task, contents[0])
            registry.from_inbox("somewhere")
            registry.is_referenced(contents[0].prefix_hash)
            try:
                assert registry.fetch(registry.resolve(task, str(seed))).result().digest
            except PreludeError:
                continue

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(change if seed % 4 else look, seed) for seed in range(8)]:
            future.result()
    for registry in registries:
        registry.sync()
        assert is_tidy(registry)
        assert snapshot(registry) == snapshot(shelf.open())
    assert set(shelf.objects.blobs()) == named_blobs(registries[0])
    assert shelf.num_events() > 20


def test_a_publish_that_waits_for_the_engine_holds_up_no_other_change(shelf: Shelf) -> None:
    registry = shelf.open()
    engine, door, entered = with_engine(registry), threading.Event(), threading.Event()

    def wait(soft_prompt: SoftPrompt) -> None:
        if soft_prompt.digest == content(1).digest:
            entered.set()
            assert door.wait(10)

    engine.on_warm = wait
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(registry.publish, "a", [content(1)], "api")
        assert entered.wait(10)
        put(registry, "b", content(2))
        registry.delete("b")
        door.set()
        assert slow.result(10).created
