"""The fold of the events: the registry's whole state, and the only place that defines what an event means.

The top of a task's history answers its requests, so a rollback removes the top. Version numbers come from the fold and
are never reused, not even after a delete; a deleted task leaves behind what must not be forgotten: its highest version
number, and the contents that inboxes have published under its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from server.errors import StoreError
from server.registry.events import (
    Activate,
    Delete,
    DeleteVersion,
    Event,
    NewVersion,
    Publish,
    Retire,
    RollBack,
    SetTraffic,
    Source,
    Traffic,
    VersionContent,
    alone,
    tasks_of,
)
from server.registry.holders import Holders
from server.registry.manifest_text import ManifestPacker
from server.registry.unreadable_events import Entry, Unreadable, UnreadableText

WHOLE_STORE = ".store"
"""Stands for all tasks; no task and no entry of the inbox can have this name."""


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A version of a task, as its events describe it."""

    task: str
    number: int
    content: VersionContent
    at: str
    source: Source
    by: str | None


@dataclass(slots=True)
class TaskState:
    """The state of one task.

    Attributes:
        versions: those that are not deleted, by number.
        history: the live versions over time, oldest first; the last entry is live now.
        last_version: highest number ever given.
        last_event: number of the last event that changed the task: its ETag.
        inbox: the identity of what each inbox last published under this name, so that a restart does not
            publish it again; the latest last.
    """

    versions: dict[int, StoredVersion] = field(default_factory=dict)
    history: list[Traffic] = field(default_factory=list)
    last_version: int = 0
    last_event: int = 0
    inbox: dict[str, str] = field(default_factory=dict)

    @property
    def traffic(self) -> Traffic:
        """The versions that are live now; () if there is none."""
        return self.history[-1] if self.history else ()

    @property
    def live_alone(self) -> StoredVersion | None:
        """The only live version; None in a canary, or if there is none."""
        return self.versions[self.traffic[0][0]] if len(self.traffic) == 1 else None

    @property
    def before(self) -> Traffic:
        """What was live before the current traffic; () if nothing else was."""
        return next((traffic for traffic in reversed(self.history) if traffic not in ((), self.traffic)), ())

    def inbox_identity(self, inbox: str | None) -> str | None:
        """The identity of what an inbox last published under this name; None if it holds nothing.

        A container has another host's name at each start, so an inbox that is new here is taken for the
        latest one of the same path.
        """
        own = self.inbox.get(inbox or "")
        if own is not None:
            return own
        return next((held for known, held in reversed(self.inbox.items()) if _path(known) == _path(inbox)), None)

    def note_inbox(self, inbox: str | None, identity: str) -> None:
        """Record that an inbox holds this content."""
        self.inbox.pop(inbox or "", None)
        self.inbox[inbox or ""] = identity

    def release_inbox(self, inbox: str | None) -> None:
        """Record that an inbox no longer holds it; if no other inbox does, a live version from there is retired."""
        identity, live = self.inbox_identity(inbox), self.live_alone
        self.inbox = {
            known: held for known, held in self.inbox.items() if held != identity or _path(known) != _path(inbox)
        }
        is_live = live is not None and live.source == "inbox" and live.content.identity == identity
        if is_live and identity not in self.inbox.values():
            self.let_answer(())

    def let_answer(self, traffic: Traffic) -> None:
        """Put this traffic on top of the history."""
        if traffic != self.traffic:
            self.history.append(traffic)

    def go_back(self) -> None:
        """Remove entries from the top of the history, down to different traffic with a live version."""
        now = self.traffic
        while self.history and self.history[-1] in ((), now):
            self.history.pop()

    def forget(self, number: int) -> None:
        """Remove a version, and from the history every entry that needs it."""
        del self.versions[number]
        self.history = [traffic for traffic in self.history if number not in dict(traffic)]


class RegistryState:
    """The fold of all events: every task that ever existed. An event that contradicts the state changes nothing.

    Attributes:
        tasks: by name.
        last_event: number of the last event that was applied.
        digests: tasks by the digests of their versions.
        prefixes: tasks by the prefix hashes of their versions.
        first_version: number of a new task's first version.
        is_whole: whether all events could be read; only then may it become a snapshot.
        packer: compresses the versions' manifests.
        deleted: blobs of versions that the events of the start deleted.
        problems: task -> why its last change has no effect here; WHOLE_STORE if the task is unknown.
    """

    def __init__(self, events: Iterable[Entry] = ()) -> None:
        """Fold events in the order of their numbers."""
        self.tasks: dict[str, TaskState] = {}
        self.last_event = 0
        self.digests = Holders()
        self.prefixes = Holders()
        self.packer = ManifestPacker()
        self.problems: dict[str, str] = {}
        self.first_version = 1
        self.is_whole = True
        self.deleted: set[str] = set()
        self.take_all(events)

    def take_all(self, events: Iterable[Entry]) -> None:
        """Apply the events of a start, and collect in `deleted` the blobs of versions that they deleted."""
        for event in events:
            _, removed = self.take(event)
            self.deleted.update(version.content.blob for version in removed)

    def copy(self) -> RegistryState:
        """A copy, which later events do not change: they change copies of the tasks that they are about."""
        state = RegistryState()
        state.tasks = dict(self.tasks)
        state.last_event, state.first_version, state.is_whole = self.last_event, self.first_version, self.is_whole
        return state

    def count(self, version: StoredVersion) -> None:
        """Take note of a new version."""
        self.packer.pack(version.content.manifest)
        self.digests.add(version.content.digest, version.task)
        self.prefixes.add(version.content.prefix_hash, version.task)

    def take(self, entry: Entry) -> tuple[set[str], list[StoredVersion]]:
        """Like `apply`; of an event that cannot be read, or contradicts the state, only the problem is recorded."""
        if isinstance(entry, Event):
            try:
                return self.apply(entry)
            except StoreError as exc:
                entry = Unreadable(entry.number, exc.message, frozenset(tasks_of(entry.change)))
        self.last_event, self.is_whole = entry.number, False
        for name in (WHOLE_STORE,) if entry.tasks is None else entry.tasks:
            self.problems[name] = entry.problem
        if entry.tasks is None:
            self.first_version += 1
        # The unreadable event may have published a version of any of these tasks, so one version number is skipped for
        # each.
        for name in list(self.tasks) if entry.tasks is None else entry.tasks:
            self.tasks.setdefault(name, TaskState())
            self._own(name).last_version += 1
        return set(entry.tasks or ()), []

    def apply(self, event: Event) -> tuple[set[str], list[StoredVersion]]:
        """Apply one more event; returns the tasks that it changed, and the versions that it removed.

        Raises StoreError if it contradicts the events before it.
        """
        try:
            removed = self._change(event)
        except KeyError as exc:
            raise StoreError(
                f"The store's event {event.number} changes {exc}, which the events before it do not know.",
                remedy="Restore the store's events from a backup.",
            ) from exc
        self.last_event = event.number
        touched = tasks_of(event.change)
        if isinstance(event.change, Delete):
            self.problems.pop(event.change.task, None)
        for name in touched:
            self.tasks[name].last_event = event.number
        for version in removed:
            self.digests.remove(version.content.digest, version.task)
            self.prefixes.remove(version.content.prefix_hash, version.task)
        return touched, removed

    def ahead(self, events: Sequence[Entry]) -> RegistryState:
        """The tasks of these events, as they will be after the events; this state does not change."""
        state = RegistryState()
        state.packer = self.packer
        changes = [event.change for event in events if isinstance(event, Event)]
        for name in {name for change in changes for name in tasks_of(change)} & self.tasks.keys():
            state.tasks[name] = self.tasks[name]
            for version in state.tasks[name].versions.values():
                state.count(version)
        for event in events:
            state.take(event)
        return state

    def next_version(self, task: str) -> int:
        """The number of the next version under this name."""
        return self.tasks[task].last_version + 1 if task in self.tasks else self.first_version

    def _change(self, event: Event) -> list[StoredVersion]:
        change = event.change
        if isinstance(change, Publish):
            for item in change.published:
                self._publish(item, event, change.activate)
            return []
        if isinstance(change, Retire):
            for task in [self._own(name) for name in change.tasks]:
                task.release_inbox(event.by)
            return []
        task = self._own(change.task)
        removed: list[StoredVersion] = []
        match change:
            case Activate():
                task.let_answer(alone(task.versions[change.version].number))
            case SetTraffic():
                task.let_answer(tuple((task.versions[number].number, weight) for number, weight in change.traffic))
            case RollBack():
                task.go_back()
            case DeleteVersion():
                removed = [task.versions[change.version]]
                task.forget(change.version)
            case Delete():
                removed = list(task.versions.values())
                task.versions.clear()
                task.history.clear()
        return removed

    def _own(self, name: str) -> TaskState:
        """A task that may be changed: a new copy, because copies of this state share the one before."""
        task = self.tasks[name] = _copy(self.tasks[name])
        return task

    def _publish(self, item: NewVersion, event: Event, activate: bool) -> None:
        self.tasks.setdefault(item.task, TaskState())
        task = self._own(item.task)
        if event.source == "inbox":
            task.note_inbox(event.by, item.content.identity)
        if item.version in task.versions:
            return
        if isinstance(item.content.manifest, UnreadableText):
            self.is_whole = False
        version = StoredVersion(item.task, item.version, item.content, event.at, event.source, event.by)
        task.versions[item.version] = version
        task.last_version = max(task.last_version, item.version)
        self.count(version)
        if activate:
            task.let_answer(alone(item.version))


def _copy(task: TaskState) -> TaskState:
    return replace(task, versions=dict(task.versions), history=list(task.history), inbox=dict(task.inbox))


def _path(inbox: str | None) -> str:
    return (inbox or "").partition(":")[2]
