"""The live map: task -> version -> soft prompt.

Readers look up one dictionary, on any thread, without a lock. A change is: validate everything -> blob -> event -> one
assignment; it is durable before it is visible, and visible before it is acknowledged. Whoever holds a soft prompt keeps
the immutable value, so a change never reaches a request in flight.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from server.core import ModelSpec
from server.errors import InvalidTaskName, PreludeError, UnknownTask
from server.registry.events import Event, PublishedVersion, Source, State
from server.registry.store import LocalStore
from server.soft_prompts.names import check_task_name, split_version, unknown_task
from server.soft_prompts.soft_prompt import SoftPrompt, check_base_model, check_shape


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
        errors: inbox entry or task -> why it is not served.
    """

    def __init__(self, store: LocalStore, model: ModelSpec, max_virtual_tokens: int) -> None:
        """Open the store's state. A content that cannot be read, or is of another model, is reported, not served.

        Raises:
            StoreError: an event cannot be read.
        """
        self.model = model
        self.max_virtual_tokens = max_virtual_tokens
        self.errors: dict[str, str] = {}
        self._store = store
        self._changing = threading.Lock()
        self._state = State(store.events())
        self._contents: dict[str, SoftPrompt] = {}
        self._live: dict[str, LiveTask] = {}
        for name in self._state.tasks:
            self._load(name)

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

    def inbox_digest(self, task: str) -> str | None:
        """What the inbox last published under this name."""
        state = self._state.tasks.get(task)
        return None if state is None else state.inbox_digest

    def publish(self, name: str, soft_prompts: Sequence[SoftPrompt], source: Source) -> Published:
        """Make validated contents the live versions of a task, or of `name-0`, `name-1`, … if there are several.

        Raises:
            InvalidTaskName: the name is not one, or is the frozen model's.
            StoreError: the store refuses; nothing has changed then.
        """
        names = [name] if len(soft_prompts) == 1 else [f"{name}-{i}" for i in range(len(soft_prompts))]
        for task in names:
            self._check_free(task)
        with self._changing:
            unchanged = all(self._is_live(task, content) for task, content in zip(names, soft_prompts, strict=True))
            if unchanged and source == "api":
                return Published(False, tuple(self.resolve(task) for task in names))
            for content in soft_prompts:
                self._store.put_blob(content)
            event = self._append(names, soft_prompts, source)
            self._contents.update({content.digest: content for content in soft_prompts})
            self._refresh(*(item.task for item in event.published))
            return Published(not unchanged, tuple(self.resolve(task) for task in names))

    def delete(self, name: str) -> None:
        """Retire a task: no later request finds it, its contents leave the store.

        Raises:
            InvalidTaskName: it is not a task's name.
            UnknownTask: it is not live.
        """
        check_task_name(name)
        with self._changing:
            if name not in self._live:
                raise unknown_task(name, self._live)
            digests = {content.digest for content in self._live[name].versions.values()}
            while not self._store.append(event := self._next_event("delete", "api", deleted=name)):
                self._catch_up()
            self._state.apply(event)
            self._refresh(name)
            for digest in digests - self._referenced():
                self._contents.pop(digest, None)
                self._store.remove_blob(digest)

    def _append(self, names: Sequence[str], contents: Sequence[SoftPrompt], source: Source) -> Event:
        """Write the publish event; a loser of the race for its number reads what won and takes the next one.

        What is live already keeps its number: the event then only records that the inbox has published it.
        """
        while True:
            published = tuple(
                PublishedVersion(task, self._number(task, content), content.digest)
                for task, content in zip(names, contents, strict=True)
            )
            event = self._next_event("publish", source, published=published)
            if self._store.append(event):
                self._state.apply(event)
                return event
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
        for event in new:
            for name in [item.task for item in event.published] or [event.deleted or ""]:
                self._load(name)

    def _load(self, name: str) -> None:
        """Read a task's contents from the store and make them live; what does not fit is reported instead."""
        state = self._state.tasks.get(name)
        for digest in state.versions.values() if state else ():
            if digest in self._contents:
                continue
            try:
                content = self._store.get_blob(digest)
                check_base_model(content.manifest, self.model)
                check_shape(content.peft_type, tuple(content.tensor.shape), self.model, self.max_virtual_tokens)
                self._contents[digest] = content
            except PreludeError as exc:
                self.errors[name] = str(exc)
        self._refresh(name)

    def _refresh(self, *names: str) -> None:
        """Bring the live map of these tasks in line with the state, by one assignment for all of them."""
        live = dict(self._live)
        for name in names:
            state = self._state.tasks.get(name)
            versions = {
                number: self._contents[digest]
                for number, digest in (state.versions if state else {}).items()
                if digest in self._contents
            }
            live.pop(name, None)
            if state is not None and state.live in versions:
                live[name] = LiveTask(name, state.live, MappingProxyType(versions))
        self._live = live

    def _is_live(self, task: str, content: SoftPrompt) -> bool:
        live = self._live.get(task)
        return live is not None and live.soft_prompt.digest == content.digest

    def _referenced(self) -> set[str]:
        return {digest for task in self._state.tasks.values() for digest in task.versions.values()}

    def _check_free(self, task: str) -> None:
        check_task_name(task)
        if task == self.model.name:
            raise InvalidTaskName(f"{task!r} is the frozen model's name.", remedy="Choose another name for the task.")
