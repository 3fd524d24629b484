"""What changes and reads of one task mean, written a second time: what the histories of real servers are checked by."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Traffic = tuple[tuple[int, int], ...]
Answer = tuple[object, ...]


class Task(NamedTuple):
    """One task.

    Attributes:
        last: the highest number that a version ever had.
        versions: number and content of each version, by number.
        history: the live versions with their weights over time, the current ones last.
    """

    last: int = 0
    versions: tuple[tuple[int, str], ...] = ()
    history: tuple[Traffic, ...] = ()

    @property
    def traffic(self) -> Traffic:
        return self.history[-1] if self.history else ()

    @property
    def live(self) -> int | None:
        """The version with the largest share."""
        return max(self.traffic, key=lambda pair: pair[1])[0] if self.traffic else None

    def with_traffic(self, traffic: Traffic) -> Task:
        return self if traffic == self.traffic else self._replace(history=(*self.history, traffic))


Change = Callable[[Task], tuple[Task, Answer]]

UNKNOWN_TASK: Answer = ("refused", "unknown_task")


def shown(task: Task) -> Answer:
    """What a list of versions shows."""
    return ("shows", task.live, task.traffic, tuple(number for number, _ in task.versions))


def publish(content: str, activate: bool) -> Change:
    def change(task: Task) -> tuple[Task, Answer]:
        if len(task.traffic) == 1 and dict(task.versions)[task.traffic[0][0]] == content:
            return task, ("published", task.traffic[0][0], False)
        number = task.last + 1
        after = Task(number, (*task.versions, (number, content)), task.history)
        return after.with_traffic(((number, 100),)) if activate else after, ("published", number, True)

    return change


def set_traffic(traffic: Traffic) -> Change:
    def change(task: Task) -> tuple[Task, Answer]:
        if not {number for number, _ in traffic} <= dict(task.versions).keys():
            return task, UNKNOWN_TASK
        after = task.with_traffic(tuple(sorted(traffic)))
        return after, shown(after)

    return change


def roll_back(task: Task) -> tuple[Task, Answer]:
    if not task.versions:
        return task, UNKNOWN_TASK
    history = list(task.history)
    while history and history[-1] == task.traffic:
        history.pop()
    if not history:
        return task, ("refused", "nothing_to_roll_back_to")
    after = task._replace(history=tuple(history))
    return after, shown(after)


def delete_version(number: int) -> Change:
    def change(task: Task) -> tuple[Task, Answer]:
        if number not in dict(task.versions):
            return task, UNKNOWN_TASK
        if number in dict(task.traffic):
            return task, ("refused", "version_in_use")
        return (
            Task(
                task.last,
                tuple(pair for pair in task.versions if pair[0] != number),
                tuple(traffic for traffic in task.history if number not in dict(traffic)),
            ),
            ("gone",),
        )

    return change


def delete(task: Task) -> tuple[Task, Answer]:
    return (Task(task.last), ("gone",)) if task.versions else (task, UNKNOWN_TASK)


def may_show(task: Task, answer: Answer) -> bool:
    """Whether a description of the task may be this."""
    if not task.versions:
        return answer == UNKNOWN_TASK
    content = None if task.live is None else dict(task.versions)[task.live]
    return answer == (*shown(task), content)


def may_generate(task: Task, version: int | None, answer: Answer) -> bool:
    """Whether a request for the task, or for one version of it, may have this answer."""
    if answer == UNKNOWN_TASK:
        return version not in dict(task.versions) if version else not task.traffic
    return answer in [("answers", number) for number in dict(task.versions if version else task.traffic)] and (
        not version or answer == ("answers", version)
    )
