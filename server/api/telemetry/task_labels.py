"""Limits the number of tasks and versions that have their own label values in metrics.

Prometheus stores a series for each label value. Therefore only the first `most_tasks` tasks that get requests have
their own value; all other tasks share one. A deleted task frees its value. Within a task, live versions have their own
values, and so do the most recent former versions, because versions are usually compared with their predecessors.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection

FROZEN_MODEL = "_model"
"""Label of requests without a task. No task's name can begin with an underscore."""
OTHER = "_other"
"""Label of all tasks and versions without their own value."""
UNKNOWN = "_none"
"""Label of requests that were refused before their task was known."""

MOST_VERSIONS = 8
"""Maximum number of label values for the versions of a task."""


class TaskLabels:
    """Assigns label values. Not thread-safe."""

    def __init__(
        self,
        most_tasks: int,
        answering: Callable[[str], Collection[int] | None],
        forget: Callable[[str, str | None], None],
    ) -> None:
        """Start without tasks.

        `answering` returns the live versions of a task, or None without such a task. `forget` is called with a task and
        None, or a version, whose values are no longer used.
        """
        self._most_tasks = most_tasks
        self._answering = answering
        self._forget = forget
        self._places: dict[str, OrderedDict[int, None]] = {}  # task -> versions, least recently used first

    def of(self, task: str | None, version: int | None) -> tuple[str, str]:
        """Label values for a task and a version; "" for no version, or if the task has no value of its own."""
        if task is None:
            return FROZEN_MODEL, ""
        if task not in self._places and not self._take_place(task):
            return OTHER, ""
        return task, "" if version is None else self._version(task, version)

    def forget_deleted(self) -> None:
        """Free the label values of deleted tasks."""
        for task in [task for task in self._places if self._answering(task) is None]:
            del self._places[task]
            self._forget(task, None)

    def _take_place(self, task: str) -> bool:
        if self._answering(task) is None:  # deleted while its last request ran
            return False
        if len(self._places) >= self._most_tasks:
            self.forget_deleted()
        if len(self._places) >= self._most_tasks:
            return False
        self._places[task] = OrderedDict()
        return True

    def _version(self, task: str, version: int) -> str:
        versions = self._places[task]
        if version in versions:
            versions.move_to_end(version)
            return str(version)
        answering = self._answering(task) or ()
        if version not in answering:
            return OTHER
        if len(versions) >= MOST_VERSIONS:
            oldest = next((number for number in versions if number not in answering), None)
            if oldest is None:
                return OTHER
            del versions[oldest]
            self._forget(task, str(oldest))
        versions[version] = None
        return str(version)
