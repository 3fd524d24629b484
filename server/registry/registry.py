"""The live map: task -> version -> soft prompt.

Readers look up one dictionary, on any thread, without a lock. A change is: validate everything -> blob -> event -> one
assignment; it is durable before it is visible, and visible before it is acknowledged. Whoever holds a soft prompt keeps
the immutable value, so a change never reaches a request in flight.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from server.core import ModelSpec
from server.errors import InvalidTaskName, PreludeError, UnknownTask
from server.registry.events import Event, PublishedVersion, Source, State, TaskState
from server.registry.store import LocalStore
from server.soft_prompts.names import check_task_name, names_of, split_version, unknown_task
from server.soft_prompts.soft_prompt import SoftPrompt, check_base_model, check_finite, check_shape


@dataclass(frozen=True)
class LiveTask:
    """One task as requests see it."""

    task: str
    live: int
    versions: MappingProxyType[int, SoftPrompt]

    @property
    def soft_prompt(self) -> SoftPrompt:
        """What answers a request that names no version."""
        return self.versions[self.live]


@dataclass(frozen=True)
class Resolved:
    """What a request's task name stood for at the moment it was looked up."""

    task: str
    version: int
    soft_prompt: SoftPrompt


@dataclass(frozen=True)
class Published:
    """Outcome of a publish."""

    created: bool
    """False if every content was live already, so that nothing changed."""
    tasks: tuple[Resolved, ...]


class Registry:
    """Tasks and their versions for one frozen model.

    Attributes:
        model: the frozen model that soft prompts must fit.
        max_virtual_tokens: the longest soft prompt that is taken.
        inbox_errors: inbox entry -> why it is not served, as of the last scan.
    """

    def __init__(self, store: LocalStore, model: ModelSpec, max_virtual_tokens: int) -> None:
        """Open the store's state. A content that cannot be read, or is of another model, is reported, not served.

        Raises:
            StoreError: an event cannot be read.
        """
        self.model = model
        self.max_virtual_tokens = max_virtual_tokens
        self.inbox_errors: dict[str, str] = {}
        self._store = store
        self._changing = threading.Lock()
        self._state = State(store.events())
        self._contents: dict[str, SoftPrompt] = {}
        self._broken: dict[str, str] = {}  # digest -> why the content cannot be served
        self._live: dict[str, LiveTask] = {}
        self._store_errors: dict[str, str] = {}
        self._load(self._state.tasks)

    def resolve(self, reference: str) -> Resolved:
        """What `task` or `task@version` stands for now.

        Raises:
            InvalidTaskName: it is not a task's name.
            UnknownTask: it is not live, or has no such version; names the nearest ones.
        """
        task, version = split_version(reference)
        live = self._live.get(task)
        if live is None:
            raise unknown_task(task, self._live)
        number = live.live if version is None else version
        if number not in live.versions:
            versions = ", ".join(map(str, live.versions))
            raise UnknownTask(f"Task {task!r} has no version {number}.", remedy=f"Its versions are {versions}.")
        return Resolved(task, number, live.versions[number])

    def tasks(self) -> list[LiveTask]:
        """All live tasks, by name."""
        return [live for _, live in sorted(self._live.items())]

    @property
    def errors(self) -> dict[str, str]:
        """Task or inbox entry -> why it, or a version of it, is not served."""
        return {**self._store_errors, **self.inbox_errors}

    def is_from_inbox(self, task: str, content: SoftPrompt) -> bool:
        """Whether the inbox has published this content already, and publishing it again would mend nothing."""
        state = self._state.tasks.get(task)
        if state is None or state.inbox_digest != content.digest:
            return False
        return state.live is None or state.versions[state.live] != content.digest or task in self._live

    def publish(self, name: str, soft_prompts: Sequence[SoftPrompt], source: Source) -> Published:
        """Make validated contents the live versions of a task, or of `name-0`, `name-1`, … if there are several.

        Raises:
            InvalidTaskName: the name is not one, or is the frozen model's.
            StoreError: the store refuses; nothing has changed then.
        """
        names = names_of(name, soft_prompts)
        for task in names:
            self._check_free(task)
        with self._changing:
            unchanged = all(self._is_live(task, content) for task, content in zip(names, soft_prompts, strict=True))
            if unchanged and source == "api":
                return Published(False, tuple(self.resolve(task) for task in names))
            self._append(names, soft_prompts, source)
            self._contents.update({content.digest: content for content in soft_prompts})
            mended = [self._broken.pop(content.digest, None) for content in soft_prompts]
            self._refresh(self._state.tasks if any(mended) else names)
            return Published(not unchanged, tuple(self.resolve(task) for task in names))

    def delete(self, name: str) -> None:
        """Retire a task: no later request finds it, its contents leave the store.

        Raises:
            InvalidTaskName: it is not a task's name.
            UnknownTask: it is not live.
        """
        check_task_name(name)
        with self._changing:
            state = self._state.tasks.get(name)
            if state is None or state.live is None:
                raise unknown_task(name, self._live)
            while not self._store.append(event := self._next_event("delete", "api", deleted=name)):
                self._catch_up()
            digests = set(state.versions.values())
            self._state.apply(event)
            self._refresh([name])
            for digest in digests - self._referenced():
                self._contents.pop(digest, None)
                self._broken.pop(digest, None)
                self._store.remove_blob(digest)

    def _append(self, names: Sequence[str], contents: Sequence[SoftPrompt], source: Source) -> None:
        """Write blobs and the publish event; a loser of the race for its number reads what won and takes the next one.

        What is live already keeps its number: the event then only records that the inbox has published it.
        """
        while True:
            for content in contents:  # again in each round: what won may have been a delete of the same content
                self._store.put_blob(content)
            published = tuple(
                PublishedVersion(task, self._number(task, content), content.digest)
                for task, content in zip(names, contents, strict=True)
            )
            event = self._next_event("publish", source, published=published)
            if self._store.append(event):
                self._state.apply(event)
                return
            self._catch_up()

    def _number(self, task: str, content: SoftPrompt) -> int:
        return self._live[task].live if self._is_live(task, content) else self._state.next_version(task)

    def _next_event(self, kind: str, source: Source, **changes: object) -> Event:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        return Event(self._state.last_event + 1, kind, now, source, **changes)  # type: ignore[arg-type]

    def _catch_up(self) -> None:
        """Take over what another server on the same store has written meanwhile."""
        new = [event for event in self._store.events() if event.number > self._state.last_event]
        for event in new:
            self._state.apply(event)
        changed = {item.task for event in new for item in event.published}
        self._load(changed | {event.deleted for event in new if event.deleted is not None})

    def _load(self, names: Collection[str]) -> None:
        """Read tasks' contents from the store and make them live; what does not fit is reported instead."""
        tasks = [self._state.tasks[name] for name in names if name in self._state.tasks]
        for digest in {digest for task in tasks for digest in task.versions.values()} - self._contents.keys():
            try:
                self._contents[digest] = self._read(digest)
                self._broken.pop(digest, None)
            except PreludeError as exc:
                self._broken[digest] = str(exc)
        self._refresh(names)

    def _read(self, digest: str) -> SoftPrompt:
        content = self._store.get_blob(digest)
        check_base_model(content.manifest, self.model)
        check_shape(content.peft_type, tuple(content.tensor.shape), self.model, self.max_virtual_tokens)
        check_finite(content.tensor, self.model.dtype)
        return content

    def _refresh(self, names: Collection[str]) -> None:
        """Bring the live map of these tasks in line with the state, by one assignment for all of them."""
        live, errors = dict(self._live), dict(self._store_errors)
        for name in names:
            live.pop(name, None)
            errors.pop(name, None)
            state = self._state.tasks.get(name, TaskState())
            versions = {n: self._contents[digest] for n, digest in state.versions.items() if digest in self._contents}
            if state.live in versions:
                live[name] = LiveTask(name, state.live, MappingProxyType(versions))
            broken = [self._broken[digest] for digest in state.versions.values() if digest in self._broken]
            if broken:
                errors[name] = broken[-1]
        self._live, self._store_errors = live, errors

    def _is_live(self, task: str, content: SoftPrompt) -> bool:
        live = self._live.get(task)
        return live is not None and live.soft_prompt.digest == content.digest

    def _referenced(self) -> set[str]:
        return {digest for task in self._state.tasks.values() for digest in task.versions.values()}

    def _check_free(self, task: str) -> None:
        check_task_name(task)
        if task == self.model.name:
            raise InvalidTaskName(f"{task!r} is the frozen model's name.", remedy="Choose another name for the task.")
