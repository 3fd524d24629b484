"""Snapshots of the fold: a start reads the newest one and the events after it, not the whole log.

    snapshots/000000001000.json.gz   the state at event 1000, create-if-absent, never rewritten

Format: JSON lines. A header comes first, then manifests and tasks; each manifest is written once, before the first task
that uses it. Two snapshots stay at any time, and all events after the older one, so no single damaged object loses
anything.
"""

import gzip
import io
import json
import logging
import re
import zlib
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter

from server.errors import StoreError
from server.registry.events import VersionContent
from server.registry.manifest_text import ManifestText, compact_json
from server.registry.objects import Objects
from server.registry.state import RegistryState, StoredVersion, TaskState

log = logging.getLogger(__name__)

FORMAT = 1
SNAPSHOT_EVENTS = 1000
"""Number of events between two snapshots, at least."""
TASKS_PER_EVENT = 100
"""A snapshot of more tasks is written once per this share of them: writing costs time for each task."""
GRACE_SECONDS = 7 * 24 * 3600.0
"""Events are removed once a snapshot that replaces them has this age. Every server syncs far more often."""
MOST_REMOVED = 2000
"""Objects that are removed in one go."""
UNREADABLE = (OSError, EOFError, zlib.error, ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What reading a damaged snapshot raises; gzip raises OSError for a file that is none."""

_NAME = re.compile(r"(\d{12})\.json\.gz")
_TASK, _VERSION = TypeAdapter(TaskState), TypeAdapter(StoredVersion)
_OF_TASK = ("history", "last_version", "last_event", "inbox")
_OF_VERSION = ("number", "at", "source", "by")
_OF_CONTENT = tuple(field.name for field in fields(VersionContent))


class Snapshots:
    """The snapshots of a store."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._checked: set[int] = set()

    def numbers(self) -> list[int]:
        """Events at which there are snapshots, in order; raises StoreError if the store cannot be listed."""
        found = map(_NAME.fullmatch, self._objects.list("snapshots"))
        return sorted(int(match[1]) for match in found if match is not None)

    def newest(self, numbers: list[int]) -> RegistryState:
        """The state of the newest of these snapshots that can be read; the empty one if there is none."""
        for number in reversed(numbers):
            try:
                return self.read(number)
            except StoreError as exc:
                log.error("%s", exc)
        return RegistryState()

    def read(self, number: int) -> RegistryState:
        """The state at an event; raises StoreError if it is damaged or gone, or a newer Prelude wrote it."""
        data = self._objects.get(_key(number))
        try:
            state = decode(b"" if data is None else data)
        except UNREADABLE as exc:
            raise StoreError(f"The store's snapshot {number} cannot be read: {exc}.") from exc
        if state.last_event != number:
            raise StoreError(f"The store's snapshot {number} says that it is of event {state.last_event}.")
        return state

    def write(self, state: RegistryState) -> None:
        """Keep a state, which another server may have kept already; raises StoreError if the store refuses."""
        self._objects.create(_key(state.last_event), encode(state))

    def prune(self) -> int | None:
        """Remove old snapshots; returns the event up to which the log may go too. Raises StoreError."""
        numbers = self.numbers()
        old = [number for number in numbers if (self._objects.age(_key(number)) or 0.0) > GRACE_SECONDS]
        if not old or len(numbers) < 2:
            return None
        cut = min(old[-1], numbers[-2])  # one after it stays too
        if not self._is_readable(cut) or not any(self._is_readable(n) for n in numbers if n > cut):
            return None
        for number in numbers:
            if number < cut:
                self._objects.delete(_key(number))
        return cut

    def _is_readable(self, number: int) -> bool:
        if number not in self._checked:
            try:
                self.read(number)
            except StoreError as exc:
                log.error("%s", exc)
                return False
            self._checked.add(number)
        return True


def encode(state: RegistryState) -> bytes:
    """A snapshot's file; a manifest that several versions have is written once."""
    buffer = io.BytesIO()
    manifests: dict[str, int] = {}
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1, mtime=0) as file:

        def write(**fields: Any) -> None:
            file.write(compact_json(fields).encode() + b"\n")

        head = {"last_event": state.last_event, "first_version": state.first_version}
        write(format=FORMAT, **head, tasks=len(state.tasks))
        for name, task in state.tasks.items():
            for version in task.versions.values():
                text = version.content.manifest
                if text not in manifests:
                    manifests[text] = len(manifests)
                    write(manifest=text)
            own = {field: getattr(task, field) for field in _OF_TASK}
            write(task=name, **own, versions=[_version_fields(item, manifests) for item in task.versions.values()])
    return buffer.getvalue()


def decode(data: bytes) -> RegistryState:
    """The state in a snapshot's file; raises one of UNREADABLE."""
    state = RegistryState()
    manifests: list[ManifestText] = []
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        head = json.loads(file.readline())
        if head["format"] != FORMAT:
            raise ValueError(f"its format is {str(head['format'])[:20]}, and this server knows {FORMAT}")
        for line in file:
            fields = json.loads(line)
            if "manifest" in fields:
                manifests.append(ManifestText(fields["manifest"]))
                continue
            task, own = fields["task"], {field: fields[field] for field in _OF_TASK}
            versions = [_version(task, item, manifests) for item in fields["versions"]]
            own["versions"] = {version.number: version for version in versions}
            state.tasks[task] = _TASK.validate_python(own)
    if len(state.tasks) != head["tasks"]:
        raise ValueError(f"it has {len(state.tasks)} tasks and should have {head['tasks']}")
    state.last_event, state.first_version = int(head["last_event"]), int(head["first_version"])
    state.count()
    return state


def _version_fields(version: StoredVersion, manifests: dict[str, int]) -> dict[str, Any]:
    content = {field: getattr(version.content, field) for field in _OF_CONTENT}
    content["manifest"] = manifests[version.content.manifest]
    return {field: getattr(version, field) for field in _OF_VERSION} | content


def _version(task: str, fields: dict[str, Any], manifests: list[ManifestText]) -> StoredVersion:
    own = {field: fields.pop(field) for field in _OF_VERSION}
    content = {**fields, "manifest": manifests[fields["manifest"]]}
    version = _VERSION.validate_python({"task": task, "content": content, **own})
    version.content.about  # noqa: B018 - read now, so that no list has to
    return version


def _key(number: int) -> str:
    return f"snapshots/{number:012d}.json.gz"
