"""The live map: task -> live version -> soft prompt, and which of them are in memory.

Readers look up one dictionary, on any thread, without a lock. It is replaced by one assignment when events are taken
over, so a reader sees a task before or after a change and never in between, and a holder of a soft prompt keeps the
immutable value. `registry.py` creates and receives the events.
"""

import logging
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Protocol

from server.contracts import ModelSpec
from server.errors import UnknownTask
from server.registry import commands as plans
from server.registry.events import Event, Publish, VersionContent
from server.registry.host_cache import HostCache
from server.registry.state import WHOLE_STORE, RegistryState, StoredVersion
from server.registry.store import Store
from server.registry.task_map import TaskMap
from server.registry.task_views import Resolved, Task
from server.registry.unreadable_events import Entry
from server.registry.version_contents import Contents
from server.soft_prompts.names import check_task_name, nearby, split_version, unknown_task
from server.soft_prompts.soft_prompt import SoftPrompt

log = logging.getLogger(__name__)

HOST_MEMORY = 2**30


class PrefixHolder(Protocol):
    """What the registry needs of an engine."""

    def warm(self, soft_prompts: Sequence[SoftPrompt]) -> None:
        """Compute their prefixes, so that the first request does not pay; raises if one cannot be computed."""

    def drop_unused(self, prefix_hashes: Iterable[str]) -> None:
        """Forget these prefixes, each as the last sequence that uses it ends."""


class NoEngine:
    """For a registry without an engine: nothing is warmed, nothing is held."""

    def warm(self, soft_prompts: Sequence[SoftPrompt]) -> None:
        """Nothing to warm."""

    def drop_unused(self, prefix_hashes: Iterable[str]) -> None:
        """Nothing to drop."""


class LiveMap:
    """Tasks and their versions for one frozen model, as the events so far tell them.

    Attributes:
        model: the frozen model that soft prompts must fit.
        max_virtual_tokens: the longest soft prompt that is taken.
        host: soft prompts in memory.
        inbox_errors: inbox entry -> why it is not served, as of the last scan.
        changes: events that were taken over since the start, by their kind.
    """

    def __init__(self, store: Store, model: ModelSpec, max_virtual_tokens: int, host_memory: int = HOST_MEMORY) -> None:
        """Fold the store's events; tensors stay in the store until somebody asks for them.

        Raises StoreError if the store cannot be listed or read.
        """
        self.model = model
        self.max_virtual_tokens = max_virtual_tokens
        self.inbox_errors: dict[str, str] = {}
        self.changes: Counter[str] = Counter()
        self._store = store
        self._engine: PrefixHolder = NoEngine()
        self._holding = threading.Lock()
        self._held: Counter[str] = Counter()  # prefix hashes of publishes under way
        self._state = store.load()
        _log_new({}, self._state.problems)
        self._broken: dict[str, str] = {}  # task -> why a version of it is not served
        self._noting = threading.Lock()
        self._contents = Contents(store, model, max_virtual_tokens, self.is_referenced, self._note_content)
        self.host = HostCache(host_memory, self._contents.load, lambda digest: digest in self._state.digests)
        self._tasks = TaskMap()
        self._refresh(self._state.tasks)
        self._tasks.names  # noqa: B018 - sorts them, so that no list has to
        contents = [version.content for task in self._state.tasks.values() for version in task.versions.values()]
        self._contents.check_all(contents, self._state.deleted)
        self._state.deleted.clear()
        if self._contents.broken:
            self._note_broken(self._state.tasks)

    def connect(self, engine: PrefixHolder) -> None:
        """From now on warm what is published, and drop what is deleted; start-up itself warms nothing."""
        self._engine = engine

    # Reading: any thread, no lock.

    def resolve(self, reference: str, key: str = "") -> Resolved:
        """What `task` or `task@version` stands for now.

        Args:
            key: what identifies the client (its `user`, or the id of the request or of an API key): in a canary, the
                same key resolves to the same version as long as the weights are the same.

        Raises:
            InvalidTaskName: it is not a task's name.
            UnknownTask: it is not live, or has no such version; names the nearest ones.
        """
        name, version = split_version(reference)
        task = self.find(name)
        if task is None:
            raise self._unknown(name)
        number = task.pick(key) if version is None else version
        if number is None:
            staged = ", ".join(f"{name}@{n}" for n in sorted(task.versions)[-5:])
            raise UnknownTask(f"No version of {name!r} is live.", remedy=f"Activate a version, or ask for {staged}.")
        plans.check_version(name, task.versions, number)
        found = task.versions[number]
        return Resolved(name, number, found.content, found.at)

    def cached(self, resolved: Resolved) -> SoftPrompt | None:
        """The soft prompt, if it is in memory."""
        return self.host.get(resolved.content.digest)

    def fetch(self, resolved: Resolved) -> Future[SoftPrompt]:
        """The soft prompt from memory or from the store; the future may raise VersionUnavailable."""
        return self.host.fetch(resolved.content)

    def task(self, name: str) -> Task:
        """One task that has versions, live or not; raises InvalidTaskName or UnknownTask."""
        task = self.find(check_task_name(name))
        if task is None:
            error = self._unknown(name)
            raise UnknownTask(error.message, remedy=self.error_of(name) or error.remedy)
        return task

    def tasks(self) -> list[Task]:
        """All tasks that have versions, by name."""
        tasks = self._tasks
        return [Task.of(name, tasks[name]) for name in tasks.names]

    def names_after(self, name: str | None) -> Iterator[str]:
        """Names of all tasks that have versions, in order, from the first after `name`; as they are now."""
        names = self._tasks.names
        return (names[at] for at in range(0 if name is None else bisect_right(names, name), len(names)))

    def find(self, name: str) -> Task | None:
        """A task that has versions, or None."""
        state = self._tasks.get(name)
        return None if state is None else Task.of(name, state)

    @property
    def num_tasks(self) -> int:
        """Tasks that have versions."""
        return len(self._tasks)

    def answering(self, name: str) -> frozenset[int] | None:
        """Live versions of a task; empty if all are staged or the task is retired; None if there is no such task."""
        task = self._tasks.get(name)
        return None if task is None else frozenset(number for number, _ in task.traffic)

    def is_referenced(self, prefix_hash: str) -> bool:
        """Whether a version has these numbers, or one is about to."""
        # The order of these two checks matters: a publish releases its hold only after its version is in the state.
        return prefix_hash in self._held or prefix_hash in self._state.prefixes

    def tasks_with(self, prefix_hash: str) -> list[str]:
        """Names of the tasks that have a version with these numbers."""
        return self._state.prefixes.tasks(prefix_hash)

    @property
    def errors(self) -> dict[str, str]:
        """Task or inbox entry -> why it, or a version of it, is not served."""
        return {**self._state.problems, **self._broken, **self.inbox_errors}

    @property
    def num_errors(self) -> int:
        """Tasks and inbox entries with something that is not served."""
        others = self._state.problems.keys() | self.inbox_errors.keys()
        return len(self._broken) + sum(name not in self._broken for name in others)

    def entries_after(self, name: str | None) -> list[str]:
        """Names with an error that are no tasks, such as broken entries of the inbox, in order, after `name`."""
        others = self._state.problems.keys() | self.inbox_errors.keys()
        return sorted(other for other in others if other not in self._tasks and (name is None or other > name))

    def error_of(self, name: str) -> str | None:
        """Why a task, an entry of the inbox, or a version of the task is not served; None if nothing is wrong."""
        return self.inbox_errors.get(name) or self._broken.get(name) or self._state.problems.get(name)

    def why_broken(self, version: StoredVersion) -> str | None:
        """Why a version is not served; None if nothing is known against it."""
        return self._contents.why_broken(version.content)

    def report(self, entry: str, error: str | None) -> None:
        """Take note of why an entry of the inbox is not served, or that nothing is wrong with it any more."""
        others = {name: why for name, why in self.inbox_errors.items() if name != entry}
        self.inbox_errors = others if error is None else {**others, entry: error}

    # Taking events over: one thread at a time.

    def _apply(self, events: Sequence[Entry]) -> list[VersionContent]:
        """Take events over, by one assignment of the live map; returns contents that no version names any more."""
        touched: set[str] = set()
        removed: list[StoredVersion] = []
        problems = dict(self._state.problems)
        for event in events:
            names, gone = self._state.take(event)
            touched |= names
            removed += gone
        changes = [event.change for event in events if isinstance(event, Event)]
        self.changes.update(change.kind for change in changes)
        published = [item for change in changes if isinstance(change, Publish) for item in change.published]
        self._contents.check(item.content for item in published)
        self._refresh(touched)
        contents = [version.content for version in removed]
        self._drop(contents)
        _log_new(problems, self._state.problems)
        return contents

    def _replace(self, state: RegistryState) -> None:
        """Take over a state that was loaded again, because the events between were removed."""
        before = self._state
        self._state = state
        kept = {v.content.blob for task in state.tasks.values() for v in task.versions.values()}
        self._contents.check(v.content for task in state.tasks.values() for v in task.versions.values())
        self._refresh(before.tasks.keys() | state.tasks.keys())
        contents = [v.content for task in before.tasks.values() for v in task.versions.values()]
        self._drop([content for content in contents if content.blob not in kept])
        _log_new(before.problems, state.problems)

    def _drop(self, contents: Sequence[VersionContent]) -> None:
        """Drop the contents of removed versions from all caches, unless another version has the same content."""
        for content in contents:
            self._contents.forget(content)
            if content.digest not in self._state.digests:
                self.host.drop(content.digest)
        self._engine.drop_unused({c.prefix_hash for c in contents if not self.is_referenced(c.prefix_hash)})

    def _refresh(self, names: Collection[str]) -> None:
        """Bring the live map of these tasks in line with the state, by one assignment for all of them."""
        states = ((name, self._state.tasks.get(name)) for name in names)
        self._tasks = self._tasks.replaced((name, task if task and task.versions else None) for name, task in states)
        if self._contents.broken or self._broken:
            self._note_broken(names)

    def _note_content(self, content: VersionContent) -> None:
        """Take note that a content turned out to be broken, or to be no longer; on any thread."""
        self._note_broken(self._state.digests.tasks(content.digest))

    def _note_broken(self, names: Iterable[str]) -> None:
        """Find out which of these tasks have a version that is not served."""
        with self._noting:
            for name in names:
                task = self._tasks.get(name)
                found = [self.why_broken(version) for version in task.versions.values()] if task is not None else []
                why = next((why for why in reversed(found) if why is not None), None)
                if why is not None:
                    self._broken[name] = why
                else:
                    self._broken.pop(name, None)

    @contextmanager
    def _hold(self, prefix_hashes: Iterable[str]) -> Iterator[None]:
        """Protect prefixes from being dropped while the version that needs them is being published."""
        hashes = list(prefix_hashes)
        with self._holding:
            self._held.update(hashes)
        try:
            yield
        finally:
            with self._holding:
                self._held.subtract(hashes)
                self._held += Counter()  # without those that nobody holds any more
            self._engine.drop_unused({prefix for prefix in hashes if not self.is_referenced(prefix)})

    def _going_live(self, events: Sequence[Entry]) -> list[VersionContent]:
        """Contents that answer once these events are taken over, and do not yet."""
        ahead = self._state.ahead(events)
        return [
            task.versions[number].content
            for name, task in ahead.tasks.items()
            for number, _ in task.traffic
            if name not in self._state.tasks or number not in dict(self._state.tasks[name].traffic)
        ]

    def _unknown(self, name: str) -> UnknownTask:
        tasks = self._tasks
        near = ((other, tasks.get(other)) for other in nearby(name, tasks.names))
        return unknown_task(name, (other for other, task in near if task is not None and task.traffic))


def _log_new(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    for name, problem in now.items():
        if before.get(name) != problem:
            log.error("%s: %s", "all tasks" if name == WHOLE_STORE else name, problem)
