"""Events and their fold: the only place that says what a change means."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.errors import StoreError
from server.registry.events import Event, PublishedVersion, Source, State


def publish(number: int, task: str, version: int, digest: str, source: Source = "api") -> Event:
    return Event(number, "publish", "now", source, published=(PublishedVersion(task, version, digest),))


def delete(number: int, task: str) -> Event:
    return Event(number, "delete", "now", "api", deleted=task)


EVENT = Event(
    7,
    "publish",
    "2026-01-01T00:00:00.000+00:00",
    "inbox",
    (PublishedVersion("a", 1, "x"), PublishedVersion("b", 2, "y")),
)


@pytest.mark.parametrize("event", [EVENT, delete(8, "größer")])
def test_an_event_is_read_as_it_was_written(event: Event) -> None:
    assert Event.parse(event.to_json(), "0.json") == event


def _changed(**changes: Any) -> bytes:
    return json.dumps(json.loads(EVENT.to_json()) | changes).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        EVENT.to_json()[:-5],
        b"[" * 100_000,
        _changed(kind="activate"),
        _changed(of_tomorrow=1),
        _changed(number="seven"),
        _changed(published=[{"task": "a", "version": 1}]),
        _changed(published=[{"task": "a", "version": "x", "digest": "d"}]),
        _changed(published=[{"task": "a", "version": 1, "digest": "d", "weight": 0.5}]),
    ],
)
def test_what_cannot_be_understood_whole_is_an_error_that_names_the_file(data: bytes) -> None:
    with pytest.raises(StoreError, match=r"000000000007\.json"):
        Event.parse(data, "000000000007.json")


def test_the_last_publish_is_live_and_the_versions_before_it_stay() -> None:
    task = State([publish(1, "a", 1, "x"), publish(2, "a", 2, "y")]).tasks["a"]
    assert (task.live, task.versions, task.last_event) == (2, {1: "x", 2: "y"}, 2)


def test_a_deleted_task_leaves_only_its_last_number_and_what_the_inbox_published() -> None:
    state = State([publish(1, "a", 1, "x", "inbox"), publish(2, "a", 2, "y"), delete(3, "a")])
    task = state.tasks["a"]
    assert (task.live, task.versions, task.inbox_digest, task.last_event) == (None, {}, "x", 3)
    assert state.next_version("a") == 3


def test_an_event_changes_only_the_tasks_that_it_names() -> None:
    state = State([publish(1, "a", 1, "x"), publish(2, "b", 1, "x"), delete(3, "a"), delete(4, "unheard-of")])
    assert state.tasks["b"].live == 1
    assert state.tasks["b"].last_event == 2
    assert set(state.tasks) == {"a", "b"}
    assert state.last_event == 4
    assert state.next_version("c") == 1
