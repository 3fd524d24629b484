"""However many tasks and versions there are and come and go, the metrics have a bounded number of label values."""

from __future__ import annotations

import random

import pytest

from server.api.telemetry.task_labels import FROZEN_MODEL, MOST_VERSIONS, OTHER, UNKNOWN, TaskLabels
from server.errors import InvalidTaskName
from server.soft_prompts.names import check_task_name


class Tasks:
    """Tasks with the versions that answer, and the label values in use, as a registry and a metric would have them."""

    def __init__(self, most_tasks: int) -> None:
        self.answering: dict[str, set[int]] = {}
        self.in_use: set[tuple[str, str]] = set()
        self.labels = TaskLabels(most_tasks, self.answering.get, self.forget)

    def ask(self, task: str | None, version: int | None = 1) -> tuple[str, str]:
        values = self.labels.of(task, version)
        self.in_use.add(values)
        return values

    def forget(self, task: str, version: str | None) -> None:
        self.in_use = {(t, v) for t, v in self.in_use if t != task or version not in (None, v)}


def tasks(most_tasks: int, *names: str) -> Tasks:
    found = Tasks(most_tasks)
    found.answering.update({name: {1} for name in names})
    return found


def test_the_first_tasks_have_values_of_their_own_and_the_others_share_one() -> None:
    known = tasks(2, "a", "b", "c", "d")
    assert [known.ask(name) for name in "abcda"] == [("a", "1"), ("b", "1"), (OTHER, ""), (OTHER, ""), ("a", "1")]


def test_a_task_that_is_deleted_gives_its_place_back() -> None:
    known = tasks(2, "a", "b", "c")
    for name in "abc":
        known.ask(name)
    del known.answering["a"]
    assert known.ask("c") == ("c", "1"), "a place is free when one is needed"
    assert ("a", "1") not in known.in_use
    del known.answering["b"]
    known.labels.forget_deleted()
    assert known.in_use == {("c", "1"), (OTHER, "")}


def test_the_last_request_of_a_deleted_task_takes_no_place() -> None:
    known = tasks(2, "a")
    known.ask("a")
    del known.answering["a"]
    known.labels.forget_deleted()
    assert known.ask("a") == (OTHER, "")


def test_without_places_all_tasks_are_others() -> None:
    assert tasks(0, "a").ask("a") == (OTHER, "")


def test_the_frozen_model_needs_no_place() -> None:
    known = tasks(0)
    assert known.ask(None, None) == (FROZEN_MODEL, "")


@pytest.mark.parametrize("value", [FROZEN_MODEL, OTHER, UNKNOWN])
def test_no_task_can_be_called_as_one_of_our_own_values(value: str) -> None:
    with pytest.raises(InvalidTaskName):
        check_task_name(value)


def test_versions_that_answer_have_values_of_their_own_and_staged_ones_share_one() -> None:
    known = tasks(1, "a")
    known.answering["a"] = {3, 4}
    assert [known.ask("a", version) for version in (3, 4, 5)] == [("a", "3"), ("a", "4"), ("a", OTHER)]


def test_a_version_that_was_replaced_goes_on_counting_as_itself() -> None:
    known = tasks(1, "a")
    known.ask("a", 1)
    known.answering["a"] = {2}
    assert [known.ask("a", version) for version in (2, 1)] == [("a", "2"), ("a", "1")]


def test_the_least_recently_used_of_the_replaced_versions_goes_first() -> None:
    known = tasks(1, "a")
    for version in range(1, MOST_VERSIONS + 1):
        known.answering["a"] = {version}
        known.ask("a", version)
    known.ask("a", 1)
    known.answering["a"] = {99}
    known.ask("a", 99)
    assert ("a", "2") not in known.in_use
    assert {("a", "1"), ("a", "99")} <= known.in_use


def test_a_canary_of_many_versions_does_not_take_more_values_than_there_are() -> None:
    known = tasks(1, "a")
    known.answering["a"] = set(range(1, 51))
    values = {known.ask("a", version)[1] for version in range(1, 51)}
    assert values == {OTHER, *map(str, range(1, MOST_VERSIONS + 1))}


@pytest.mark.parametrize("seed", range(5))
def test_in_any_storm_the_values_in_use_are_bounded_and_none_is_of_a_task_that_is_gone(seed: int) -> None:
    dice, most_tasks = random.Random(seed), 5
    known = tasks(most_tasks)
    for _ in range(3000):
        name = f"t{dice.randrange(12)}"
        action = dice.random()
        if action < 0.1:
            known.answering.pop(name, None)
        elif action < 0.4:
            known.answering[name] = {dice.randrange(1, 60) for _ in range(dice.randrange(0, 4))}
        else:
            known.ask(name, dice.randrange(1, 60))
        assert len(known.in_use) <= most_tasks * (MOST_VERSIONS + 1) + 1
    known.labels.forget_deleted()
    assert {task for task, _ in known.in_use} <= {*known.answering, OTHER}
