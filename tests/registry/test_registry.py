"""The live map: durable before visible, never stale, numbers never used twice."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.core import ModelSpec
from server.errors import InvalidTaskName, StoreError, UnknownTask
from server.registry.events import Event
from server.registry.registry import Registry
from server.registry.store import LocalStore
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.support import random_kv_prompt, random_soft_prompt

SPEC = ModelSpec(
    name="tiny-llama",
    fingerprint="f1",
    hidden_size=8,
    num_hidden_layers=1,
    num_key_value_heads=1,
    head_dim=4,
    vocab_size=16,
    max_model_len=64,
    dtype="float32",
    device="cpu",
)


def content(seed: int, **manifest: object) -> SoftPrompt:
    return random_soft_prompt(SPEC, seed=seed, manifest=manifest)


class Shelf:
    """A store in a folder, and registries on it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, model: ModelSpec = SPEC, max_virtual_tokens: int = 32) -> Registry:
        return Registry(LocalStore(self.root), model, max_virtual_tokens)

    def blobs(self) -> set[str]:
        return {path.stem for path in (self.root / "blobs").iterdir()}

    def num_events(self) -> int:
        return len(list((self.root / "events").iterdir()))

    def damage(self, soft_prompt: SoftPrompt) -> None:
        path = self.root / "blobs" / f"{soft_prompt.digest}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def put(registry: Registry, task: str, soft_prompt: SoftPrompt) -> tuple[int, bool]:
    """Publish; answers the version, and whether it is new."""
    published = registry.publish(task, [soft_prompt], "api")
    assert registry.resolve(task).soft_prompt.digest == soft_prompt.digest
    return published.tasks[0].version, published.created


def snapshot(registry: Registry) -> dict[str, tuple[int, dict[int, str]]]:
    return {t.task: (t.live, {n: c.digest for n, c in t.versions.items()}) for t in registry.tasks()}


# Publish


def test_versions_count_from_one(shelf: Shelf) -> None:
    registry = shelf.open()
    assert [put(registry, "a", content(seed)) for seed in (1, 2, 3)] == [(1, True), (2, True), (3, True)]
    assert put(registry, "b", content(1)) == (1, True)


def test_the_live_content_again_changes_nothing_and_an_older_one_is_a_new_version(shelf: Shelf) -> None:
    registry = shelf.open()
    put(registry, "a", content(1))
    put(registry, "a", content(2))
    events = shelf.num_events()
    assert put(registry, "a", content(2)) == (2, False)
    assert put(registry, "a", content(2, description="other words")) == (2, False)
    assert shelf.num_events() == events
    assert put(registry, "a", content(1)) == (3, True)
    assert put(registry, "a", content(1, labels=["x"])) == (4, True)


def test_a_replaced_task_is_never_served_from_the_old_content(shelf: Shelf) -> None:
    registry = shelf.open()
    for seed in (1, 2, 1, 3):
        put(registry, "a", content(seed))
        resolved = registry.resolve("a")
        assert resolved.soft_prompt.prefix_hash == content(seed).prefix_hash
        assert torch.equal(resolved.soft_prompt.tensor, content(seed).tensor)
        assert torch.equal(shelf.open().resolve("a").soft_prompt.tensor, content(seed).tensor)


def test_every_version_can_be_asked_for(shelf: Shelf) -> None:
    registry = shelf.open()
    for seed in (1, 2, 3):
        put(registry, "a", content(seed))
    for version in (1, 2, 3):
        assert registry.resolve(f"a@{version}").soft_prompt.digest == content(version).digest
    with pytest.raises(UnknownTask, match="no version 4") as caught:
        registry.resolve("a@4")
    assert "1, 2, 3" in caught.value.remedy


def test_the_name_of_the_frozen_model_cannot_be_taken(shelf: Shelf) -> None:
    registry = shelf.open()
    with pytest.raises(InvalidTaskName, match="frozen model's name"):
        registry.publish(SPEC.name, [content(1)], "api")
    with pytest.raises(InvalidTaskName, match="frozen model's name"):
        shelf.open(replace(SPEC, name="a-1")).publish("a", [content(1), content(2)], "api")
    with pytest.raises(InvalidTaskName):
        registry.publish("Not a name", [content(1)], "api")
    assert shelf.num_events() == 0
    assert shelf.blobs() == set()


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
    assert shelf.num_events() == 1
    changed = registry.publish("m", [rows[0], content(9), rows[2]], "api")
    assert changed.created
    assert [item.version for item in changed.tasks] == [1, 2, 1], "what was live keeps its number"
    assert shelf.num_events() == 2
    assert not registry.publish("m", [rows[0], content(9), rows[2]], "api").created
    assert snapshot(shelf.open()) == snapshot(registry)


def test_a_publish_that_the_store_refuses_changes_nothing(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = shelf.open()
    put(registry, "a", content(1))
    before = snapshot(registry)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.link", full)
        with pytest.raises(StoreError):
            registry.publish("a", [content(2)], "api")
        with pytest.raises(StoreError):
            registry.delete("a")
    assert snapshot(registry) == before == snapshot(shelf.open())
    assert put(registry, "a", content(2)) == (2, True)


# Delete


def test_a_deleted_task_is_gone_with_all_its_versions_and_blobs(shelf: Shelf) -> None:
    registry = shelf.open()
    for seed in (1, 2):
        put(registry, "a", content(seed))
    put(registry, "b", content(2))
    registry.delete("a")
    for opened in (registry, shelf.open()):
        for reference in ("a", "a@1", "a@2"):
            with pytest.raises(UnknownTask):
                opened.resolve(reference)
        assert [task.task for task in opened.tasks()] == ["b"]
        assert opened.resolve("b").soft_prompt.digest == content(2).digest
    assert shelf.blobs() == {content(2).digest}, "another task's content stays"
    registry.delete("b")
    assert shelf.blobs() == set()


def test_versions_are_never_used_twice_also_not_after_a_delete(shelf: Shelf) -> None:
    registry = shelf.open()
    assert put(registry, "a", content(1)) == (1, True)
    registry.delete("a")
    assert put(registry, "a", content(1)) == (2, True)
    registry.delete("a")
    registry = shelf.open()
    assert put(registry, "a", content(1)) == (3, True)
    assert list(registry.tasks()[0].versions) == [3]


def test_only_a_live_task_can_be_deleted(shelf: Shelf) -> None:
    registry = shelf.open()
    put(registry, "a", content(1))
    registry.delete("a")
    for name in ("a", "b"):
        with pytest.raises(UnknownTask):
            registry.delete(name)
    for name in ("a@1", "A"):
        with pytest.raises(InvalidTaskName):
            registry.delete(name)
    assert shelf.num_events() == 2


def test_who_holds_a_soft_prompt_keeps_it_through_replace_and_delete(shelf: Shelf) -> None:
    registry = shelf.open()
    put(registry, "a", content(1))
    held = [registry.resolve("a").soft_prompt, shelf.open().resolve("a").soft_prompt]
    put(registry, "a", content(2))
    registry.delete("a")
    put(registry, "a", content(3))
    for soft_prompt in held:
        assert torch.equal(soft_prompt.tensor, content(1).tensor)
        assert soft_prompt.digest == content(1).digest


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
            if resolved.version < last or resolved.soft_prompt.digest != digests[resolved.version]:
                wrong.append(resolved)
            last = resolved.version

    reader = threading.Thread(target=read)
    reader.start()
    for seed in range(1, 15):
        put(registry, "a", content(seed))
    done.set()
    reader.join()
    assert wrong == []


# Durability, and several servers on one store


def test_the_state_survives_reopening(shelf: Shelf) -> None:
    registry = shelf.open()
    for task, seed in (("a", 1), ("a", 2), ("b", 1), ("c", 3)):
        put(registry, task, content(seed, description=task))
    registry.publish("kv", [random_kv_prompt(SPEC)], "api")
    registry.delete("c")
    reopened = shelf.open()
    assert snapshot(reopened) == snapshot(registry)
    assert reopened.resolve("kv").soft_prompt.is_kv_prefix
    assert reopened.errors == {}


def test_two_registries_on_one_store_never_give_the_same_number(shelf: Shelf) -> None:
    registries = [shelf.open(), shelf.open()]
    given_out: list[int] = []

    def publish(which: int) -> None:
        for i in range(10):
            published = registries[which].publish("a", [content(100 * which + i)], "api")
            given_out.append(published.tasks[0].version)

    threads = [threading.Thread(target=publish, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given_out) == list(range(1, 21))
    versions = snapshot(shelf.open())["a"][1]
    assert set(versions.values()) == {content(100 * which + i).digest for which in (0, 1) for i in range(10)}


def test_a_registry_that_lost_a_race_has_what_the_other_wrote(shelf: Shelf) -> None:
    first, second = shelf.open(), shelf.open()
    put(first, "a", content(1))
    put(first, "b", content(2))
    first.delete("a")
    assert put(second, "a", content(1)) == (2, True), "the other's delete took the content away"
    assert snapshot(second) == snapshot(shelf.open())
    put(first, "c", content(3))
    assert snapshot(first) == snapshot(shelf.open())


class InterruptedStore(LocalStore):
    """A store where something else happens between this writer's blob and its event."""

    meanwhile: Callable[[], None] | None = None

    def append(self, event: Event) -> bool:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return super().append(event)


def test_a_delete_by_another_server_does_not_take_the_content_from_a_publish_under_way(shelf: Shelf) -> None:
    put(shelf.open(), "a", content(1))
    store = InterruptedStore(shelf.root)
    registry = Registry(store, SPEC, 32)
    store.meanwhile = lambda: shelf.open().delete("a")
    put(registry, "b", content(1))
    reopened = shelf.open()
    assert reopened.errors == {}
    assert snapshot(reopened) == snapshot(registry) == {"b": (1, {1: content(1).digest})}


_PUBLISH_FOR_EVER = f"""
import sys
import torch
from server.core import ModelSpec
from server.registry.registry import Registry
from server.registry.store import LocalStore
from server.soft_prompts.soft_prompt import SoftPrompt
registry = Registry(LocalStore.open("file:" + sys.argv[1]), {SPEC!r}, 32)
for version in range(1, 10_000):
    registry.publish("a", [SoftPrompt("PROMPT_TUNING", torch.full((5, 8), float(version)))], "api")
    print(version, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(shelf: Shelf) -> None:
    command = [sys.executable, "-c", _PUBLISH_FOR_EVER, str(shelf.root)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        acknowledged = [process.stdout.readline() for _ in range(20)]
        process.kill()
        acknowledged += process.stdout.readlines()
    last = max(int(line) for line in acknowledged if line.endswith("\n"))
    registry = shelf.open()
    assert registry.errors == {}
    resolved = registry.resolve("a")
    assert resolved.version in (last, last + 1), "at most one change was durable but not yet acknowledged"
    assert torch.equal(resolved.soft_prompt.tensor, torch.full((5, 8), float(resolved.version)))
    assert put(registry, "a", content(-1)) == (resolved.version + 1, True)


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
    assert list(snapshot(other)) == ["b"]
    with pytest.raises(UnknownTask):
        other.resolve("a")
    assert snapshot(shelf.open()) == snapshot(registry), "nothing was lost for the model that it belongs to"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (replace(SPEC, hidden_size=16), "[5, 8]"),
        (replace(SPEC, max_model_len=6), "context of 6"),
        (replace(SPEC, dtype="float16"), "after the cast to float16"),
    ],
)
def test_content_that_does_not_fit_any_more_is_reported(shelf: Shelf, model: ModelSpec, words: str) -> None:
    put(shelf.open(), "a", SoftPrompt("PROMPT_TUNING", torch.full((5, 8), 1e6)))
    other = shelf.open(model)
    assert words in other.errors["a"]
    assert other.tasks() == []
    assert "1 to 4" in shelf.open(max_virtual_tokens=4).errors["a"]


def test_a_damaged_content_is_reported_until_it_is_published_again(shelf: Shelf) -> None:
    registry = shelf.open()
    for task in ("a", "b", "c"):
        put(registry, task, content(1))
    put(registry, "d", content(2))
    shelf.damage(content(1))
    registry = shelf.open()
    assert sorted(registry.errors) == ["a", "b", "c"]
    assert list(snapshot(registry)) == ["d"]
    assert put(registry, "a", content(1)) == (2, True)
    for opened in (registry, shelf.open()):
        assert opened.errors == {}
        assert {task: live for task, (live, _) in snapshot(opened).items()} == {"a": 2, "b": 1, "c": 1, "d": 1}


def test_a_task_that_cannot_be_served_can_be_replaced_and_deleted(shelf: Shelf) -> None:
    registry = shelf.open()
    put(registry, "a", own(1))
    put(registry, "b", own(2))
    other = shelf.open(OTHER_MODEL)
    assert put(other, "a", content(3)) == (2, True)
    other.delete("b")
    assert other.resolve("a").soft_prompt.digest == content(3).digest
    assert "b" not in other.errors
    assert own(2).digest not in shelf.blobs()
    assert snapshot(shelf.open(OTHER_MODEL)) == snapshot(other)


def test_numbers_published_for_this_model_are_served_after_a_restart(shelf: Shelf) -> None:
    # The same numbers lie in the store with the fingerprint of another model; who uploads them without one means it.
    put(shelf.open(), "a", own(1))
    other = shelf.open(OTHER_MODEL)
    put(other, "a", content(1))
    assert shelf.open(OTHER_MODEL).resolve("a").version == 2


def test_a_store_with_a_hole_does_not_open(shelf: Shelf) -> None:
    registry = shelf.open()
    put(registry, "a", content(1))
    put(registry, "a", content(2))
    (shelf.root / "events" / "000000000001.json").unlink()
    with pytest.raises(StoreError, match="event 1 is missing"):
        shelf.open()


# Any sequence of changes


TASKS, SEEDS = ("a", "b"), range(4)
PUBLISH = st.tuples(st.sampled_from(["api", "inbox"]), st.sampled_from(TASKS), st.sampled_from(SEEDS))
CHANGES = st.one_of(PUBLISH, st.tuples(st.just("delete"), st.sampled_from(TASKS)), st.tuples(st.just("reopen")))


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(CHANGES, max_size=20))
def test_any_sequence_of_changes_does_what_a_dictionary_would(changes: list[tuple[object, ...]]) -> None:
    contents = {seed: content(seed) for seed in SEEDS}
    versions: dict[str, dict[int, str]] = {task: {} for task in TASKS}
    last = dict.fromkeys(TASKS, 0)
    with tempfile.TemporaryDirectory() as folder:
        shelf = Shelf(Path(folder))
        registry = shelf.open()
        for change in changes:
            match change:
                case ("reopen",):
                    registry = shelf.open()
                case ("delete", str(task)):
                    if versions[task]:
                        registry.delete(task)
                    else:
                        with pytest.raises(UnknownTask):
                            registry.delete(task)
                    versions[task] = {}
                case ("api" | "inbox" as source, str(task), int(seed)):
                    digest = contents[seed].digest
                    is_new = not versions[task] or versions[task][last[task]] != digest
                    if is_new:
                        last[task] += 1
                        versions[task][last[task]] = digest
                    published = registry.publish(task, [contents[seed]], source)
                    assert (published.created, published.tasks[0].version) == (is_new, last[task])
            expected = {task: (last[task], held) for task, held in versions.items() if held}
            assert snapshot(registry) == expected
            assert shelf.blobs() == {digest for held in versions.values() for digest in held.values()}


def test_a_multitask_soft_prompt_is_numbered_even_with_a_single_row(tmp_path: Path, spec: ModelSpec) -> None:
    row = replace(random_soft_prompt(spec), is_multitask_row=True)
    published = Registry(LocalStore(tmp_path), spec, 32).publish("many", [row], "api")
    assert [item.task for item in published.tasks] == ["many-0"]
