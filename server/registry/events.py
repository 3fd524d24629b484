"""One event per change, and the fold that makes the registry's state of them.

The fold is the only place that says what an event means. Version numbers come from it and are never used twice,
also not after a delete; a retired task leaves behind what must not be forgotten: its last number, and which content of
the inbox was already published.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from server.errors import StoreError

Source = Literal["api", "inbox"]


@dataclass(frozen=True, slots=True)
class PublishedVersion:
    """One version of one task: a content under a number."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    task: str
    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class Event:
    """One atomic change. A publish may carry several versions: a multitask soft prompt is one change."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    number: int
    kind: Literal["publish", "delete"]
    at: str
    source: Source
    published: tuple[PublishedVersion, ...] = ()
    deleted: str | None = None

    def to_json(self) -> bytes:
        """The event's file."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False).encode()

    @classmethod
    def parse(cls, data: bytes, name: str) -> Event:
        """Read an event's file.

        Raises:
            StoreError: it is not one, or it is of a kind that only a newer Prelude knows.
        """
        try:
            return _EVENT.validate_json(data)
        except ValidationError as exc:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
            raise StoreError(
                f"The store's event {name} cannot be read: {problems}.",
                remedy="Restore it from a backup of the store, or run the version of Prelude that wrote it.",
            ) from exc


_EVENT = TypeAdapter(Event)


@dataclass
class TaskState:
    """What the events say about one task.

    Attributes:
        versions: number -> digest, of those that are not deleted.
        live: the version that answers, or None if the task is deleted.
        last_version: highest number ever given.
        last_event: number of the last event that changed the task.
        inbox_digest: what the inbox last published under this name, so that a restart does not publish it again.
    """

    versions: dict[int, str] = field(default_factory=dict)
    live: int | None = None
    last_version: int = 0
    last_event: int = 0
    inbox_digest: str | None = None


class State:
    """The fold of all events: every task that ever was."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        """Fold events in the order of their numbers."""
        self.tasks: dict[str, TaskState] = {}
        self.last_event = 0
        for event in events:
            self.apply(event)

    def apply(self, event: Event) -> None:
        """Take one more event."""
        self.last_event = event.number
        for item in event.published:
            task = self.tasks.setdefault(item.task, TaskState())
            task.versions[item.version] = item.digest
            task.live = item.version
            task.last_version = max(task.last_version, item.version)
            task.last_event = event.number
            if event.source == "inbox":
                task.inbox_digest = item.digest
        if event.deleted is not None and event.deleted in self.tasks:
            task = self.tasks[event.deleted]
            task.versions.clear()
            task.live = None
            task.last_event = event.number

    def next_version(self, task: str) -> int:
        """The number that the next publish under this name gets."""
        return self.tasks[task].last_version + 1 if task in self.tasks else 1
