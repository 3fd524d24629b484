"""Events and their fold: the only place that says what a change means."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, get_args

import pytest

from server.errors import StoreError
from server.registry.events import (
    KINDS,
    Activate,
    Change,
    Delete,
    DeleteVersion,
    Event,
    NewVersion,
    Publish,
    Retire,
    RollBack,
    SetTraffic,
    Source,
    VersionContent,
)
from server.registry.manifest_text import ManifestText
from server.registry.state import RegistryState, TaskState


def content(digest: str, **manifest: Any) -> VersionContent:
    return VersionContent(
        digest, f"prefix of {digest}", "PROMPT_TUNING", (5, 8), 160, f"{digest}-1", ManifestText(json.dumps(manifest))
    )


def publish(version: int, digest: str, task: str = "a", *, activate: bool = True) -> Publish:
    return Publish((NewVersion(task, version, content(digest)),), activate)


def fold(*changes: Change | tuple[Change, Source]) -> RegistryState:
    """The state after these changes, of the API where no source is given."""
    pairs = [change if isinstance(change, tuple) else (change, "api") for change in changes]
    return RegistryState(Event(n, "now", source, None, change) for n, (change, source) in enumerate(pairs, 1))


def task(*changes: Change | tuple[Change, Source]) -> TaskState:
    return fold(*changes).tasks["a"]


PUBLISHED = [publish(1, "x"), publish(2, "y"), publish(3, "z")]

EVERY_KIND: list[Change] = [
    Publish((NewVersion("a", 1, content("x", description="Größe")), NewVersion("b", 2, content("y"))), False),
    Activate("a", 1),
    SetTraffic("a", ((1, 90), (2, 10))),
    RollBack("a"),
    DeleteVersion("a", 1),
    Delete("a"),
    Retire(("a", "b")),
]


def test_every_kind_of_change_is_listed() -> None:
    kinds = [field.default for cls in get_args(get_args(Change)[0]) for field in fields(cls) if field.name == "kind"]
    assert list(KINDS) == kinds == [change.kind for change in EVERY_KIND]


@pytest.mark.parametrize("change", EVERY_KIND, ids=lambda change: change.kind)
def test_an_event_is_read_as_it_was_written(change: Change) -> None:
    event = Event(7, "2026-01-01T00:00:00.000+00:00", "inbox", "host:/prompts", change)
    assert Event.parse(event.to_json(), "7.json") == Event(
        event.number, event.at, event.source, event.by, _normal(change)
    )


def _normal(change: Change) -> Change:
    """With its manifests as they are written: without white space."""
    if not isinstance(change, Publish):
        return change
    parsed = Event.parse(Event(1, "", "api", None, change).to_json(), "1.json").change
    assert isinstance(parsed, Publish)
    for before, after in zip(change.published, parsed.published, strict=True):
        assert json.loads(before.content.manifest.text) == json.loads(after.content.manifest.text)
    return parsed


GOOD = json.loads(Event(7, "now", "api", None, EVERY_KIND[0]).to_json())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps(GOOD | {"of_tomorrow": 1}).encode(),
        json.dumps(GOOD | {"number": "seven"}).encode(),
        json.dumps(GOOD | {"change": {"kind": "rename", "task": "a"}}).encode(),
        json.dumps(GOOD | {"change": {"kind": "activate", "task": "a"}}).encode(),
        json.dumps(GOOD | {"change": {"kind": "activate", "task": "a", "version": 1, "weight": 2}}).encode(),
        json.dumps(GOOD)[:-5].encode(),
    ],
)
def test_what_cannot_be_understood_whole_is_an_error_that_names_the_file(data: bytes) -> None:
    with pytest.raises(StoreError, match=r"000000000007\.json"):
        Event.parse(data, "000000000007.json")


def test_the_last_publish_answers_and_the_versions_before_it_stay() -> None:
    state = task(*PUBLISHED)
    assert state.traffic == ((3, 100),)
    assert {n: version.content.digest for n, version in state.versions.items()} == {1: "x", 2: "y", 3: "z"}
    assert (state.last_version, state.last_event) == (3, 3)


def test_a_staged_version_changes_nothing_about_who_answers() -> None:
    assert task(publish(1, "x"), publish(2, "y", activate=False)).traffic == ((1, 100),)
    assert task(publish(1, "x", activate=False)).traffic == ()


def test_rolling_back_goes_back_as_often_as_it_is_done() -> None:
    assert task(*PUBLISHED, RollBack("a")).traffic == ((2, 100),)
    assert task(*PUBLISHED, RollBack("a"), RollBack("a")).traffic == ((1, 100),)
    assert task(*PUBLISHED, RollBack("a"), RollBack("a")).before == ()
    assert task(*PUBLISHED, Activate("a", 1), RollBack("a")).traffic == ((3, 100),)


def test_a_canary_is_in_the_history_like_any_other() -> None:
    canary = SetTraffic("a", ((1, 90), (2, 10)))
    assert task(*PUBLISHED, canary).traffic == ((1, 90), (2, 10))
    assert task(*PUBLISHED, canary, RollBack("a")).traffic == ((3, 100),)
    assert task(*PUBLISHED, canary, Activate("a", 2), RollBack("a")).traffic == ((1, 90), (2, 10))


def test_a_deleted_version_is_passed_over_on_the_way_back() -> None:
    assert task(*PUBLISHED, DeleteVersion("a", 2), RollBack("a")).traffic == ((1, 100),)
    assert task(*PUBLISHED, Activate("a", 2), Activate("a", 3), DeleteVersion("a", 2)).before == ((1, 100),)


def test_a_deleted_task_leaves_only_its_last_number_and_what_the_inbox_published() -> None:
    state = fold((publish(1, "x"), "inbox"), publish(2, "y"), Delete("a"))
    left = state.tasks["a"]
    assert (left.traffic, left.versions, left.history) == ((), {}, [])
    assert left.inbox_identity(None) == content("x").identity
    assert state.next_version("a") == 3
    assert (state.digests._tasks, state.prefixes._tasks) == ({}, {})


def test_what_came_from_the_inbox_retires_with_its_directory_and_keeps_its_versions() -> None:
    retired = task((publish(1, "x"), "inbox"), Retire(("a",)))
    assert (retired.traffic, list(retired.versions), retired.inbox) == ((), [1], {})
    assert task((publish(1, "x"), "inbox"), Retire(("a",)), RollBack("a")).traffic == ((1, 100),)
    replaced = task((publish(1, "x"), "inbox"), publish(2, "y"), Retire(("a",)))
    assert replaced.traffic == ((2, 100),), "an upload over it is nobody's directory"


def test_the_inbox_can_mark_what_is_live_as_its_own_without_a_new_version() -> None:
    seen = task(publish(1, "x"), (publish(1, "x"), "inbox"))
    assert (list(seen.versions), seen.history) == ([1], [((1, 100),)])
    assert seen.inbox_identity(None) == content("x").identity


def by(place: str, change: Change) -> tuple[Change, str]:
    return change, place


def inboxes(*changes: tuple[Change, str]) -> TaskState:
    """The task after what inboxes at these places did."""
    return RegistryState(Event(n, "now", "inbox", place, change) for n, (change, place) in enumerate(changes, 1)).tasks[
        "a"
    ]


X, Y = content("x").identity, content("y").identity
HERE, THERE, MOVED = "one:/here", "one:/there", "two:/here"


def test_each_inbox_holds_what_it_published_last() -> None:
    both = inboxes(by(HERE, publish(1, "x")), by(THERE, publish(2, "y")))
    assert (both.inbox_identity(HERE), both.inbox_identity(THERE)) == (X, Y)
    assert both.inbox_identity(None) is None
    changed = inboxes(by(HERE, publish(1, "x")), by(THERE, publish(2, "y")), by(HERE, publish(3, "y")))
    assert (changed.inbox_identity(HERE), changed.inbox_identity(THERE)) == (Y, Y)


def test_an_inbox_on_a_host_of_another_name_holds_what_was_last_published_from_its_path() -> None:
    history = [by(HERE, publish(1, "x")), by("two:/here", publish(2, "y")), by(THERE, publish(3, "z"))]
    assert inboxes(*history).inbox_identity("three:/here") == Y
    assert inboxes(*history, by(HERE, publish(4, "x"))).inbox_identity("three:/here") == X
    assert inboxes(*history, by(HERE, publish(4, "x"))).inbox_identity("two:/here") == Y, "it has a record of its own"


def test_a_directory_that_is_removed_takes_along_what_no_other_inbox_holds() -> None:
    published = by(HERE, publish(1, "x"))
    for place in (HERE, MOVED):
        assert inboxes(published, by(place, Retire(("a",)))).traffic == ()
    for place in (THERE, "one:/elsewhere"):
        elsewhere = inboxes(published, by(place, Retire(("a",))))
        assert (elsewhere.traffic, elsewhere.inbox_identity(HERE)) == (((1, 100),), X)
    shared = [published, by(THERE, publish(1, "x")), by(HERE, Retire(("a",)))]
    assert (inboxes(*shared).traffic, inboxes(*shared).inbox) == (((1, 100),), {THERE: X})
    assert inboxes(*shared, by(THERE, Retire(("a",)))).traffic == ()
    replaced = inboxes(published, by(THERE, publish(2, "y")), by(HERE, Retire(("a",))))
    assert (replaced.traffic, replaced.inbox) == (((2, 100),), {THERE: Y})


def test_looking_ahead_changes_nothing_about_what_inboxes_hold() -> None:
    state = RegistryState([Event(1, "now", "inbox", HERE, publish(1, "x"))])
    state.ahead([Event(2, "now", "inbox", THERE, publish(2, "y")), Event(3, "now", "inbox", HERE, Retire(("a",)))])
    assert state.tasks["a"].inbox == {HERE: X}


def test_a_digest_is_counted_as_long_as_a_version_has_it() -> None:
    state = fold(publish(1, "x"), publish(1, "x", "b"), Delete("a"))
    assert state.digests._tasks == {"x": "b"}
    assert state.prefixes._tasks == {"prefix of x": "b"}


@pytest.mark.parametrize(
    "change", [Activate("a", 9), SetTraffic("a", ((9, 100),)), DeleteVersion("a", 9), Delete("b"), Retire(("a", "b"))]
)
def test_an_event_that_does_not_follow_is_an_error_and_changes_nothing(change: Change) -> None:
    state = fold(publish(1, "x"))
    with pytest.raises(StoreError, match="event 2"):
        state.apply(Event(2, "now", "inbox", None, change))
    assert (state.last_event, state.tasks["a"].traffic) == (1, ((1, 100),))


def test_what_a_download_fills_in_is_no_difference_and_a_description_is_one() -> None:
    plain = content("x", description="one")
    assert content("x", description="one", task="a", prefix_hash="p", created_at="now").identity == plain.identity
    assert content("x", description="two").identity != plain.identity
    assert content("y", description="one").identity != plain.identity
