"""Snapshots of the fold: a start reads the newest one and the events after it, not the whole log.

    snapshots/000000001000.json.gz   the state at event 1000, create-if-absent, never rewritten

Format: JSON lines. A header comes first, then manifests and tasks; each manifest is written once, before the first task
that uses it. Two snapshots stay at any time, and all events after the older one, so no single damaged object loses
anything.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import re
import zlib
from typing import Any

from server.errors import StoreError
from server.registry.events import VersionContent
from server.registry.manifest_text import ManifestText
from server.registry.objects import Objects
from server.registry.state import RegistryState, StoredVersion, TaskState

log = logging.getLogger(__name__)

FORMAT = 1
SNAPSHOT_EVENTS = 1000
"""Number of events between two snapshots."""
GRACE_SECONDS = 7 * 24 * 3600.0
"""Events are removed once a snapshot that replaces them has this age. Every server syncs far more often."""
MOST_REMOVED = 2000
"""Objects that are removed in one go."""
UNREADABLE = (
    OSError,
    EOFError,
    zlib.error,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RecursionError,
)
"""What reading a damaged snapshot raises; gzip raises OSError for a file that is none."""

_NAME = re.compile(r"(\d{12})\.json\.gz")


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

        def write(fields: dict[str, Any]) -> None:
            file.write(json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")

        write(
            {
                "format": FORMAT,
                "last_event": state.last_event,
                "first_version": state.first_version,
                "tasks": len(state.tasks),
            }
        )
        for name, task in state.tasks.items():
            for version in task.versions.values():
                text = version.content.manifest
                if text not in manifests:
                    manifests[text] = len(manifests)
                    write({"manifest": text})
            write(
                {
                    "task": name,
                    "history": task.history,
                    "last_version": task.last_version,
                    "last_event": task.last_event,
                    "inbox": task.inbox,
                    "versions": [_version_fields(version, manifests) for version in task.versions.values()],
                }
            )
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
            state.tasks[fields["task"]] = TaskState(
                versions={item["number"]: _version(fields["task"], item, manifests) for item in fields["versions"]},
                history=[tuple((int(number), int(weight)) for number, weight in now) for now in fields["history"]],
                last_version=int(fields["last_version"]),
                last_event=int(fields["last_event"]),
                inbox={str(place): str(identity) for place, identity in fields["inbox"].items()},
            )
    if len(state.tasks) != head["tasks"]:
        raise ValueError(f"it has {len(state.tasks)} tasks and should have {head['tasks']}")
    state.last_event, state.first_version = int(head["last_event"]), int(head["first_version"])
    state.count()
    return state


def _version_fields(version: StoredVersion, manifests: dict[str, int]) -> dict[str, Any]:
    content = version.content
    return {
        "number": version.number,
        "at": version.at,
        "source": version.source,
        "by": version.by,
        "digest": content.digest,
        "prefix_hash": content.prefix_hash,
        "peft_type": content.peft_type,
        "shape": content.shape,
        "num_bytes": content.num_bytes,
        "blob": content.blob,
        "manifest": manifests[content.manifest],
    }


def _version(task: str, fields: dict[str, Any], manifests: list[ManifestText]) -> StoredVersion:
    rows, width = fields["shape"]
    manifest = manifests[fields["manifest"]]
    content = VersionContent(
        fields["digest"],
        fields["prefix_hash"],
        fields["peft_type"],
        (int(rows), int(width)),
        int(fields["num_bytes"]),
        fields["blob"],
        manifest,
    )
    content.about  # noqa: B018 - read now, so that no list has to
    return StoredVersion(task, int(fields["number"]), content, fields["at"], fields["source"], fields["by"])


def _key(number: int) -> str:
    return f"snapshots/{number:012d}.json.gz"
