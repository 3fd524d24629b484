"""Snapshots of the fold: a start reads the newest one and the events after it, not the whole log.

    snapshots/000000001000.json.gz   the state at event 1000, create-if-absent, never rewritten

Format: JSON lines. A header comes first, then manifests and tasks; each manifest is written once, before the first task
that uses it, beside its summary, so that a start parses none. Two snapshots stay at any time, and all events after the
older one, so no single damaged object loses anything.
"""

import gzip
import hashlib
import io
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter

from server.errors import StoreError
from server.garbage import collection_paused
from server.registry.events import VersionContent
from server.registry.manifest_text import SUMMARIES, ManifestSummary, ManifestText, compact_json
from server.registry.objects import Objects
from server.registry.state import RegistryState, StoredVersion, TaskState
from server.soft_prompts.manifest import BaseModelRef

T = TypeVar("T")

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
        return self._read(number, decode, lambda state: state.last_event)

    def check(self, number: int) -> None:
        """Raise StoreError as `read` does, without the memory of a second state."""
        self._read(number, check, int)

    def _read(self, number: int, read: Callable[[bytes], T], number_of: Callable[[T], int]) -> T:
        data = self._objects.get(_key(number))
        try:
            found = read(b"" if data is None else data)
        except UNREADABLE as exc:
            raise StoreError(f"The store's snapshot {number} cannot be read: {exc}.") from exc
        if number_of(found) != number:
            raise StoreError(f"The store's snapshot {number} says that it is of event {number_of(found)}.")
        return found

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
                self.check(number)
            except StoreError as exc:
                log.error("%s", exc)
                return False
            self._checked.add(number)
        return True


def encode(state: RegistryState) -> bytes:
    """A snapshot's file; a manifest that several versions have is written once."""
    buffer = io.BytesIO()
    manifests: dict[bytes, int] = {}
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1, mtime=0) as file:

        def write(**fields: Any) -> None:
            file.write(compact_json(fields).encode() + b"\n")

        head = {"last_event": state.last_event, "first_version": state.first_version, "summaries": SUMMARIES}
        write(format=FORMAT, **head, tasks=len(state.tasks))
        for name, task in state.tasks.items():
            versions = []
            for version in task.versions.values():
                text = version.content.manifest.text
                key = hashlib.blake2b(text.encode(), digest_size=20).digest()  # the texts would take much memory
                if key not in manifests:
                    manifests[key] = len(manifests)
                    write(manifest=text, **_summary_fields(version.content.about))
                versions.append(_version_fields(version, manifests[key]))
            write(task=name, **{field: getattr(task, field) for field in _OF_TASK}, versions=versions)
    return buffer.getvalue()


def decode(data: bytes) -> RegistryState:
    """The state in a snapshot's file; raises one of UNREADABLE."""
    state = RegistryState()
    with collection_paused(), gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        head = _read_head(file)
        for name, task in _read_tasks(file, head, _manifest):
            state.tasks[name] = task
            for version in task.versions.values():
                state.count(version)
    _check_count(len(state.tasks), head)
    state.last_event, state.first_version = int(head["last_event"]), int(head["first_version"])
    return state


def check(data: bytes) -> int:
    """Read a snapshot's file and keep nothing; returns the number of its event, or raises one of UNREADABLE."""
    nothing = ManifestText("{}")

    def read_manifest(fields: dict[str, Any], shared: dict[Any, Any]) -> ManifestText:
        _manifest(fields, shared)
        return nothing

    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        head = _read_head(file)
        found = sum(1 for _ in _read_tasks(file, head, read_manifest))
    _check_count(found, head)
    return int(head["last_event"])


def _check_count(found: int, head: dict[str, Any]) -> None:
    if found != head["tasks"]:
        raise ValueError(f"it has {found} tasks and should have {head['tasks']}")


def _read_head(file: gzip.GzipFile) -> dict[str, Any]:
    head: dict[str, Any] = json.loads(file.readline())
    if head["format"] != FORMAT:
        raise ValueError(f"its format is {str(head['format'])[:20]}, and this server knows {FORMAT}")
    return head


def _read_tasks(
    file: gzip.GzipFile, head: dict[str, Any], read_manifest: Callable[[dict[str, Any], dict[Any, Any]], ManifestText]
) -> Iterator[tuple[str, TaskState]]:
    """The tasks of a snapshot, one after the other; equal values of different tasks are one object."""
    manifests: list[ManifestText] = []
    shared: dict[Any, Any] = {}
    for line in file:
        fields = json.loads(line)
        if "manifest" in fields:
            if head.get("summaries") != SUMMARIES:
                fields.pop("identity", None)
            manifests.append(read_manifest(fields, shared))
            continue
        name, own = fields["task"], {field: fields[field] for field in _OF_TASK}
        versions = [_version(name, item, manifests, shared) for item in fields["versions"]]
        own["versions"] = {version.number: version for version in versions}
        task = _TASK.validate_python(own)
        # No task's state is changed, only copies of it.
        task.history = shared.setdefault(("history", *task.history), task.history)
        task.inbox = shared.setdefault(("inbox", *task.inbox.items()), task.inbox)
        yield name, task


def _manifest(fields: dict[str, Any], shared: dict[Any, Any]) -> ManifestText:
    """A manifest, with its summary if it is known: else that is made again, which takes minutes for a million."""
    text = fields["manifest"]
    if not isinstance(text, str):
        raise TypeError("a manifest is no text")
    if "identity" not in fields:
        return ManifestText(text)
    base = None if fields["base_model"] is None else tuple(fields["base_model"])
    if base is not None and base not in shared:
        shared[base] = BaseModelRef(name=base[0], fingerprint=base[1])
    return ManifestText(
        text, ManifestSummary(fields["identity"], None, fields["description"], shared[base] if base else None)
    )


def _version_fields(version: StoredVersion, manifest: int) -> dict[str, Any]:
    content = {field: getattr(version.content, field) for field in _OF_CONTENT}
    content["manifest"] = manifest
    return {field: getattr(version, field) for field in _OF_VERSION} | content


def _version(task: str, fields: dict[str, Any], manifests: list[ManifestText], shared: dict[Any, Any]) -> StoredVersion:
    own = {field: fields.pop(field) for field in _OF_VERSION}
    own["by"], fields["peft_type"] = (shared.setdefault(text, text) for text in (own["by"], fields["peft_type"]))
    content = {**fields, "manifest": manifests[fields["manifest"]]}
    return _VERSION.validate_python({"task": task, "content": content, **own})


def _summary_fields(about: ManifestSummary) -> dict[str, Any]:
    """What a snapshot tells of a manifest's summary: nothing if this server could not read the manifest."""
    if about.problem is not None:
        return {}
    base = about.base_model
    known = None if base is None else (base.name, base.fingerprint)
    return {"identity": about.identity, "description": about.description, "base_model": known}


def _key(number: int) -> str:
    return f"snapshots/{number:012d}.json.gz"
