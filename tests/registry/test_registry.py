"""The live map: durable before visible, never stale, numbers never used twice, nothing left of what was deleted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from server.errors import (
    InvalidSoftPrompt,
    InvalidTaskName,
    NothingToRollBackTo,
    PreconditionFailed,
    StoreError,
    UnknownTask,
    VersionInUse,
)
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.registry.fakes import NotingEngine
from tests.registry.shelf import SPEC, Shelf, content, put, serving, snapshot


def refuses_to_create(folder: str, action: str, key: str) -> bool:
    """A store that is full for one kind of objects."""
    return action == "create" and key.startswith(folder)


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
