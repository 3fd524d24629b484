"""The live map: durable before visible, never stale, numbers never used twice, nothing left of what was deleted."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.contracts import ModelSpec
from server.errors import (
    InvalidSoftPrompt,
    InvalidTaskName,
    NothingToRollBackTo,
    PreconditionFailed,
    StoreError,
    UnknownTask,
    VersionInUse,
    VersionUnavailable,
)
from server.registry.host_cache import size_of
from server.registry.objects import LocalObjects
from server.registry.registry import Registry
from server.registry.store import Store
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.registry.fakes import NotingEngine
from tests.registry.shelf import SPEC, Shelf, content, put, serving, snapshot
from tests.support import random_kv_prompt


def refuses_to_create(folder: str, action: str, key: str) -> bool:
    """A store that is full for one kind of objects."""
    return action == "create" and key.startswith(folder)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


# Publish


def test_versions_count_from_one(shelf: Shelf) -> None:
    registry = shelf.open()
    assert [put(registry, "a", content(seed)) for seed in (1, 2, 3)] == [(1, True), (2, True), (3, True)]
    assert put(registry, "b", content(1)) == (1, True)


def test_the_live_content_again_changes_nothing_and_whatever_differs_is_a_new_version(shelf: Shelf) -> None:
    registry = shelf.open()
    put(registry, "a", content(1))
    put(registry, "a", content(2))
    before = (shelf.num_events(), shelf.digests())
    assert put(registry, "a", content(2)) == (2, False)
    assert put(registry, "a", content(2, created_at="now", digest="filled in by a download")) == (2, False)
    assert (shelf.num_events(), shelf.digests()) == before
    assert put(registry, "a", content(2, description="other words")) == (3, True)
    assert put(registry, "a", content(1)) == (4, True)
    assert put(registry, "a", content(1, labels=["x"])) == (5, True)


def test_a_replaced_task_is_never_served_from_the_old_content(shelf: Shelf) -> None:
    registry = shelf.open()
    for seed in (1, 2, 1, 3):
        put(registry, "a", content(seed))
        assert torch.equal(serving(registry, "a").tensor, content(seed).tensor)
        assert torch.equal(serving(shelf.open(), "a").tensor, content(seed).tensor)


def test_every_version_can_be_asked_for(shelf: Shelf) -> None:
    registry = shelf.open()
    for seed in (1, 2, 3):
        put(registry, "a", content(seed))
    for version in (1, 2, 3):
        assert serving(registry, f"a@{version}").digest == content(version).digest
    with pytest.raises(UnknownTask, match="no version 4") as caught:
        registry.resolve("a@4")
    assert "1, 2, 3" in caught.value.remedy


def test_the_name_of_the_frozen_model_cannot_be_taken(shelf: Shelf) -> None:
    for name in (SPEC.name, "Not a name"):
        with pytest.raises(InvalidTaskName):
            shelf.open().publish(name, [content(1)], "api")
    with pytest.raises(InvalidTaskName, match="frozen model's name"):
        shelf.open(replace(SPEC, name="a-1")).publish("a", [content(1), content(2)], "api")
    assert shelf.objects.objects == {}


def test_an_unknown_task_is_refused_with_near_names(shelf: Shelf) -> None:
    registry = shelf.open()
    put(registry, "sms_spam", content(1))
    for reference in ("sms-spam", "sms-spam@1"):
        with pytest.raises(UnknownTask, match="Did you mean sms_spam"):
            registry.resolve(reference)
    with pytest.raises(InvalidTaskName):
        registry.resolve("sms_spam@latest")


def test_several_contents_are_one_event(shelf: Shelf) -> None:
    registry = shelf.open()
    rows = [content(seed) for seed in (1, 2, 3)]
    published = registry.publish("m", rows, "api")
    assert [(item.task, item.version) for item in published.tasks] == [("m-0", 1), ("m-1", 1), ("m-2", 1)]
    changed = registry.publish("m", [rows[0], content(9), rows[2]], "api")
    assert [item.version for item in changed.tasks] == [1, 2, 1], "what was live keeps its number"
    assert shelf.num_events() == 2
    assert len(shelf.digests()) == 4, "and no blob is kept twice"
    assert not registry.publish("m", [rows[0], content(9), rows[2]], "api").created
    assert snapshot(shelf.open()) == snapshot(registry)


def test_a_multitask_soft_prompt_is_numbered_even_with_a_single_row(shelf: Shelf) -> None:
    published = shelf.open().publish("many", [replace(content(1), is_multitask_row=True)], "api")
    assert [item.task for item in published.tasks] == ["many-0"]


def test_a_publish_is_warm_then_kept_then_an_event_then_visible(shelf: Shelf) -> None:
    registry, engine, order = shelf.open(), NotingEngine(), list[str]()
    registry.connect(engine)

    def note(what: str) -> None:
        order.append(what)
        assert registry.tasks() == [], "nobody sees it yet"

    engine.on_warm = lambda soft_prompt: note("warm")
    shelf.objects.before_create = lambda key: note(key.partition("/")[0])
    registry.publish("a", [content(1)], "api")
    assert order == ["warm", "blobs", "events"]
    assert snapshot(registry)["a"][0] == ((1, 100),)


def test_a_soft_prompt_that_cannot_be_warmed_leaves_nothing(shelf: Shelf) -> None:
    registry, engine = shelf.open(), NotingEngine()
    registry.connect(engine)

    def refuse(soft_prompt: SoftPrompt) -> None:
        raise InvalidSoftPrompt("Not finite.")

    engine.on_warm = refuse
    for activate in (True, False):
        with pytest.raises(InvalidSoftPrompt):
            registry.publish("a", [content(1)], "api", activate=activate)
    assert shelf.objects.objects == {}
    assert not registry.is_referenced(content(1).prefix_hash)
    assert set(engine.dropped) == {content(1).prefix_hash}


def test_a_dry_run_warms_and_leaves_nothing(shelf: Shelf) -> None:
    registry, engine = shelf.open(), NotingEngine()
    registry.connect(engine)
    published = registry.publish("a", [content(1)], "api", dry_run=True)
    assert (published.created, published.live, published.tasks[0].version) == (False, False, 1)
    assert engine.warmed == engine.dropped == [content(1).prefix_hash]
    assert shelf.objects.objects == {}


def test_a_change_that_the_store_refuses_changes_nothing(shelf: Shelf) -> None:
    registry = shelf.open()
    put(registry, "a", content(1))
    put(registry, "a", content(2))
    before, kept = snapshot(registry), dict(shelf.objects.objects)
    for refused in ("blobs", "events"):
        shelf.objects.fails = partial(refuses_to_create, refused)
        with pytest.raises(StoreError):
            registry.publish("a", [content(3)], "api")
        if refused == "events":
            for change in (lambda: registry.roll_back("a"), lambda: registry.delete("a")):
                with pytest.raises(StoreError):
                    change()
    shelf.objects.fails = lambda action, key: False
    assert snapshot(registry) == before == snapshot(shelf.open())
    assert kept.items() <= shelf.objects.objects.items()
    assert put(registry, "a", content(3)) == (3, True)


# Who answers


def test_a_staged_version_answers_only_who_asks_for_it(shelf: Shelf) -> None:
    registry = shelf.open()
    staged = registry.publish("a", [content(1)], "api", activate=False)
    assert (staged.created, staged.live) == (True, False)
    with pytest.raises(UnknownTask, match="No version") as caught:
        registry.resolve("a")
    assert "a@1" in caught.value.remedy
    assert serving(registry, "a@1").digest == content(1).digest
    registry.activate("a", 1)
    assert serving(registry, "a").digest == content(1).digest


def test_activate_and_roll_back_choose_who_answers(shelf: Shelf) -> None:
    registry = shelf.open()
    for seed in (1, 2, 3):
        put(registry, "a", content(seed))
    assert registry.activate("a", 1).traffic == ((1, 100),)
    events = shelf.num_events()
    registry.activate("a", 1)
    assert shelf.num_events() == events, "it answers already"
    assert [registry.roll_back("a").traffic[0][0] for _ in range(3)] == [3, 2, 1]
    with pytest.raises(NothingToRollBackTo):
        registry.roll_back("a")
    assert snapshot(shelf.open()) == snapshot(registry)


def test_a_canary_gives_each_key_one_side_and_each_side_its_share(shelf: Shelf) -> None:
    registry = shelf.open()
    put(registry, "a", content(1))
    put(registry, "a", content(2))
    keys = [f"user {i}" for i in range(2000)]

    def canary(share: int) -> set[str]:
        registry.set_traffic("a", {1: 100 - share, 2: share})
        return {key for key in keys if registry.resolve("a", key).version == 2}

    ten, ten_again, thirty = canary(10), canary(10), canary(30)
    assert ten == ten_again
    assert ten < thirty, "a growing share keeps its users"
    assert 120 < len(ten) < 280
    assert 480 < len(thirty) < 720
    assert canary(100) == set(keys)
    assert registry.task("a").traffic == ((2, 100),)


def test_a_live_version_cannot_be_deleted_and_another_leaves_nothing(shelf: Shelf) -> None:
    registry, engine = shelf.open(), NotingEngine()
    registry.connect(engine)
    for seed in (1, 2):
        put(registry, "a", content(seed))
    registry.set_traffic("a", {1: 50, 2: 50})
    for version in (1, 2):
        with pytest.raises(VersionInUse):
            registry.delete_version("a", version)
    registry.activate("a", 2)
    registry.delete_version("a", 1)
    assert shelf.digests() == [content(2).digest]
    assert content(1).digest not in registry.host
    assert engine.dropped == [content(1).prefix_hash]
    with pytest.raises(NothingToRollBackTo):
        registry.roll_back("a")


@pytest.mark.parametrize("expected", [1, "none"])
def test_a_change_that_rests_on_what_is_no_longer_so_is_refused(shelf: Shelf, expected: int | str) -> None:
    first, second = shelf.open(), shelf.open()
    put(first, "a", content(1))
    put(first, "a", content(2))  # the second registry has not looked since
    blobs = shelf.digests()
    with pytest.raises(PreconditionFailed, match="ETag"):
        second.publish("a", [content(3)], "api", expected=expected)  # type: ignore[arg-type]
    with pytest.raises(PreconditionFailed):
        second.delete("a", expected=expected)  # type: ignore[arg-type]
    assert shelf.digests() == blobs
    assert second.publish("a", [content(3)], "api", expected=2).created


def test_a_condition_is_checked_again_when_another_server_was_faster(shelf: Shelf) -> None:
    first, second = shelf.open(), shelf.open()
    put(first, "a", content(1))

    def meanwhile(key: str) -> None:
        if key.startswith("events/"):
            shelf.objects.before_create = lambda key: None
            put(first, "a", content(2))

    shelf.objects.before_create = meanwhile
    with pytest.raises(PreconditionFailed):
        second.publish("a", [content(3)], "api", expected=1)
    assert shelf.digests() == sorted([content(1).digest, content(2).digest]), "the refused blob is removed"


# Delete


def test_a_deleted_task_is_gone_with_all_that_was_only_its_own(shelf: Shelf) -> None:
    registry, engine = shelf.open(), NotingEngine()
    registry.connect(engine)
    for seed in (1, 2):
        put(registry, "a", content(seed))
    put(registry, "b", content(2))
    registry.delete("a")
    assert engine.dropped == [content(1).prefix_hash], "the other numbers are still another task's"
    for opened in (registry, shelf.open()):
        for reference in ("a", "a@1", "a@2"):
            with pytest.raises(UnknownTask):
                opened.resolve(reference)
        assert serving(opened, "b").digest == content(2).digest
    assert shelf.digests() == [content(2).digest]
    registry.delete("b")
    assert shelf.digests() == []
    assert len(registry.host) == 0


def test_versions_are_never_used_twice_also_not_after_a_delete(shelf: Shelf) -> None:
    registry = shelf.open()
    for version in (1, 2, 3):
        assert put(registry, "a", content(1)) == (version, True)
        registry.delete("a")
        registry = shelf.open()


def test_who_holds_a_soft_prompt_keeps_it_through_replace_and_delete(shelf: Shelf) -> None:
    registry = shelf.open()
    put(registry, "a", content(1))
    held = [serving(registry, "a"), serving(shelf.open(), "a")]
    put(registry, "a", content(2))
    registry.delete("a")
    put(registry, "a", content(3))
    for soft_prompt in held:
        assert torch.equal(soft_prompt.tensor, content(1).tensor)


def test_a_reader_never_sees_a_task_between_two_versions(shelf: Shelf) -> None:
    registry = shelf.open()
    put(registry, "a", content(0))
    digests = {seed + 1: content(seed).digest for seed in range(15)}
    wrong: list[object] = []
    done = threading.Event()

    def read() -> None:
        last = 0
        while not done.is_set():
            resolved = registry.resolve("a")
            if resolved.version < last or resolved.content.digest != digests[resolved.version]:
                wrong.append(resolved)
            last = resolved.version

    reader = threading.Thread(target=read)
    reader.start()
    for seed in range(1, 15):
        put(registry, "a", content(seed))
    done.set()
    reader.join()
    assert wrong == []


# Memory


def test_a_start_reads_no_tensor_and_a_hundred_askers_read_one_once(shelf: Shelf) -> None:
    for seed in range(5):
        put(shelf.open(), f"t{seed}", content(seed))
    shelf.objects.reads.clear()
    registry = shelf.open()
    assert not any(key.startswith("blobs/") for key in shelf.objects.reads)
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda _: serving(registry, "t3").digest, range(100)))
    assert set(found) == {content(3).digest}
    assert sum(count for key, count in shelf.objects.reads.items() if key.startswith("blobs/")) == 1


def test_a_start_with_many_tasks_reads_each_event_once_and_no_tensor(shelf: Shelf) -> None:
    writer = shelf.open()
    for number in range(300):
        writer.publish(f"t{number}", [content(number % 7, description=f"number {number}")], "api")
    shelf.objects.reads.clear()
    registry = shelf.open()
    listed = [(task.name, task.live.content.parse_manifest().description) for task in registry.tasks() if task.live]
    assert sorted(listed) == sorted((f"t{number}", f"number {number}") for number in range(300))
    assert registry.errors == {}
    assert shelf.objects.reads == {f"events/{number:012d}.json": 1 for number in range(1, 301)}
    serving(registry, "t299")
    assert len(shelf.objects.reads) == 301, "that one's tensor"


def test_the_least_recently_used_soft_prompts_leave_memory_first(shelf: Shelf) -> None:
    writer = shelf.open()
    for seed in range(4):
        put(writer, f"t{seed}", content(seed))
    one = size_of(content(0))
    registry = Registry(Store(shelf.objects), SPEC, 32, host_memory=2 * one)
    for name in ("t0", "t1", "t0", "t2"):
        serving(registry, name)
        registry.cached(registry.resolve(name))
    assert [f"t{seed}" for seed in range(4) if content(seed).digest in registry.host] == ["t0", "t2"]
    assert registry.host.num_bytes <= 2 * one


# Durability, and several servers on one store


def test_the_state_survives_reopening(tmp_path: Path) -> None:
    registry = Registry(Store(LocalObjects(tmp_path)), SPEC, 32)
    for task, seed in (("a", 1), ("a", 2), ("b", 1), ("c", 3)):
        put(registry, task, content(seed, description=task))
    registry.publish("kv", [random_kv_prompt(SPEC)], "api")
    registry.roll_back("a")
    registry.delete("c")
    reopened = Registry(Store(LocalObjects(tmp_path)), SPEC, 32)
    assert snapshot(reopened) == snapshot(registry)
    assert serving(reopened, "kv").is_kv_prefix
    assert reopened.errors == {}


def test_racing_publishers_all_win_a_number_of_their_own(shelf: Shelf) -> None:
    registries = [shelf.open(), shelf.open(), shelf.open()]

    def publish(seed: int) -> int:
        return registries[seed % 3].publish("a", [content(seed)], "api").tasks[0].version

    with ThreadPoolExecutor(6) as pool:
        versions = list(pool.map(publish, range(30)))
    assert sorted(versions) == list(range(1, 31))
    kept = snapshot(shelf.open())["a"][1]
    assert kept == {version: content(seed).digest for seed, version in enumerate(versions)}


def test_a_registry_takes_over_what_another_wrote_and_warms_it_first(shelf: Shelf) -> None:
    first, second, engine = shelf.open(), shelf.open(), NotingEngine()
    second.connect(engine)
    put(first, "a", content(1))
    put(first, "b", content(2))
    first.delete("b")
    second.sync()
    assert snapshot(second) == snapshot(first)
    assert content(1).prefix_hash in engine.warmed
    first.delete("a")
    second.sync()
    assert content(1).prefix_hash in engine.dropped
    assert len(second.host) == 0


def test_a_delete_by_another_server_does_not_take_the_content_from_a_publish_under_way(shelf: Shelf) -> None:
    other, registry = shelf.open(), shelf.open()
    put(other, "a", content(1))

    def meanwhile(key: str) -> None:
        if key.startswith("events/"):
            shelf.objects.before_create = lambda key: None
            other.delete("a")

    shelf.objects.before_create = meanwhile
    put(registry, "b", content(1))
    assert snapshot(shelf.open()) == snapshot(registry) == {"b": (((1, 100),), {1: content(1).digest})}
    assert serving(shelf.open(), "b").digest == content(1).digest


# What cannot be served


OTHER_MODEL = replace(SPEC, name="other", fingerprint="f2")


def own(seed: int) -> SoftPrompt:
    return content(seed, base_model={"name": SPEC.name, "fingerprint": SPEC.fingerprint})


def test_content_of_another_frozen_model_is_reported_and_the_rest_is_served(shelf: Shelf) -> None:
    registry = shelf.open()
    put(registry, "a", own(1))
    put(registry, "b", content(2))
    other = shelf.open(OTHER_MODEL)
    assert list(other.errors) == ["a"]
    assert SPEC.fingerprint in other.errors["a"]
    assert OTHER_MODEL.fingerprint in other.errors["a"]
    with pytest.raises(VersionUnavailable):
        serving(other, "a")
    assert serving(other, "b").digest == content(2).digest
    assert shelf.open().errors == {}
    assert put(other, "a", content(3)) == (2, True)


@pytest.mark.parametrize(
    ("model", "words"),
    [(replace(SPEC, hidden_size=16), "[5, 8]"), (replace(SPEC, max_model_len=6), "context of 6")],
)
def test_content_that_does_not_fit_any_more_is_reported(shelf: Shelf, model: ModelSpec, words: str) -> None:
    put(shelf.open(), "a", content(1))
    assert words in shelf.open(model).errors["a"]
    assert "1 to 4" in shelf.open(max_virtual_tokens=4).errors["a"]


def test_a_damaged_or_missing_content_is_unavailable_until_it_is_published_again(shelf: Shelf) -> None:
    for task, seed in (("a", 1), ("b", 2), ("c", 3)):
        put(shelf.open(), task, content(seed))
    shelf.damage(content(1))
    [missing] = [key for key in shelf.objects.objects if key.startswith(f"blobs/{content(2).digest}")]
    shelf.objects.delete(missing)
    registry = shelf.open()
    assert list(registry.errors) == ["b"], "that a blob is missing shows at start"
    for task in ("a", "b"):
        with pytest.raises(VersionUnavailable):
            serving(registry, task)
    assert sorted(registry.errors) == ["a", "b"]
    assert serving(registry, "c").digest == content(3).digest
    for task, seed in (("a", 1), ("b", 2)):
        assert put(registry, task, content(seed)) == (2, True)
        registry.delete_version(task, 1)
    assert registry.errors == shelf.open().errors == {}


def test_a_store_with_a_hole_does_not_open(shelf: Shelf) -> None:
    put(shelf.open(), "a", content(1))
    put(shelf.open(), "a", content(2))
    shelf.objects.delete("events/000000000001.json")
    with pytest.raises(StoreError, match="event 1 is missing"):
        shelf.open()


# Any sequence of changes, on either of two servers


class Model:
    """One task, as a dictionary and a stack."""

    def __init__(self) -> None:
        self.versions: dict[int, str] = {}
        self.history: list[int] = []
        self.last = 0

    def before(self) -> int | None:
        return next((number for number in reversed(self.history) if number != self.history[-1]), None)


CHANGES = st.one_of(
    st.tuples(st.sampled_from(["publish", "stage", "activate", "delete_version"]), st.integers(0, 3)),
    st.tuples(st.sampled_from(["rollback", "delete", "reopen", "sync"]), st.just(0)),
)


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.tuples(st.booleans(), CHANGES), max_size=25))
def test_any_sequence_of_changes_does_what_a_dictionary_would(  # noqa: C901 - one case per kind of change
    steps: list[tuple[bool, tuple[str, int]]],
) -> None:
    shelf, model = Shelf(), Model()
    registries = {False: shelf.open(), True: shelf.open()}
    contents = [content(seed) for seed in range(4)]
    for which, (kind, number) in steps:
        registry = registries[which]
        live = model.history[-1] if model.history else None
        match kind:
            case "publish" | "stage":
                digest = contents[number].digest
                new = live is None or model.versions[live] != digest
                if new:
                    model.last += 1
                    model.versions[model.last] = digest
                    if kind == "publish":
                        model.history.append(model.last)
                published = registry.publish("a", [contents[number]], "api", activate=kind == "publish")
                assert (published.created, published.tasks[0].version) == (new, model.last if new else live)
            case "activate" if number in model.versions:
                registry.activate("a", number)
                if live != number:
                    model.history.append(number)
            case "delete_version" if number in model.versions:
                if number == live:
                    with pytest.raises(VersionInUse):
                        registry.delete_version("a", number)
                else:
                    registry.delete_version("a", number)
                    del model.versions[number]
                    model.history = [entry for entry in model.history if entry != number]
            case "rollback" if model.versions:
                before = model.before()
                if before is None:
                    with pytest.raises(NothingToRollBackTo):
                        registry.roll_back("a")
                else:
                    registry.roll_back("a")
                    while model.history[-1] == live:
                        model.history.pop()
            case "delete" if model.versions:
                registry.delete("a")
                model.versions, model.history = {}, []
            case "reopen":
                registries[which] = shelf.open()
            case "sync":
                registry.sync()
            case _:
                continue
        registries[which].sync()
        traffic = ((model.history[-1], 100),) if model.history else ()
        assert snapshot(registries[which]) == ({"a": (traffic, model.versions)} if model.versions else {})
        assert shelf.digests() == sorted(model.versions.values())
