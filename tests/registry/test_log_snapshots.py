"""Snapshots: the log becomes shorter, and nothing else changes, for any server, after any damage or end."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest

from server.errors import PreludeError, StoreError
from server.registry import log_snapshots as snapshots_module
from server.registry import store as store_module
from server.registry.log_snapshots import GRACE_SECONDS, decode, encode
from server.registry.objects import open_objects
from server.registry.registry import Registry
from server.registry.state import RegistryState
from server.registry.store import Store
from tests.registry.fakes import MemoryObjects
from tests.registry.shelf import SPEC, Shelf, content, put, serving, snapshot

EVERY = 10
KINDS = ("publish", "stage", "inbox", "activate", "traffic", "rollback", "version", "delete", "retire")


@pytest.fixture(autouse=True)
def _short_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SNAPSHOT_EVENTS", EVERY)
    monkeypatch.setattr(store_module, "RETRY_EVENTS", 2)
    monkeypatch.setattr(store_module, "PRUNE_SECONDS", 0.0)


def change(registry: Registry, dice: random.Random) -> None:
    """One change of any kind, or none."""
    task = dice.choice("abc")
    with suppress(PreludeError, ValueError):  # there are not enough versions
        match dice.choice(KINDS):
            case "publish" | "stage" as kind:
                registry.publish(task, [content(dice.randrange(99))], "api", activate=kind == "publish")
            case "inbox":
                registry.publish(task, [content(dice.randrange(9), note="x")], "inbox", by=f"host:{dice.choice('xy')}")
            case "activate":
                registry.activate(task, dice.choice(list(registry.task(task).versions)))
            case "traffic":
                one, other = dice.sample(list(registry.task(task).versions), 2)
                registry.set_traffic(task, {one: 30, other: 70})
            case "rollback":
                registry.roll_back(task)
            case "version":
                registry.delete_version(task, dice.choice(list(registry.task(task).versions)))
            case "delete" if dice.random() < 0.3:
                registry.delete(task)
            case "retire":
                place = f"host:{dice.choice('xy')}"
                registry.retire(registry.from_inbox(place), by=place)


def changed(shelf: Shelf, events: int, seed: int = 0) -> Registry:
    """A registry after so many events, compacted as a server does it."""
    registry, dice = shelf.open(), random.Random(seed)
    while shelf_events(shelf) < events:
        change(registry, dice)
        registry.compact()
    return registry


def shelf_events(shelf: Shelf) -> int:
    """Number of the last event."""
    names = shelf.objects.list("events")
    return int(names[-1].partition(".")[0]) if names else 0


def grow_old(objects: MemoryObjects) -> None:
    """Let all that is there have been there for long."""
    objects.ages = dict.fromkeys(objects.objects, GRACE_SECONDS + 1)


def ends_after(deletes: int) -> Callable[[str, str], bool]:
    """What refuses all deletes after so many."""
    left = iter(range(deletes))
    return lambda action, key: action == "delete" and next(left, None) is None


def same(one: Registry, other: Registry) -> bool:
    return one._state.tasks == other._state.tasks and snapshot(one) == snapshot(other)


@pytest.mark.parametrize("seed", range(5))
def test_a_snapshot_is_the_state_and_is_read_as_it_was_written(shelf: Shelf, seed: int) -> None:
    state = changed(shelf, 60, seed)._state
    again = decode(encode(state))
    assert again.tasks == state.tasks
    assert (again.last_event, again.first_version) == (state.last_event, state.first_version)
    assert (again.digests._tasks, again.prefixes._tasks) == (state.digests._tasks, state.prefixes._tasks)
    assert encode(again) == encode(state)


def test_a_start_reads_a_snapshot_and_the_events_after_it(shelf: Shelf) -> None:
    registry = changed(shelf, 3 * EVERY + 4)
    shelf.objects.reads.clear()
    opened = shelf.open()
    assert same(opened, registry)
    assert sum(shelf.objects.reads.values()) <= 1 + EVERY
    assert put(opened, "a", content(100))[1]


@pytest.mark.parametrize("seed", range(3))
def test_old_events_go_and_nothing_else_changes(shelf: Shelf, seed: int) -> None:
    registry = changed(shelf, 4 * EVERY + 4, seed)
    assert len(shelf.objects.list("events")) == shelf_events(shelf), "nothing is old yet"
    grow_old(shelf.objects)
    registry.compact()
    assert len(shelf.objects.list("snapshots")) == 2
    left = shelf.objects.list("events")
    assert len(left) <= 2 * EVERY + 4
    opened = shelf.open()
    assert same(opened, registry)
    for server in (opened, registry):
        assert put(server, "new", content(200 + seed + shelf_events(shelf)))[1]
    assert same(shelf.open(), registry)


def test_any_one_damaged_snapshot_loses_nothing(shelf: Shelf) -> None:
    registry = changed(shelf, 4 * EVERY + 4)
    grow_old(shelf.objects)
    registry.compact()
    for name in shelf.objects.list("snapshots"):
        whole = shelf.objects.objects[f"snapshots/{name}"]
        for damaged in (b"", whole[:-10], whole[:50], b"x" * 100, b"{}", encode(RegistryState())):
            shelf.objects.objects[f"snapshots/{name}"] = damaged
            assert same(shelf.open(), registry)
        shelf.objects.objects[f"snapshots/{name}"] = whole


def test_no_event_goes_while_a_snapshot_that_replaces_it_is_damaged(shelf: Shelf) -> None:
    registry = changed(shelf, 3 * EVERY + 4)
    grow_old(shelf.objects)
    for name in shelf.objects.list("snapshots")[-2:]:
        shelf.objects.objects[f"snapshots/{name}"] = b"damaged"
    registry.compact()
    assert len(shelf.objects.list("events")) == shelf_events(shelf)
    assert same(shelf.open(), registry)


def test_a_store_that_lost_both_does_not_open(shelf: Shelf) -> None:
    registry = changed(shelf, 4 * EVERY + 4)
    grow_old(shelf.objects)
    registry.compact()
    for name in shelf.objects.list("snapshots"):
        shelf.objects.delete(f"snapshots/{name}")
    with pytest.raises(StoreError, match="event 1 is missing"):
        shelf.open()


def test_a_copy_of_the_state_shares_every_task_that_does_not_change(shelf: Shelf) -> None:
    registry = shelf.open()
    for name in ("a", "b", "c", "d"):
        for seed in (1, 2):
            put(registry, name, content(seed))
    before = encode(registry._state)
    copy = registry._copy_state()
    assert all(copy.tasks[name] is task for name, task in registry._state.tasks.items()), "else it takes long for many"
    put(registry, "a", content(3))
    registry.set_traffic("b", {1: 50, 2: 50})
    registry.roll_back("c")
    registry.delete_version("c", 2)
    registry.delete("d")
    assert encode(copy) == before


def test_compacting_may_end_at_any_moment(shelf: Shelf) -> None:
    registry = changed(shelf, 4 * EVERY + 4)
    before = dict(shelf.objects.objects)
    for steps in range(3 * EVERY):
        shelf.objects.objects = dict(before)
        grow_old(shelf.objects)
        shelf.objects.fails = ends_after(steps)
        with suppress(StoreError):
            registry.compact()
        shelf.objects.fails = lambda action, key: False
        assert same(shelf.open(), registry)


def test_servers_that_compact_at_once_agree(shelf: Shelf) -> None:
    servers, dice = [shelf.open() for _ in range(3)], random.Random(1)
    for turn in range(200):
        change(servers[turn % 3], dice)
        if turn % 7 == 0:
            grow_old(shelf.objects)
        for server in servers:
            server.sync()
            server.compact()
    assert shelf_events(shelf) > 5 * EVERY
    assert len(shelf.objects.list("events")) < 4 * EVERY
    assert all(same(server, shelf.open()) for server in servers)


def test_a_server_that_slept_through_a_compaction_loads_anew_and_loses_no_change(shelf: Shelf) -> None:
    asleep = shelf.open()
    put(asleep, "mine", content(300))
    awake = changed(shelf, 5 * EVERY)
    grow_old(shelf.objects)
    awake.compact()
    assert "000000000002.json" not in shelf.objects.list("events")
    asleep._store._seen_at -= 8 * 24 * 3600
    with suppress(StoreError):
        asleep.sync()
    assert same(asleep, awake)
    put(asleep, "mine", content(301))
    awake.sync()
    assert serving(awake, "mine").digest == content(301).digest


def test_a_server_on_an_empty_store_that_slept_loads_anew(shelf: Shelf) -> None:
    asleep = shelf.open()
    awake = changed(shelf, 5 * EVERY)
    grow_old(shelf.objects)
    awake.compact()
    asleep._store._seen_at -= 8 * 24 * 3600
    put(asleep, "mine", content(301))
    awake.sync()
    assert serving(awake, "mine").digest == content(301).digest


def test_what_cannot_be_read_whole_never_becomes_a_snapshot(shelf: Shelf) -> None:
    registry = changed(shelf, EVERY // 2)
    shelf.objects.objects[f"events/{shelf_events(shelf) + 1:012d}.json"] = (
        b'{"change": {"kind": "freeze", "task": "a"}}'
    )
    registry.sync()
    for seed in range(3 * EVERY):
        put(registry, "b", content(400 + seed))
        registry.compact()
    assert shelf.objects.list("snapshots") == []


def test_a_store_that_refuses_a_snapshot_is_not_asked_at_every_event(shelf: Shelf) -> None:
    registry = changed(shelf, EVERY - 1)
    asked: list[str] = []

    def refuse(action: str, key: str) -> bool:
        if action == "create" and key.startswith("snapshots/"):
            asked.append(key)
            return True
        return False

    shelf.objects.fails = refuse
    for seed in range(20):
        put(registry, "b", content(500 + seed))
        with suppress(StoreError):
            registry.compact()
    assert 2 <= len(asked) <= 12
    shelf.objects.fails = lambda action, key: False
    for seed in range(4):
        put(registry, "b", content(600 + seed))
        registry.compact()
    assert len(shelf.objects.list("snapshots")) == 1


@pytest.mark.parametrize(("tasks_per_event", "written"), [(100, 3), (1, 1)])
def test_snapshots_of_many_tasks_are_rarer(
    tasks_per_event: int, written: int, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "TASKS_PER_EVENT", tasks_per_event)
    asked: list[str] = []

    def notes(action: str, key: str) -> bool:
        if action == "create" and key.startswith("snapshots/"):
            asked.append(key)
        return False

    shelf.objects.fails = notes
    registry = shelf.open()
    for number in range(3 * EVERY):
        put(registry, f"task-{number}", content(number))
        registry.compact()
    assert len(asked) == written


def test_a_snapshot_of_a_newer_prelude_is_passed_over(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = changed(shelf, 2 * EVERY + 1)
    monkeypatch.setattr(snapshots_module, "FORMAT", 2)
    newest = shelf.objects.list("snapshots")[-1]
    shelf.objects.objects[f"snapshots/{newest}"] = encode(registry._state.copy())
    monkeypatch.undo()
    assert same(shelf.open(), registry)


def test_manifests_are_written_once(shelf: Shelf) -> None:
    registry = Registry(Store(shelf.objects), SPEC, 32)
    manifest = content(1, training={"note": "".join(random.Random(0).choices("abcdefgh", k=5000))}).manifest
    rows = [replace(content(n), manifest=manifest, is_multitask_row=True) for n in range(50)]
    registry.publish("many", rows, "api")
    assert len(encode(registry._state)) < 20_000


def test_a_bucket_keeps_snapshots_too(s3_store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots_module, "GRACE_SECONDS", -1.0)
    registry, objects = Registry(Store(open_objects(s3_store_url)), SPEC, 32), open_objects(s3_store_url)
    for seed in range(3 * EVERY):
        put(registry, "a", content(seed))
        registry.compact()
    assert len(objects.list("snapshots")) == 2
    assert len(objects.list("events")) <= 2 * EVERY
    assert same(Registry(Store(objects), SPEC, 32), registry)
