"""What one server cannot read of a store takes nothing else along: no start, no list, no other task."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from server.errors import VersionUnavailable
from server.registry.registry import Registry
from server.registry.state import WHOLE_STORE
from tests.registry.shelf import Shelf, content, put, serving

Fields = dict[str, Any]


def newer(shelf: Shelf, change: Callable[[Fields], object]) -> None:
    """Append a copy of the last event, as a newer Prelude might write it: the next version, and what it changes."""
    number = shelf.num_events()
    fields = json.loads(shelf.objects.objects[f"events/{number:012d}.json"])
    fields["number"] = number + 1
    for item in fields["change"].get("published", ()):
        item["version"] += 1
    change(fields)
    shelf.objects.objects[f"events/{number + 1:012d}.json"] = json.dumps(fields).encode()


def of_content(**fields: Any) -> Callable[[Fields], object]:
    return lambda event: event["change"]["published"][0]["content"].update(fields, digest="f" * 64, blob="of-tomorrow")


def of_manifest(**fields: Any) -> Callable[[Fields], object]:
    return lambda event: of_content(manifest=fields)(event)


VERSIONS = {
    "a generation default": of_manifest(generation={"dry_multiplier": 0.8}),
    "a field of another form": of_manifest(labels={"of": "tomorrow"}),
    "a peft type": of_content(peft_type="POLY_PROMPT"),
    "a fact about contents": of_content(quantisation="int8"),
    "a shape": of_content(shape=[1, 2, 3]),
    "a fact about versions": lambda event: event["change"]["published"][0].update(reviewed=True),
    "a fact about publishes": lambda event: event["change"].update(reviewed=True),
    "a fact about events": lambda event: event.update(shiny=1),
    "half a surrogate pair": of_manifest(description="\ud800"),
    "half a surrogate pair in a name": of_manifest(**{"\udfff": 1}),
    "half a surrogate pair in who did it": lambda event: event.update(by="\ud800"),
    "half a surrogate pair in a peft type": of_content(peft_type="\ud800"),
    "a blob elsewhere": lambda event: event["change"]["published"][0]["content"].update(blob="../../x", shape=[1]),
    "only a blob elsewhere": lambda event: event["change"]["published"][0]["content"].update(blob="../../x"),
}


@pytest.fixture
def shelf() -> Shelf:
    shelf = Shelf()
    registry = shelf.open()
    put(registry, "other", content(9))
    put(registry, "a", content(1))
    put(registry, "a", content(2))
    return shelf


def opened(shelf: Shelf, kind: str, change: Callable[[Fields], object]) -> Registry:
    """A registry that finds the newer event at its start, or while it runs."""
    registry = shelf.open() if kind == "synced" else None
    newer(shelf, change)
    if registry is None:
        return shelf.open()
    registry.sync()
    return registry


@pytest.mark.parametrize("kind", ["started", "synced"])
@pytest.mark.parametrize("name", VERSIONS)
def test_a_version_of_a_newer_prelude_is_listed_and_refused_and_the_others_work(
    shelf: Shelf, name: str, kind: str
) -> None:
    registry = opened(shelf, kind, VERSIONS[name])
    task = registry.task("a")
    assert sorted(task.versions) == [1, 2, 3]
    assert registry.why_broken(task.versions[3])
    assert "a" in registry.errors
    assert registry.why_broken(task.versions[2]) is None
    before = task.traffic
    with pytest.raises(VersionUnavailable):
        registry.activate("a", 3)
    with pytest.raises(VersionUnavailable):
        registry.set_traffic("a", {2: 50, 3: 50})
    assert registry.task("a").traffic == before
    assert registry.activate("a", 2).traffic == ((2, 100),)
    assert serving(registry, "a").digest == content(2).digest
    assert put(registry, "a", content(4)) == (4, True), "no number is given twice"
    assert put(registry, "other", content(5)) == (2, True)
    registry.delete_version("a", 3)
    assert registry.errors == {}
    assert sorted(shelf.open().task("a").versions) == [1, 2, 4]


EVENTS: dict[str, tuple[Callable[[Fields], object], str]] = {
    "a kind of change": (lambda event: event.update(change={"kind": "freeze", "task": "a"}), "a"),
    "a change of several tasks": (lambda event: event.update(change={"kind": "swap", "tasks": ["a", "b"]}), "a"),
    "another version number": (lambda event: event["change"]["published"][0].update(version="v4"), "a"),
    "a kind without a task": (lambda event: event.update(change={"kind": "pause"}), WHOLE_STORE),
    "no change": (lambda event: event.pop("change"), WHOLE_STORE),
    "a name of another form": (lambda event: event["change"]["published"][0].update(task="A name"), WHOLE_STORE),
    "half a surrogate pair": (lambda event: event["change"]["published"][0].update(task="\ud800"), WHOLE_STORE),
    "what does not follow": (lambda event: event.update(change={"kind": "activate", "task": "a", "version": 7}), "a"),
}


@pytest.mark.parametrize("kind", ["started", "synced"])
@pytest.mark.parametrize("name", EVENTS)
def test_an_event_of_a_newer_prelude_is_reported_and_everything_else_goes_on(
    shelf: Shelf, name: str, kind: str
) -> None:
    change, reported = EVENTS[name]
    registry = opened(shelf, kind, change)
    assert "event 000000000004" in registry.errors[reported] or "event 4" in registry.errors[reported]
    assert serving(registry, "a").digest == content(2).digest
    assert registry.activate("a", 1).traffic == ((1, 100),)
    assert put(registry, "a", content(4))[0] == 4, "the newer event may have been version 3"
    assert put(registry, "other", content(5))[1]
    assert shelf.open().task("a").live == registry.task("a").live


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b"[" * 100_000, b"null"])
def test_a_damaged_event_hides_no_other(shelf: Shelf, data: bytes) -> None:
    shelf.objects.objects["events/000000000002.json"] = data
    registry = shelf.open()
    assert WHOLE_STORE in registry.errors
    assert serving(registry, "other").digest == content(9).digest
    assert serving(registry, "a").digest == content(2).digest
    assert put(registry, "new", content(5))[0] == 2, "the damaged event may have been version 1"


def test_deleting_a_task_ends_what_is_said_of_it(shelf: Shelf) -> None:
    registry = opened(shelf, "started", EVENTS["a kind of change"][0])
    registry.delete("a")
    assert registry.errors == {}
