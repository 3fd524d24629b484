"""The tasks and versions that have a label of their own in metrics, at most a fixed number.

Every value of a label is a series that Prometheus keeps. So the first tasks that are asked get a place each, and the
others share one; a task that is deleted gives its place back. Of a task, versions that answer have values of their own,
and so have the last ones that did: what is compared most is a version with the one before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection

FROZEN_MODEL = "_model"
"""Requests without a task. No task can have a name that begins like this."""
OTHER = "_other"
"""Tasks without a place, and versions without a value."""
UNKNOWN = "_none"
"""Requests that were refused before it was known which task they are for."""

MOST_VERSIONS = 8
"""Values that the versions of one task have at once."""


class TaskLabels:
    """Hands out label values; for one thread."""

    def __init__(
        self,
        most_tasks: int,
        answering: Callable[[str], Collection[int] | None],
        forget: Callable[[str, str | None], None],
    ) -> None:
        """No place is taken.

        Args:
            most_tasks: places.
            answering: versions that answer a task; None if there is no such task.
            forget: told of a task, or of a task and a version, whose values are no longer used.
        """
        self._most_tasks = most_tasks
        self._answering = answering
        self._forget = forget
        self._places: dict[str, OrderedDict[int, None]] = {}  # task -> versions, least recently used first

    def of(self, task: str | None, version: int | None) -> tuple[str, str]:
        """Values for a task and a version; "" for the version where it is none, or one of a task without a place."""
        if task is None:
            return FROZEN_MODEL, ""
        if task not in self._places and not self._take_place(task):
            return OTHER, ""
        return task, "" if version is None else self._version(task, version)

    def forget_deleted(self) -> None:
        """Take back the places of tasks that are gone."""
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
