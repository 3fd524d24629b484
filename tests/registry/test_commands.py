"""Plans: what a wish leads to at one state, or why it is refused; and whom a canary picks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import pytest

from server.errors import (
    InvalidRequest,
    InvalidTaskName,
    NothingToRollBackTo,
    PreconditionFailed,
    PreludeError,
    UnknownTask,
    VersionInUse,
)
from server.registry import commands as plans
from server.registry.commands import Expected, PublishPlan
from server.registry.events import (
    Activate,
    Change,
    DeleteVersion,
    Event,
    NewVersion,
    Publish,
    Retire,
    SetTraffic,
    Source,
    Traffic,
    VersionContent,
)
from server.registry.manifest_text import ManifestText
from server.registry.state import RegistryState
from server.registry.task_views import Task


def content(digest: str) -> VersionContent:
    return VersionContent(
        digest, f"prefix of {digest}", "PROMPT_TUNING", (2, 4), 32, f"blob of {digest}", ManifestText("{}")
    )


def fold(*changes: Change | tuple[Change, Source]) -> RegistryState:
    pairs = [change if isinstance(change, tuple) else (change, "api") for change in changes]
    return RegistryState(Event(n, "now", source, None, change) for n, (change, source) in enumerate(pairs, 1))


def published(version: int, digest: str, task: str = "a", activate: bool = True) -> Publish:
    return Publish((NewVersion(task, version, content(digest)),), activate)


STATE = fold(published(1, "x"), published(2, "y"), published(3, "z", activate=False), published(1, "x", "b"))
"""Version 2 of `a` answers; event 3 was its last."""


def place(
    state: RegistryState, *digests: str, source: Source = "api", expected: Expected = None, broken: str = ""
) -> PublishPlan:
    items = [(name, content(digest)) for name, digest in zip(("a", "b"), digests, strict=False)]
    return plans.publish(state, items, source, True, expected, lambda known: known.digest == broken)


def test_a_content_that_answers_alone_stays_and_any_other_is_a_new_version() -> None:
    assert place(STATE, "y") == PublishPlan((NewVersion("a", 2, content("y")),), None, 3)
    for digest in ("x", "z", "w"):  # an older one, a staged one, an unheard-of one
        placed = place(STATE, digest)
        assert placed.versions == (NewVersion("a", 4, content(digest)),)
        assert placed.change == Publish(placed.versions)
    assert [item.version for item in place(STATE, "w", "x").versions] == [4, 1], "each by itself"
    assert place(RegistryState(), "x") == PublishPlan((NewVersion("a", 1, content("x")),), published(1, "x"), 0)


def test_a_content_that_answers_but_cannot_be_served_is_a_new_version() -> None:
    assert place(STATE, "y", broken="y").versions[0].version == 4


def test_a_content_that_answers_only_some_is_a_new_version() -> None:
    canary = fold(published(1, "x"), published(2, "y"), SetTraffic("a", ((1, 90), (2, 10))))
    assert place(canary, "x").versions[0].version == 3


def test_what_stays_is_the_version_with_its_own_blob() -> None:
    again = VersionContent("y", "prefix of y", "PROMPT_TUNING", (2, 4), 32, "another blob", ManifestText("{}"))
    kept = plans.publish(STATE, [("a", again), ("b", content("w"))], "api", True, None, lambda known: False)
    assert [item.content.blob for item in kept.versions] == ["blob of y", "blob of w"]


def test_the_inbox_marks_what_answers_once() -> None:
    marked = place(STATE, "y", source="inbox")
    assert marked.change == published(2, "y")
    assert place(fold(published(1, "y"), (published(1, "y"), "inbox")), "y", source="inbox").change is None


def test_a_publish_after_a_delete_says_that_there_was_no_task() -> None:
    deleted = fold(published(1, "x"), plans.delete(STATE, "a", None))
    assert place(deleted, "x", expected="none").etag == 0
    assert place(deleted, "x").versions[0].version == 2


CHANGES: dict[str, Callable[[Expected], object]] = {
    "publish": lambda expected: place(STATE, "w", expected=expected),
    "publish what answers": lambda expected: place(STATE, "y", expected=expected),
    "activate": lambda expected: plans.activate(STATE, "a", 1, expected),
    "activate what answers": lambda expected: plans.activate(STATE, "a", 2, expected),
    "traffic": lambda expected: plans.set_traffic(STATE, "a", {1: 50, 2: 50}, expected),
    "roll back": lambda expected: plans.roll_back(STATE, "a", expected),
    "delete version": lambda expected: plans.delete_version(STATE, "a", 1, expected),
    "delete": lambda expected: plans.delete(STATE, "a", expected),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_condition_holds_or_the_change_is_refused(change: Callable[[Expected], object]) -> None:
    for holds in (None, "any", 3):
        change(holds)
    for fails in ("none", 2, 4, 0):
        with pytest.raises(PreconditionFailed, match='"3"'):
            change(fails)


@pytest.mark.parametrize("state", [RegistryState(), fold(published(1, "x"), plans.delete(STATE, "a", None))])
def test_a_task_that_is_not_there_or_not_any_more_meets_only_none(state: RegistryState) -> None:
    place(state, "x", expected="none")
    for expected in ("any", 0, 1, 2):
        with pytest.raises(PreconditionFailed, match="does not exist"):
            place(state, "x", expected=expected)


def test_a_condition_is_about_every_row() -> None:
    with pytest.raises(PreconditionFailed, match="'b'"):
        place(STATE, "w", "w", expected=3)


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ({}, InvalidRequest),
        ({1: 99}, InvalidRequest),
        ({1: 50, 2: 51}, InvalidRequest),
        ({1: 150, 2: -50}, InvalidRequest),
        ({1: 0, 2: 0}, InvalidRequest),
        ({1: 50, 9: 50}, UnknownTask),
        ({1: 100, 9: 0}, UnknownTask),
    ],
)
def test_weights_that_are_no_shares_of_existing_versions_are_refused(
    weights: Mapping[int, int], error: type[PreludeError]
) -> None:
    with pytest.raises(error):
        plans.set_traffic(STATE, "a", weights, None)


def test_weights_are_kept_in_the_order_of_versions_and_without_nothings() -> None:
    planned = plans.set_traffic(STATE, "a", {3: 10, 1: 90, 2: 0}, None)
    assert planned == SetTraffic("a", ((1, 90), (3, 10)))
    assert plans.set_traffic(STATE, "a", {2: 100, 1: 0}, None) is None, "it is so already"


def test_what_answers_already_needs_no_event() -> None:
    assert plans.activate(STATE, "a", 2, None) is None
    assert plans.activate(STATE, "a", 3, None) == Activate("a", 3)
    canary = fold(published(1, "x"), published(2, "y"), SetTraffic("a", ((1, 90), (2, 10))))
    assert plans.activate(canary, "a", 1, None) == Activate("a", 1), "to answer alone is something else"


def test_what_does_not_exist_is_refused_with_what_does() -> None:
    for change in (plans.activate, plans.delete_version):
        with pytest.raises(UnknownTask, match="no version 9") as caught:
            change(STATE, "a", 9, None)
        assert "1, 2, 3" in caught.value.remedy
    with pytest.raises(UnknownTask, match="Did you mean a"):
        plans.delete(STATE, "aa", None)
    with pytest.raises(InvalidTaskName):
        plans.delete(STATE, "A", None)
    with pytest.raises(UnknownTask):
        plans.delete(fold(published(1, "x"), plans.delete(STATE, "a", None)), "a", None)


def test_only_what_answers_nobody_can_be_deleted() -> None:
    canary = fold(published(1, "x"), published(2, "y"), SetTraffic("a", ((1, 99), (2, 1))))
    for state, version in ((STATE, 2), (canary, 1), (canary, 2)):
        with pytest.raises(VersionInUse):
            plans.delete_version(state, "a", version, None)
    plans.delete_version(STATE, "a", 3, None)


def test_rolling_back_needs_somebody_else_who_answered() -> None:
    retired = [(published(1, "x"), "inbox"), Retire(("a",))]
    plans.roll_back(fold(*retired), "a", None)  # type: ignore[arg-type]
    nothing_else = [
        fold(published(1, "x", activate=False)),
        fold(published(1, "x")),
        fold(*retired, Activate("a", 1)),  # type: ignore[arg-type]
        fold(published(1, "x"), published(2, "y"), plans.delete_version(STATE, "a", 1, None)),
    ]
    for state in nothing_else:
        with pytest.raises(NothingToRollBackTo):
            plans.roll_back(state, "a", None)


def test_only_what_the_inbox_holds_is_retired() -> None:
    state = fold((published(1, "x"), "inbox"), published(1, "x", "b"))
    x, y = content("x").identity, content("y").identity
    assert plans.retire(state, {"a": x, "b": x, "unheard-of": x}, None) == Retire(("a",))
    assert plans.retire(state, {"b": x, "unheard-of": x}, None) is None
    assert plans.retire(state, {"a": y}, None) is None, "somebody has put other content there since"
    assert plans.retire(state, {"a": x}, "host:/elsewhere") is None, "it came from another inbox"


# Whom a canary picks

KEYS = [f"user {i}" for i in range(4000)]


def picks(traffic: Traffic, task: str = "a") -> dict[str, int | None]:
    return {key: Task(task, traffic, {}, 1).pick(key) for key in KEYS}


def test_each_version_answers_about_its_share() -> None:
    counts = Counter(picks(((1, 5), (2, 35), (7, 60))).values())
    for version, weight in ((1, 5), (2, 35), (7, 60)):
        assert abs(counts[version] - 40 * weight) < 120, "four standard deviations of 4000 throws"


def test_a_task_keeps_a_bounded_number_of_versions_and_takes_more_once_some_are_deleted() -> None:
    full = [Publish((NewVersion("a", n, content(str(n))),)) for n in range(1, plans.MAX_VERSIONS + 1)]
    state = RegistryState(Event(n, "now", "api", None, change) for n, change in enumerate(full, 1))

    def publish(digest: str) -> PublishPlan:
        return plans.publish(state, [("a", content(digest))], "api", True, None, lambda _: False)

    assert publish(str(plans.MAX_VERSIONS)).change is None, "it answers already"
    with pytest.raises(InvalidRequest, match="at most 1,000 are kept"):
        publish("new")
    state.apply(Event(plans.MAX_VERSIONS + 1, "now", "api", None, DeleteVersion("a", 1)))
    assert publish("new").versions[0].version == plans.MAX_VERSIONS + 1


@pytest.mark.parametrize(("canary", "stable"), [(1, 2), (2, 1)])
def test_a_growing_share_keeps_its_users_whichever_version_is_older(canary: int, stable: int) -> None:
    grown: set[str] = set()
    for share in (1, 10, 50, 90, 99):
        traffic = tuple(sorted([(canary, share), (stable, 100 - share)]))
        users = {key for key, version in picks(traffic).items() if version == canary}
        assert grown < users
        grown = users


def test_everybody_is_on_the_same_side_on_every_server() -> None:
    # Fixed, because servers of different builds share a store: another hash would move users when one restarts.
    assert [picks(((1, 50), (2, 50)))[key] for key in KEYS[:12]] == [1, 1, 2, 1, 2, 2, 2, 2, 2, 2, 1, 2]


def test_who_is_in_one_tasks_canary_is_not_for_that_in_anothers() -> None:
    one, other = picks(((1, 50), (2, 50))), picks(((1, 50), (2, 50)), "b")
    assert 0.4 < sum(one[key] == other[key] for key in KEYS) / len(KEYS) < 0.6


@pytest.mark.parametrize("key", ["", "\ud800", "\n", "x" * 10_000])
def test_any_text_is_a_key(key: str) -> None:
    assert Task("a", ((1, 50), (2, 50)), {}, 1).pick(key) in (1, 2)


def test_nobody_is_picked_where_nobody_answers() -> None:
    assert Task("a", (), {}, 1).pick("x") is None
    assert Task("a", ((3, 100),), {}, 1).pick("x") == 3
