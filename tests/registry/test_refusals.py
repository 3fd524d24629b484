"""A store that refuses at any moment, or does and does not say so: nothing is lost, and nothing happens twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from server.errors import PreconditionFailed, StoreError, StoreFull, UnknownTask, VersionUnavailable
from server.registry.registry import Registry
from server.registry.state import RegistryState
from tests.registry.fakes import NotingEngine
from tests.registry.shelf import Shelf, content, identity, put, serving, snapshot

CHANGES: dict[str, Callable[[Registry], object]] = {
    "publish": lambda registry: registry.publish("a", [content(9)], "api"),
    "publish rows": lambda registry: registry.publish("m", [content(8), content(9)], "api"),
    "stage": lambda registry: registry.publish("a", [content(9)], "api", activate=False),
    "mark": lambda registry: registry.publish("b", [content(1)], "inbox"),
    "activate": lambda registry: registry.activate("a", 1),
    "traffic": lambda registry: registry.set_traffic("a", {1: 90, 3: 10}),
    "roll back": lambda registry: registry.roll_back("a"),
    "delete version": lambda registry: registry.delete_version("a", 2),
    "delete": lambda registry: registry.delete("a"),
    "retire": lambda registry: registry.retire({"a": identity(content(3))}),
}
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def furnished() -> Shelf:
    shelf = Shelf()
    registry = shelf.open()
    put(registry, "a", content(1))
    put(registry, "a", content(2))
    registry.publish("a", [content(3)], "inbox")
    put(registry, "b", content(1))
    return shelf


def refuse_call(shelf: Shelf, refused: int) -> list[str]:
    """Let the store refuse its n-th call from now on, and answer where the calls are noted."""
    calls: list[str] = []

    def fails(action: str, key: str) -> bool:
        calls.append(action)
        return len(calls) == refused

    shelf.objects.fails = fails
    return calls


def named_blobs(registry: Registry) -> set[str]:
    return {f"{version.content.blob}.safetensors" for task in registry.tasks() for version in task.versions.values()}


def is_tidy(registry: Registry) -> bool:
    """Whether the registry counts just what there is, and nothing is in memory without need."""
    contents = [version.content for task in registry.tasks() for version in task.versions.values()]
    counted = RegistryState()
    for task in registry.tasks():
        for version in task.versions.values():
            counted.count(version)
    return (
        registry._state.digests._tasks == counted.digests._tasks
        and registry._state.prefixes._tasks == counted.prefixes._tasks
        and not registry._held
        and set(registry.host._kept) <= {content.digest for content in contents}
        and not registry.host._loading
    )


@every_change
def test_whichever_call_the_store_refuses_the_change_is_made_or_not_and_can_be_made_later(
    change: Callable[[Registry], object],
) -> None:
    done = furnished()
    change(done.open())
    before, after = snapshot(furnished().open()), snapshot(done.open())
    for refused in range(1, 30):
        shelf = furnished()
        registry = shelf.open()  # with nothing in memory, so that all is read that can be
        calls = refuse_call(shelf, refused)
        try:
            change(registry)
            made = True
        except (StoreError, VersionUnavailable):  # the latter for what could not be read
            made = False
        shelf.objects.fails = lambda action, key: False
        wanted = after if made else before
        assert snapshot(registry) == snapshot(shelf.open()) == wanted, f"call {refused}: {calls[refused - 1 :][:1]}"
        if not made:
            change(registry)
        assert snapshot(registry) == snapshot(shelf.open()) == after
        assert named_blobs(registry) <= set(shelf.objects.blobs())
        assert shelf.num_events() == done.num_events()
        assert is_tidy(registry)
        for name, (traffic, _) in snapshot(registry).items():
            assert not traffic or serving(registry, name)
        assert registry.errors == {}
        if len(calls) < refused:  # there was nothing left to refuse
            break
    assert 2 < refused < 29


def lost_reply(shelf: Shelf, folder: str) -> None:
    """Let the store do what it is asked next in a folder, and fail to say so."""

    def loses(action: str, key: str) -> bool:
        lost = key.startswith(folder)
        if lost:
            shelf.objects.loses_reply = lambda action, key: False
        return lost

    shelf.objects.loses_reply = loses


@every_change
def test_an_event_whose_reply_was_lost_is_taken_over_later_and_not_doubled(
    change: Callable[[Registry], object],
) -> None:
    done = furnished()
    change(done.open())
    shelf = furnished()
    registry, other = shelf.open(), shelf.open()
    lost_reply(shelf, "events/")
    with pytest.raises(StoreError):
        change(registry)
    for taken in (registry, other):
        taken.sync()
        assert snapshot(taken) == snapshot(done.open())
        assert is_tidy(taken)
    assert shelf.num_events() == done.num_events()
    assert named_blobs(registry) <= set(shelf.objects.blobs()), "what may have an event keeps its blob"


def test_a_publish_that_is_sent_again_after_a_lost_reply_finds_itself() -> None:
    shelf = furnished()
    registry = shelf.open()
    lost_reply(shelf, "events/")
    with pytest.raises(StoreError):
        registry.publish("a", [content(9)], "api")
    again = registry.publish("a", [content(9)], "api")
    assert (again.created, again.live, again.tasks[0].version) == (False, True, 4)
    assert shelf.num_events() == 5
    assert shelf.digests().count(content(9).digest) == 1


def test_the_next_change_takes_over_an_event_whose_reply_was_lost() -> None:
    shelf = furnished()
    registry = shelf.open()
    lost_reply(shelf, "events/")
    with pytest.raises(StoreError):
        registry.publish("a", [content(9)], "api")
    assert put(registry, "a", content(10)) == (5, True)
    assert registry.roll_back("a").traffic == ((4, 100),)


def test_a_delete_that_leaves_a_blob_behind_is_a_delete() -> None:
    shelf = furnished()
    registry = shelf.open()
    shelf.objects.fails = lambda action, key: action == "delete"
    registry.delete("a")
    with pytest.raises(UnknownTask):
        registry.resolve("a")
    shelf.objects.fails = lambda action, key: False
    left = [name for name in shelf.objects.blobs() if name not in named_blobs(registry)]
    assert left
    reopened = shelf.open()
    assert snapshot(reopened) == snapshot(registry)
    assert set(shelf.objects.blobs()) == named_blobs(reopened), "the next start collects it"


def test_of_several_rows_those_before_the_refused_one_are_removed() -> None:
    shelf = furnished()
    blobs = shelf.digests()
    third = content(8).digest
    shelf.objects.fails = lambda action, key: action == "create" and third in key
    with pytest.raises(StoreError):
        shelf.open().publish("m", [content(6), content(7), content(8)], "api")
    assert shelf.digests() == blobs


def test_a_full_store_is_not_filled_further_by_what_it_refuses() -> None:
    shelf = furnished()
    registry = shelf.open()
    before = dict(shelf.objects.objects)

    def refuse(key: str) -> None:
        if key.startswith("events/"):
            raise StoreFull("No space left.")

    shelf.objects.before_create = refuse
    for _ in range(2):
        with pytest.raises(StoreFull):
            registry.publish("m", [content(8), content(9)], "api")
    assert shelf.objects.objects == before, "it promises that nothing has changed, so no event names the blobs"


def test_what_is_deleted_while_it_is_read_is_not_remembered_as_broken() -> None:
    shelf = furnished()
    registry = shelf.open()
    resolved = registry.resolve("a@1")
    fails = shelf.objects.fails

    def delete_and_fail(action: str, key: str) -> bool:
        if action == "get" and content(3).digest in key:
            shelf.objects.fails = fails
            registry.delete("a")
        return False

    resolved = registry.resolve("a@3")
    shelf.objects.fails = delete_and_fail
    with pytest.raises(VersionUnavailable):
        registry.fetch(resolved).result()
    assert registry._contents.broken == {}


def test_a_refusal_comes_before_the_work() -> None:
    shelf, engine = furnished(), NotingEngine()
    registry = shelf.open()
    registry.connect(engine)
    shelf.objects.reads.clear()
    for refused in (
        lambda: registry.activate("a", 1, expected=1),
        lambda: registry.set_traffic("a", {1: 90, 2: 10}, expected=1),
        lambda: registry.roll_back("a", expected=1),
        lambda: registry.publish("a", [content(9)], "api", expected=1),
    ):
        with pytest.raises(PreconditionFailed):
            refused()
    assert engine.warmed == []
    assert not any(key.startswith("blobs/") for key in shelf.objects.reads)


def test_a_store_that_says_taken_and_shows_nothing_is_an_error_and_no_endless_loop() -> None:
    shelf = furnished()
    registry = shelf.open()
    before = snapshot(registry)

    def steal(key: str) -> None:
        if key.startswith("events/"):
            shelf.objects.objects[key] = b""

    get = shelf.objects.get
    shelf.objects.before_create = steal
    shelf.objects.get = lambda key: None if key == "events/000000000005.json" else get(key)  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="does not show which event has its number"):
        registry.activate("a", 1)
    assert snapshot(registry) == before


def test_a_refused_warming_lets_go_of_what_it_held() -> None:
    shelf, engine = furnished(), NotingEngine()
    registry = shelf.open()
    registry.connect(engine)
    shelf.objects.fails = lambda action, key: action == "create"
    for _ in range(2):
        with pytest.raises(StoreError):
            registry.publish("m", [content(1), content(9)], "api")
    assert engine.dropped == [content(9).prefix_hash] * 2, "a version of another task has the other's numbers"
    assert is_tidy(registry)
