"""Turns a command into its one event, or into the error that refuses it: pure functions of the state.

If another server's event wins the number, the plan is made again, so its checks hold for exactly the state that
precedes the event. None means that nothing needs to change.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from server.errors import InvalidRequest, NothingToRollBackTo, PreconditionFailed, UnknownTask, VersionInUse
from server.registry.events import (
    Activate,
    Delete,
    DeleteVersion,
    NewVersion,
    Publish,
    Retire,
    RollBack,
    SetTraffic,
    Source,
    VersionContent,
    alone,
)
from server.registry.state import RegistryState, TaskState
from server.soft_prompts.names import MANY, check_task_name, unknown_task

Expected = int | Literal["any", "none"] | None
"""The precondition that a client sets for a task: the number of its last event, that it exists, that it does not exist,
or none."""


MAX_VERSIONS = 1000
"""Of one task; each stays in memory and in every list until it is deleted."""


@dataclass(frozen=True)
class PublishPlan:
    """The outcome of planning a publish: the versions that the contents have or will get.

    Attributes:
        versions: one of each content, with the content that it has.
        change: the change to record; None if nothing needs to change.
        etag: the first task's ETag before the change; 0 if the task does not exist.
    """

    versions: tuple[NewVersion, ...]
    change: Publish | None
    etag: int


def publish(
    state: RegistryState,
    items: Sequence[tuple[str, VersionContent]],
    source: Source,
    activate: bool,
    expected: Expected,
    is_broken: Callable[[VersionContent], bool],
    by: str | None = None,
) -> PublishPlan:
    """Plan new versions.

    A content that is already the task's only live version gets no new version, unless that version cannot be served.
    """
    for name, _ in items:
        check_expected(state, name, expected)
    versions = tuple(_new_version(state, name, content, is_broken) for name, content in items)
    for item in versions:
        _check_room(item, _task(state, item.task))
    is_new = any(item.version not in _task(state, item.task).versions for item in versions)
    unseen = source == "inbox" and any(
        _task(state, item.task).inbox_identity(by) != item.content.identity for item in versions
    )
    change = Publish(versions, activate) if is_new or unseen else None
    first = _task(state, versions[0].task)
    return PublishPlan(versions, change, first.last_event if first.versions else 0)


def activate(state: RegistryState, name: str, version: int, expected: Expected) -> Activate | None:
    """One version, alone."""
    task = existing(state, name, expected)
    check_version(name, task.versions, version)
    return None if task.traffic == alone(version) else Activate(name, version)


def set_traffic(state: RegistryState, name: str, weights: Mapping[int, int], expected: Expected) -> SetTraffic | None:
    """Versions by weight."""
    task = existing(state, name, expected)
    for version in weights:
        check_version(name, task.versions, version)
    if min(weights.values(), default=-1) < 0 or sum(weights.values()) != 100:
        raise InvalidRequest(
            f"The weights {dict(weights)} are not shares of 100.",
            remedy='Send a whole number for each version, 100 in all: {"3": 90, "4": 10}.',
        )
    traffic = tuple(sorted((version, weight) for version, weight in weights.items() if weight))
    return None if task.traffic == traffic else SetTraffic(name, traffic)


def roll_back(state: RegistryState, name: str, expected: Expected) -> RollBack:
    """Plan a rollback: the previously live versions answer again."""
    task = existing(state, name, expected)
    if not task.before:
        raise NothingToRollBackTo(f"Nothing that still exists answered for {name!r} before.")
    return RollBack(name)


def delete_version(state: RegistryState, name: str, version: int, expected: Expected) -> DeleteVersion:
    """A version that does not answer."""
    task = existing(state, name, expected)
    check_version(name, task.versions, version)
    if version in dict(task.traffic):
        raise VersionInUse(f"Version {version} of {name!r} answers requests.")
    return DeleteVersion(name, version)


def delete(state: RegistryState, name: str, expected: Expected) -> Delete:
    """A whole task."""
    existing(state, name, expected)
    return Delete(name)


def retire(state: RegistryState, tasks: Mapping[str, str], by: str | None) -> Retire | None:
    """Plan to retire those of the given tasks whose content is still what the inbox at `by` last published."""
    gone = tuple(name for name, identity in tasks.items() if _task(state, name).inbox_identity(by) == identity)
    return Retire(gone) if gone else None


def existing(state: RegistryState, name: str, expected: Expected = None) -> TaskState:
    """A task that has versions.

    Raises:
        InvalidTaskName, UnknownTask: it is no task.
        PreconditionFailed: it is not what the client believes.
    """
    check_task_name(name)
    task = state.tasks.get(name)
    if task is None or not task.versions:
        some = list(state.tasks.items()) if len(state.tasks) <= MANY else ()
        raise unknown_task(name, (known for known, other in some if other.versions))
    check_expected(state, name, expected)
    return task


def check_expected(state: RegistryState, name: str, expected: Expected) -> None:
    """Raise PreconditionFailed, with the task's state, unless the precondition holds."""
    task = _task(state, name)
    exists = bool(task.versions)
    if expected is None or (expected == "any" and exists) or (expected == "none" and not exists):
        return
    if exists and expected == task.last_event:
        return
    now = f'has the ETag "{task.last_event}"' if exists else "does not exist"
    wanted = {"any": "to exist", "none": "not to exist"}.get(str(expected), f'to have "{expected}"')
    raise PreconditionFailed(f"Task {name!r} {now}; the request expects it {wanted}.")


def check_version(name: str, versions: Collection[int], number: int) -> None:
    """Raise UnknownTask, with the newest versions, if the task has no version of this number."""
    if number not in versions:
        listed = ", ".join(map(str, sorted(versions)[-20:]))
        raise UnknownTask(f"Task {name!r} has no version {number}.", remedy=f"Its versions are {listed}.")


def _task(state: RegistryState, name: str) -> TaskState:
    return state.tasks.get(name) or TaskState()


def _check_room(item: NewVersion, task: TaskState) -> None:
    if item.version not in task.versions and len(task.versions) >= MAX_VERSIONS:
        raise InvalidRequest(
            f"Task {item.task!r} has {len(task.versions):,} versions; at most {MAX_VERSIONS:,} are kept.",
            remedy="Delete versions that you no longer need, then publish it again.",
        )


def _new_version(
    state: RegistryState, name: str, content: VersionContent, is_broken: Callable[[VersionContent], bool]
) -> NewVersion:
    live = _task(state, name).live_alone
    if live is not None and live.content.identity == content.identity and not is_broken(live.content):
        return NewVersion(name, live.number, live.content)
    return NewVersion(name, state.next_version(name), content)
