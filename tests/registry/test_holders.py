"""The index of tasks by digest and by prefix hash."""

from __future__ import annotations

import random
from collections import Counter

from server.registry.holders import Holders


def test_a_key_has_exactly_the_tasks_with_a_version_of_it() -> None:
    holders, dice, versions = Holders(), random.Random(0), list[tuple[str, str]]()
    for _ in range(3000):
        if versions and dice.random() < 0.5:
            key, task = versions.pop(dice.randrange(len(versions)))
            holders.remove(key, task)
        else:
            key, task = dice.choice("xyz"), dice.choice("abcd")
            versions.append((key, task))
            holders.add(key, task)
        for key in "xyz":
            tasks = {task for known, task in versions if known == key}
            assert sorted(holders.tasks(key)) == sorted(tasks)
            assert (key in holders) == bool(tasks)
    one, other = Holders(), Holders()
    for key, task in versions:
        one.add(key, task)
    for key, task in reversed(versions):
        other.add(key, task)
    assert one._tasks == other._tasks == holders._tasks, "whatever came first"


def test_a_key_of_one_version_keeps_only_a_name() -> None:
    holders = Holders()
    holders.add("x", "a")
    holders.add("x", "b")
    assert isinstance(holders._tasks["x"], Counter)
    holders.remove("x", "a")
    assert holders._tasks == {"x": "b"}
