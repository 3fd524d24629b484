from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from server.contracts import ModelSpec
from server.errors import (
    StoreError,
    VersionUnavailable,
)
from server.registry.host_cache import size_of
from server.registry.registry import Registry
from server.registry.store import Store
from server.registry.task_map import TaskMap
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.registry.shelf import SPEC, Shelf, content, put, serving


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


def test_what_is_broken_is_known_without_a_walk_over_all_tasks(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        put(shelf.open(), f"task-{seed}", content(seed))
    shelf.damage(content(1))
    registry = shelf.open()
    registry.report("entry", "is no soft prompt")
    monkeypatch.setattr(TaskMap, "__iter__", lambda _: pytest.fail("a walk over all tasks"))
    monkeypatch.setattr(TaskMap, "names", property(lambda _: pytest.fail("a walk over all tasks")))
    assert (list(registry.errors), registry.num_errors, registry.entries_after(None)) == (["entry"], 1, ["entry"])
    with pytest.raises(VersionUnavailable):
        serving(registry, "task-1")
    assert list(registry.errors) == ["task-1", "entry"]
    assert (registry.num_errors, registry.entries_after(None), registry.entries_after("entry")) == (2, ["entry"], [])
    assert registry.error_of("task-1") == registry.errors["task-1"]
    assert put(registry, "task-1", content(1)) == (2, True)
    assert list(registry.errors) == ["task-1", "entry"], "of its first version"
    registry.delete_version("task-1", 1)
    assert list(registry.errors) == ["entry"]
    registry.report("task-2", "is no soft prompt")
    assert (registry.num_errors, registry.entries_after(None)) == (2, ["entry"])


def test_a_content_that_can_be_read_again_is_broken_no_more(shelf: Shelf) -> None:
    put(shelf.open(), "a", content(1))
    put(shelf.open(), "b", content(1))
    before = dict(shelf.objects.objects)
    shelf.damage(content(1))
    registry = shelf.open()
    for task in ("a", "b"):
        with pytest.raises(VersionUnavailable):
            serving(registry, task)
    assert sorted(registry.errors) == ["a", "b"]
    shelf.objects.objects = before
    registry.host.drop(content(1).digest)
    serving(registry, "a")
    assert list(registry.errors) == ["b"], "whose blob is another one"
    registry.host.drop(content(1).digest)
    serving(registry, "b")
    assert registry.errors == {}
