"""An index: which tasks have versions with a key, which is a digest or a prefix hash."""

from __future__ import annotations

from collections import Counter


class Holders:
    """Tasks by key. One thread changes it; any thread may read.

    Most keys belong to one version of one task, and then only that task's name is kept.
    """

    __slots__ = ("_tasks",)

    def __init__(self) -> None:
        self._tasks: dict[str, str | Counter[str]] = {}

    def add(self, key: str, task: str) -> None:
        """One more version of the task has the key."""
        found = self._tasks.get(key)
        if found is None:
            self._tasks[key] = task
        elif isinstance(found, str):
            self._tasks[key] = Counter((found, task))
        else:
            found[task] += 1

    def remove(self, key: str, task: str) -> None:
        """One version of the task less has the key."""
        found = self._tasks[key]
        if isinstance(found, str):
            del self._tasks[key]
            return
        found[task] -= 1
        if not found[task]:
            del found[task]
        if len(found) == 1 and set(found.values()) == {1}:
            self._tasks[key] = next(iter(found))

    def tasks(self, key: str) -> list[str]:
        """Names of the tasks that have a version with this key."""
        found = self._tasks.get(key, ())
        return [found] if isinstance(found, str) else list(found)

    def __contains__(self, key: str) -> bool:
        return key in self._tasks
