from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import (
    NothingToRollBackTo,
    UnknownTask,
    VersionInUse,
)
from server.registry.objects import LocalObjects
from server.registry.registry import Registry
from server.registry.store import Store
from tests.registry.fakes import NotingEngine
from tests.registry.shelf import SPEC, Shelf, content, put, serving, snapshot
from tests.support import random_kv_prompt


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
