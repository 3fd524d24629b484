"""Events that this server cannot read, because a newer Prelude wrote them or a disk damaged them.

One of them must not keep a server from starting, nor change anything for the tasks that it does not name. The readable
parts are kept (its tasks, and the versions that it publishes), so that no version number is used twice.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from server.errors import StoreError
from server.registry.events import BLOB_NAME, Event, NewVersion, Publish, VersionContent
from server.registry.manifest_text import ManifestSummary, ManifestText
from server.soft_prompts.names import TASK_NAME

MAX_TASKS = 1000


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An event whose effect is not known.

    Attributes:
        number: the event's.
        problem: why it has no effect here.
        tasks: those that it is about; None if that cannot be made out.
    """

    number: int
    problem: str
    tasks: frozenset[str] | None = None


Entry = Event | Unreadable
"""What stands at a number of the log."""


class UnreadableText(ManifestText):
    """Stands for the manifest of a version that cannot be read."""

    __slots__ = ()

    def __init__(self, problem: str) -> None:
        super().__init__("{}", ManifestSummary(identity="unreadable", problem=problem))


def read_event(number: int, data: bytes, name: str) -> Entry:
    """The event in a file, or its readable parts; raises StoreError if the file is another event's."""
    try:
        event = Event.parse(data, name)
    except StoreError as exc:
        fields: Any = None
        with suppress(ValueError, RecursionError):
            fields = json.loads(data)
        return _made_out(number, fields, exc.message)
    if event.number != number:
        raise StoreError(
            f"The store's event {name} says that it is number {event.number}.",
            remedy="Restore it from a backup of the store.",
        )
    return event


def _made_out(number: int, fields: Any, problem: str) -> Entry:
    """A publish of versions that cannot be read, or an event whose tasks are known, or nothing at all."""
    fields = fields if isinstance(fields, dict) else {}
    change = fields.get("change")
    if not isinstance(change, dict):
        return Unreadable(number, problem)
    published = change.get("published")
    if change.get("kind") == "publish" and isinstance(published, list) and published:
        versions = [_version(item, number, problem) for item in published]
        if None not in versions:
            source, by = fields.get("source"), fields.get("by")
            return Event(
                number,
                at=_word(fields.get("at")),
                source="inbox" if source == "inbox" else "api",
                by=_word(by) or None,
                change=Publish(tuple(filter(None, versions)), activate=change.get("activate") is not False),
            )
    named = change.get("tasks", [change.get("task")])
    if isinstance(published, list):
        named = [item.get("task") if isinstance(item, dict) else None for item in published]
    if not isinstance(named, list) or not named or not all(map(_is_task, named)):
        return Unreadable(number, problem)
    return Unreadable(number, problem, frozenset(named[:MAX_TASKS]))


def _version(item: Any, number: int, problem: str) -> NewVersion | None:
    """Parse a version; only its task and its number must be readable."""
    if not isinstance(item, dict) or not _is_task(item.get("task")) or not isinstance(item.get("version"), int):
        return None
    content = item.get("content")
    text = {
        name: _word(content.get(name)) if isinstance(content, dict) else ""
        for name in ("digest", "prefix_hash", "peft_type", "blob")
    }
    manifest = UnreadableText(problem)
    unknown = f"unreadable-{number}-{item['task']}-{item['version']}"
    digest, blob = text["digest"] or unknown, text["blob"] if BLOB_NAME.fullmatch(text["blob"]) else unknown
    return NewVersion(
        item["task"],
        item["version"],
        VersionContent(digest, text["prefix_hash"] or unknown, text["peft_type"], (0, 0), 0, blob, manifest),
    )


def _word(value: Any) -> str:
    """A text that can be shown and written down; empty for anything else."""
    return value if isinstance(value, str) and value.isprintable() else ""


def _is_task(name: Any) -> bool:
    return isinstance(name, str) and TASK_NAME.fullmatch(name) is not None
