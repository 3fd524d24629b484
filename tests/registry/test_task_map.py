from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

from server.registry.task_map import MOST_INSERTED, MOST_MOVED, TaskMap


def test_a_task_map_is_a_dictionary_that_never_changes() -> None:
    dice, truth, maps = random.Random(1), dict[str, Any](), list[tuple[TaskMap, dict[str, Any]]]()
    tasks = TaskMap()
    for step in range(600):
        changes: dict[str, Any] = {
            f"t{dice.randrange(300)}": None if dice.random() < 0.4 else step for _ in range(dice.choice([1, 1, 2, 90]))
        }
        tasks = tasks.replaced(changes.items())
        truth = {name: task for name, task in {**truth, **changes}.items() if task is not None}
        if dice.random() < 0.3:
            assert list(tasks.names) == sorted(truth)
        maps.append((tasks, truth))
    for kept, expected in maps:
        assert dict(kept) == expected
        assert (len(kept), list(kept.names)) == (len(expected), sorted(expected))


def test_a_change_of_one_task_copies_few_others() -> None:
    tasks = TaskMap().replaced((f"t{number}", number) for number in range(20_000))  # type: ignore[misc]
    changed = tasks.replaced([("t1", None)])
    shared = sum(part is other for part, other in zip(tasks._parts, changed._parts, strict=True))
    assert shared == len(tasks._parts) - 1
    with pytest.raises(KeyError):
        changed["t1"]


def test_a_few_new_names_do_not_have_all_names_sorted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = TaskMap().replaced((f"t{number:04}", number) for number in range(2000))  # type: ignore[misc]
    assert len(tasks.names) == 2000
    monkeypatch.setattr("builtins.sorted", lambda names: pytest.fail("all names are sorted"))
    for number in range(MOST_MOVED):
        tasks = tasks.replaced([(f"t0500-{number:03}", None if number % 5 == 0 else number)])  # type: ignore[list-item]
    names = list(tasks.names)
    assert all(a < b for a, b in pairwise(names))


@pytest.mark.parametrize("new", [MOST_MOVED + 1, MOST_INSERTED + 1])
def test_a_list_after_many_changes_finds_the_names_in_order(new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = TaskMap().replaced((f"t{number:04}", number) for number in range(2000))  # type: ignore[misc]
    assert len(tasks.names) == 2000
    names = [f"t0500-{number:03}" for number in range(new)]
    tasks = tasks.replaced([("t0100", None), *((name, 1) for name in names)])  # type: ignore[list-item]
    assert tasks._order is not None
    assert not tasks._order[1], "the change has put them in order"
    assert list(tasks.names) == sorted(tasks)
    assert len(tasks.names) == 1999 + new
